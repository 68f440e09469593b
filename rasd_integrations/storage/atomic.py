"""Writes files and folders atomically: readers see the old one or the whole new one, even if a writer is killed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rasd_integrations.errors import RASDError, StorageError

_TEMPORARY = re.compile(r"\.rasd-new-[0-9a-f]{16}")
_ABANDONED_S = 3600  # a temporary file not written to for so long has lost its writer


@contextlib.contextmanager
def replaced_file(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """Open a new file that replaces ``path`` when the block ends without an error.

    Args:
        path: Missing folders are created; what killed writers left in the folder is removed.
        nbytes: Expected size, for the error message.

    Raises:
        StorageError: The folder cannot be written to, or the disk is full.
    """
    with _explained(path, nbytes), _temporary(path.parent) as temporary:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def replaced_folder(path: Path, nbytes: int) -> Iterator[Path]:
    """Create an empty folder that becomes ``path`` when the block ends without an error; see :func:`replaced_file`.

    If ``path`` exists by then and is not empty it stays: another process made the same.
    """
    with _explained(path, nbytes), temporary_folder(path.parent) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        try:
            temporary.rename(path)
        except OSError:
            if not path.exists():
                raise


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Create an empty folder in ``parent``, removed when the block ends, or later if the process is killed.

    Raises:
        OSError: ``parent`` cannot be written to.
    """
    with _temporary(parent) as temporary:
        temporary.mkdir()
        yield temporary


def is_temporary(path: Path) -> bool:
    """Return True for a name that this module gives to unfinished files and folders."""
    return _TEMPORARY.fullmatch(path.name) is not None


def clear_abandoned(folder: Path) -> None:
    """Remove what killed writers left in ``folder``, an hour after its last byte."""
    with contextlib.suppress(OSError):
        for path in [p for p in folder.iterdir() if is_temporary(p) and not p.is_symlink()]:
            with contextlib.suppress(OSError):  # another process may remove it at the same time
                latest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
                if time.time() - latest > _ABANDONED_S:
                    _remove(path)


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """Yield an unused temporary path in ``parent`` and remove what lies there afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(parent)
    temporary = parent / f".rasd-new-{secrets.token_hex(8)}"
    try:
        yield temporary
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _explained(path: Path, nbytes: int) -> Iterator[None]:
    """Turn ``OSError`` into :class:`StorageError` with the sizes needed and free."""
    try:
        yield
    except RASDError:  # some are OSErrors, too
        raise
    except OSError as err:
        room = ""
        with contextlib.suppress(OSError):
            here = next(p for p in path.parents if p.exists())
            room = f", and {shutil.disk_usage(here).free / 1e6:,.0f} MB are free there"
        msg = (
            f"Cannot write {path}: {err.strerror or err}. It takes about {nbytes / 1e6:,.1f} MB{room}. Make room, "
            f"or choose a folder that can be written to."
        )
        raise StorageError(msg) from err
