"""The folder for what is kept between runs, and digests of files that are read once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from rasd_integrations.errors import StorageError
from rasd_integrations.storage.atomic import replaced_file
from rasd_integrations.storage.marked import MarkedFolder, mark, marked, touch

_BLOCK = 1 << 20
_DIGEST = re.compile(rb"[0-9a-f]{64}")


def cache_folder() -> Path:
    """Return the folder for what is kept between runs: ``$RASD_CACHE``, else the user's cache folder."""
    given = os.environ.get("RASD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given or Path(base) / "rasd_integrations").expanduser()


def title_of(name: str) -> str:
    """Return what people call the model ``name``: the last part of a path, a hub id as it stands."""
    path = Path(name)
    if path.suffix == ".gguf":
        return path.stem
    return path.name if path.is_absolute() else name


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, read once for each place, size and time of change (1.3 GB/s).

    Raises:
        OSError: It cannot be read.
    """
    stat = path.stat()
    said = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    name = hashlib.blake2b(repr(said).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / "digests"
    known = folder / f"{name}.digest"
    with contextlib.suppress(OSError):
        text = known.read_bytes()
        if _DIGEST.fullmatch(text):
            touch(folder)
            return text.decode()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    with contextlib.suppress(StorageError):  # read again the next time
        if marked(folder) is None:
            mark(folder, "digests", "digests of files")
        with replaced_file(known, 64) as out:
            out.write(digest.hexdigest().encode())
    return digest.hexdigest()


def whole(folder: Path) -> MarkedFolder | None:
    """Return what ``folder`` holds of ours, and note its use; ``None`` where it lacks a file or one was changed."""
    own = marked(folder)
    if own is None or not own.digests:
        return None
    try:
        for name, digest in own.digests.items():
            if file_digest(folder / name) != digest:
                return None
    except OSError:
        return None
    touch(folder)
    return own
