"""The folders of what is kept between processes, and SHA-256 digests of files, computed once."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from pathlib import Path

from rasd_integrations.errors import StorageError
from rasd_integrations.storage.atomic import replaced_file
from rasd_integrations.storage.marked import Kind, adding_to, marked, sha256, touch

logger = logging.getLogger(__name__)

_DIGEST = re.compile(rb"[0-9a-f]{64}")


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return ``cache_dir``, else ``$RASD_CACHE``, else our folder in the user's cache folder."""
    given = cache_dir or os.environ.get("RASD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given or Path(base) / "rasd_integrations").expanduser()


def cache_folder(kind: Kind, cache_dir: str | Path | None = None) -> Path:
    """Return the folder of one kind of files, which need not exist.

    Each entry is a folder in it, marked as ours; of digests, it is the only one.
    """
    return cache_root(cache_dir) / kind


def title_of(name: str) -> str:
    """Return a model's name for people: the last part of a path, or a hub id."""
    path = Path(name)
    if path.suffix == ".gguf":
        return path.stem
    return path.name if path.is_absolute() else name


def file_digest(path: Path, cache_dir: str | Path | None = None) -> str:
    """Return the SHA-256 of a file, read once for each path, size and time of change (1.3 GB/s).

    ``cache_dir`` is where it is noted.

    Raises:
        OSError: It cannot be read.
    """
    stat = path.stat()
    state = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    name = hashlib.blake2b(repr(state).encode(), digest_size=16).hexdigest()
    folder = cache_folder("digests", cache_dir)
    known = folder / f"{name}.digest"
    with contextlib.suppress(OSError):
        text = known.read_bytes()
        if _DIGEST.fullmatch(text):
            touch(folder)
            return text.decode()
    digest = sha256(path)
    with (
        contextlib.suppress(StorageError),  # computed again the next time
        adding_to(folder, "digests", "digests of files"),
        replaced_file(known, 64) as out,
    ):
        out.write(digest.encode())
    return digest


def is_whole(folder: Path) -> bool:
    """Return True, and note the use, if ``folder`` is ours and all its files are there and unchanged."""
    own, root = marked(folder), folder.parents[1]
    with contextlib.suppress(OSError):
        if own is not None and own.digests:
            kept = own.digests.items()
            if all(file_digest(folder / name, root) == digest for name, digest in kept):
                touch(folder)
                return True
    with contextlib.suppress(OSError):  # another user's
        if folder.exists():
            logger.warning("%s is damaged and is made again", folder)
    return False
