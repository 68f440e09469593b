"""Our folders, marked by a file that lists what they hold; only what it lists is ever deleted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rasd_integrations.storage.atomic import (
    clear_abandoned,
    is_temporary,
    replaced_file,
    replaced_folder,
)
from rasd_integrations.storage.tensor_file import UnusableFileError, parsed

Kind = Literal[
    "models", "graphs", "prefixes", "memory", "digests", "native"
]  # also the folders' names
# What markers of earlier versions say; their folders are not read any more, but listed and removed.
_EARLIER = ("converted", "joined", "compiled", "kept prompts")
MARKER = "rasd.json"
_FORMAT = "rasd-folder"
_BLOCK = 1 << 20
_SHOWN = 5  # names in a message
# Files of folders whose content changes; other folders list theirs in the marker.
_PREFIX = re.compile(r"[0-9a-f]{32}\.rasd-prefix")
_NAMES = {
    "prefixes": _PREFIX,
    "memory": re.compile(r"[0-9a-z-]{1,64}\.rasd-memory"),
    "digests": re.compile(r"[0-9a-f]{32}\.digest"),
    "earlier": _PREFIX,
}


@dataclass(frozen=True, slots=True)
class MarkedFolder:
    """A folder that this package made.

    Attributes:
        path: The folder.
        kind: What its files are; ``"earlier"``: made by a version before, and not read any more.
        model: The model that they belong to, for people.
        names: Its files, if the marker lists them.
        digests: SHA-256 by name of files that do not change.
    """

    path: Path
    kind: Kind | Literal["earlier"]
    model: str
    names: tuple[str, ...]
    digests: Mapping[str, str]

    def files(self) -> list[tuple[Path, os.stat_result]]:
        """Return its existing files without the marker; links are never followed."""
        found = []
        with contextlib.suppress(OSError):
            pattern = _NAMES.get(self.kind)
            listed = [self.path / name for name in self.names]
            if pattern is not None:
                listed += sorted(p for p in self.path.iterdir() if pattern.fullmatch(p.name))
            for path in listed:
                with contextlib.suppress(OSError):  # another process may remove it at the same time
                    stat = path.lstat()
                    if path.is_file() and not path.is_symlink():
                        found.append((path, stat))
        return found

    @property
    def nbytes(self) -> int:
        """Size of its files."""
        return sum(stat.st_size for _, stat in self.files())

    @property
    def last_used(self) -> float:
        """Time of the last write or read, in seconds since 1970."""
        times = [stat.st_mtime for _, stat in self.files()] if self.kind in _NAMES else []
        with contextlib.suppress(OSError):
            times.append((self.path / MARKER).stat().st_mtime)
        return max(times, default=0.0)

    def remove(self) -> int:
        """Delete its files, and the folder if nothing else is in it; return the freed bytes."""
        freed = 0
        for path, stat in self.files():
            with contextlib.suppress(OSError):
                path.unlink()
                freed += stat.st_size
        clear_abandoned(self.path)
        with contextlib.suppress(OSError):
            if [path.name for path in self.path.iterdir()] == [MARKER]:
                (self.path / MARKER).unlink()
                self.path.rmdir()
        return freed


@contextlib.contextmanager
def made_folder(path: Path, kind: Kind, model: str, nbytes: int) -> Iterator[Path]:
    """Create an empty folder that becomes ``path``, with a marker, when the block ends without an error.

    If ``path`` exists (damaged, or made by another process meanwhile) only files of the same names are replaced.

    Raises:
        StorageError: The folder cannot be written to, or the disk is full.
    """
    with replaced_folder(path, nbytes) as new:
        yield new
        digests = {file.name: sha256(file, sync=True) for file in sorted(new.iterdir())}
        mark(new, kind, model, digests, digests)
        if path.is_dir():
            (path / MARKER).unlink(missing_ok=True)  # not whole until all files are
            for name in (*digests, MARKER):
                (new / name).replace(path / name)


def mark(
    folder: Path,
    kind: Kind,
    model: str,
    names: Iterable[str] = (),
    digests: Mapping[str, str] | None = None,
) -> None:
    """Mark ``folder`` as ours, with the files ``names``.

    Raises:
        StorageError: It cannot be written to.
    """
    marker: dict[str, Any] = {
        "format": _FORMAT, "kind": kind, "model": model, "files": sorted(names), "sha256": digests or {},
    }  # fmt: skip
    content = json.dumps(marker, indent=1).encode()
    with replaced_file(folder / MARKER, len(content)) as file:
        file.write(content)


@contextlib.contextmanager
def adding_to(folder: Path, kind: Kind, model: str) -> Iterator[None]:
    """Have a folder whose content changes marked around the writing of a file; another process may clear it meanwhile.

    Raises:
        StorageError: It cannot be written to.
    """
    if marked(folder) is None:
        mark(folder, kind, model)
    yield
    if marked(folder) is None:
        mark(folder, kind, model)


def marked(folder: Path) -> MarkedFolder | None:
    """Read a folder's marker; ``None`` if the folder is not ours."""
    try:
        if folder.is_symlink() or not (folder / MARKER).is_file():
            return None
        marker = parsed((folder / MARKER).read_bytes()[: 1 << 20])
    except (OSError, UnusableFileError):
        return None
    match marker:
        case {
            "format": "rasd-folder",
            "kind": str(kind),
            "model": str(model),
            "files": list(names),
            "sha256": dict(digests),
        }:
            plain = all(isinstance(n, str) and n == Path(n).name != "" for n in (*names, *digests))
            for known in (*get_args(Kind), "earlier"):
                if plain and known == ("earlier" if kind in _EARLIER else kind):
                    return MarkedFolder(folder, known, model, tuple(names), digests)
    return None


def marked_folders(root: Path) -> Iterator[MarkedFolder]:
    """Yield our folders in ``root`` and one level below."""
    for folder in _folders(root):
        own = marked(folder)
        if own is not None:
            yield own
        else:
            yield from (inner for path in _folders(folder) if (inner := marked(path)) is not None)


def foreign(root: Path) -> list[str]:
    """Return names in ``root``, or beside our folders one level below, that are not ours; no empty folders."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(p for p in root.iterdir() if marked(p) is None):
            is_folder = path.is_dir() and not path.is_symlink()
            inner = sorted(path.iterdir()) if is_folder else []
            others = [p for p in inner if marked(p) is None and not is_temporary(p)]
            if len(others) < len(inner):
                found += [f"{path.name}/{p.name}" for p in others]
            elif not is_temporary(path) and (inner or not is_folder):
                found.append(path.name)
    return found


def shortened(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def sha256(path: Path, *, sync: bool = False) -> str:
    """Return the SHA-256 of a file's content; ``sync`` also flushes it to the disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def touch(folder: Path) -> None:
    """Note that one of our folders was used now."""
    with contextlib.suppress(OSError):
        os.utime(folder / MARKER)


def _folders(root: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(p for p in root.iterdir() if p.is_dir() and not p.is_symlink())
    return []
