"""Arrays on disk: one safetensors file, written in one move, mapped into memory, checked when opened."""

from __future__ import annotations

import json
import mmap
import os
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.errors import RetrievalError
from rasd_integrations.storage.atomic import replaced_file
from rasd_integrations.storage.tensor_file import (
    Entry,
    UnusableFileError,
    open_regular,
    read_header,
)

_FORMAT, _VERSION = "rasd-dense-store", "1"
_TYPES = {"U32": "<u4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_CHECKSUM = "its checksum does not match its content"


class ArrayFile:
    """A file of named arrays, mapped into memory; it must not change while it is open.

    Attributes:
        marks: What its writer said of it.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """Map ``path``.

        Args:
            path: The file.
            verify: Read all of it once and compare its checksum.

        Raises:
            RetrievalError: There is no such file, or it is damaged or of another format.
        """
        self.path = path
        try:
            with open_regular(path) as file:
                self.marks, entries = read_header(file, _FORMAT, _VERSION)
                self._descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
            self._mark = self._state()
            # Copied on write, which nobody does: torch warns of memory that cannot be written to.
            self._bytes = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
            self._arrays = {name: self._array(entry) for name, entry in entries.items()}
            if verify and _checksum(self._arrays, self.marks) != self.marks.get("crc32"):
                raise ValueError(_CHECKSUM)  # noqa: TRY301 -- one place says that a file is unusable
        except FileNotFoundError as err:
            msg = f"There is no dense store at {path}. Make one: DenseStore.build(texts, model, folder)."
            raise RetrievalError(msg) from err
        except (OSError, ValueError) as err:
            msg = f"{path} cannot be used as a dense store: {err}. Build it again from its texts."
            raise RetrievalError(msg) from err

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return an array; a view of the file.

        Raises:
            RetrievalError: The file has none of this name.
        """
        if name not in self._arrays:
            msg = f"{self.path} cannot be used as a dense store: it has no {name!r}. Build it again from its texts."
            raise RetrievalError(msg)
        return self._arrays[name]

    def check(self) -> None:
        """See that the file is the one that was opened.

        Raises:
            RetrievalError: It was written to in place. (A file that was replaced is still the old one here.)
        """
        if self._state() != self._mark:
            msg = f"The dense store {self.path} was changed in place while it was open. Build it again."
            raise RetrievalError(msg)

    def _array(self, entry: Entry) -> NDArray[Any]:
        if entry.dtype not in _TYPES:
            msg = f"it holds {entry.dtype}, which no dense store does"
            raise UnusableFileError(msg)
        dtype = np.dtype(_TYPES[entry.dtype])
        count = (entry.end - entry.start) // dtype.itemsize
        return np.frombuffer(self._bytes, dtype, count, entry.start).reshape(entry.shape)

    def _state(self) -> tuple[int, int]:
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns


def write(path: Path, arrays: Mapping[str, NDArray[Any]], marks: Mapping[str, str]) -> None:
    """Write ``arrays`` to ``path`` in one move: a reader sees the old file or the new one.

    The same arrays and marks make the same bytes.

    Raises:
        StorageError: The disk is full, or the folder cannot be written to.
    """
    # Wide types first, as safetensors wants them: so all lie at multiples of their size.
    wide_first = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    flat = {name: np.ascontiguousarray(arrays[name]) for name in wide_first}
    said = {**marks, "format": _FORMAT, "version": _VERSION}
    header: dict[str, Any] = {"__metadata__": said | {"crc32": _checksum(flat, said)}}
    end = 0
    for name, array in flat.items():
        start, end = end, end + array.nbytes
        kind = _NAMES[array.dtype.newbyteorder("<").str]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with replaced_file(path, len(head) + end) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for array in flat.values():
            file.write(array.data)


def _checksum(arrays: Mapping[str, NDArray[Any]], marks: Mapping[str, str]) -> str:
    """Return the checksum of what a file says and holds, in hex."""
    said = {name: mark for name, mark in marks.items() if name != "crc32"}
    crc = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        crc = zlib.crc32(f"{name}{array.shape}".encode(), crc)
        crc = zlib.crc32(array.data, crc) if array.size else crc
    return f"{crc:08x}"
