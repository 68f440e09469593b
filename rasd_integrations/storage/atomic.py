"""Files and folders written in one move: a reader sees the old one or the whole new one, whenever a writer dies."""

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
_ABANDONED_S = 3600  # what nobody has written to for so long has lost its writer


@contextlib.contextmanager
def replaced_file(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """Hand out a file that takes the place of ``path`` when the block ends without an error.

    Args:
        path: Its folder is made where it is not there, and cleared of what killed writers left in it.
        nbytes: About how many will be written, for the error's message.

    Raises:
        StorageError: The folder cannot be written to, or the disk is full.
    """
    with _explained(path, nbytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(path.parent)
        temporary = _temporary(path)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            _remove(temporary)
            raise


@contextlib.contextmanager
def replaced_folder(path: Path, nbytes: int) -> Iterator[Path]:
    """Hand out an empty folder that takes the place of ``path`` when the block ends without an error.

    Where another process was first its folder stays, for both made the same; the caller asks before whether
    what lies there can be used.

    Args:
        path: As :func:`replaced_file` takes it.
        nbytes: About how many will be written, for the error's message.

    Raises:
        StorageError: The folder cannot be written to, or the disk is full.
    """
    with _explained(path, nbytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(path.parent)
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                _rename_if_free(temporary, path)
        finally:
            _remove(temporary)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Hand out an empty folder in ``parent`` that is removed when the block ends, or later if its process is killed.

    Raises:
        OSError: ``parent`` cannot be written to.
    """
    clear_abandoned(parent)
    temporary = _temporary(parent / "any")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        _remove(temporary)


def is_temporary(path: Path) -> bool:
    """Whether the name is one that writers of this module give to what is not whole yet."""
    return _TEMPORARY.fullmatch(path.name) is not None


def clear_abandoned(folder: Path) -> None:
    """Remove what writers that were killed left in ``folder``, an hour after its last byte."""
    with contextlib.suppress(OSError):
        ours = [p for p in folder.iterdir() if is_temporary(p) and not p.is_symlink()]
        for path in ours:
            with contextlib.suppress(OSError):  # another process removes it at the same time
                latest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
                if time.time() - latest > _ABANDONED_S:
                    _remove(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".rasd-new-{secrets.token_hex(8)}")


def _rename_if_free(source: Path, target: Path) -> None:
    """Rename a folder; one that is there and not empty stays."""
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _explained(path: Path, nbytes: int) -> Iterator[None]:
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
