"""Reads and writes arrays as one safetensors file, with a checksum on each array and on the header.

A header's ``__metadata__`` holds ``format``, ``version``, the writer's own marks, ``tensors`` (CRC-32 by array) and
``crc32`` (of all else in the header). Checksums tell damage, not malice: who can write to a folder can also write a
file with right checksums. Whatever a file says, reading it ends in an answer or in an :class:`UnusableFileError`.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.storage.atomic import replaced_file

DTYPES = {
    "U8": "u1", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_ITEM_SIZES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()} | {"BF16": 2}
_MOST_HEADER = 1 << 24  # bytes
_BLOCK = 1 << 20  # bytes
_NO_SUM = "0" * 8

Bytes = NDArray[np.uint8]


class UnusableFileError(ValueError):
    """Why a file is not used."""


class FileKind(NamedTuple):
    """What a file's ``format`` and ``version`` must be."""

    format: str
    version: str


class Content(NamedTuple):
    """An array to write: its type's name in the file, such as ``BF16``, and a function that returns its bytes, flat."""

    dtype: str
    shape: tuple[int, ...]
    content: Callable[[], Bytes]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * _ITEM_SIZES[self.dtype]


class Entry(NamedTuple):
    """An array in a file, whose bytes are ``start:end`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def refuse(why: str) -> NoReturn:
    """Raise :class:`UnusableFileError`."""
    raise UnusableFileError(why)


def content_of(array: NDArray[Any]) -> Content:
    """Describe a numpy array of one of :data:`DTYPES`."""
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return Content(_NAMES[little.dtype], array.shape, lambda: little.reshape(-1).view(np.uint8))


def write(
    path: Path, kind: FileKind, marks: Mapping[str, str], arrays: Mapping[str, Content]
) -> None:
    """Write ``arrays`` to ``path`` atomically; the same arrays and marks give the same bytes.

    Raises:
        StorageError: The disk is full, or the folder cannot be written to.
    """
    # Wide types first: each array starts at a multiple of its item size.
    ordered = dict(sorted(arrays.items(), key=lambda item: -_ITEM_SIZES[item[1].dtype]))
    sums = dict.fromkeys(ordered, _NO_SUM)
    head = _head(kind, marks, ordered, sums)
    nbytes = len(head) + sum(array.nbytes for array in ordered.values())
    with replaced_file(path, nbytes) as file:
        file.write(head)
        for name, array in ordered.items():
            content = array.content().data
            sums[name] = f"{zlib.crc32(content):08x}"
            file.write(content)
        file.seek(0)
        file.write(_head(kind, marks, ordered, sums))


@contextmanager
def opened(path: Path, kind: FileKind) -> Iterator[TensorFile]:
    """Open a file and check its header.

    Raises:
        OSError: It is a folder, missing or unreadable.
        UnusableFileError: It is damaged, cut, of another kind, or contradicts itself.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would wait for a writer
        refuse("it is no file")
    with path.open("rb", buffering=0) as file:
        yield TensorFile(file, *_read_header(file, kind))


class TensorFile:
    """An open file: the strings in its header (``marks``), and its arrays by name, in file order (``entries``)."""

    def __init__(self, file: FileIO, marks: dict[str, str], entries: dict[str, Entry]) -> None:
        """Use :func:`opened`."""
        self.file, self.marks, self.entries = file, marks, entries
        self._sums = parsed(marks.get("tensors", ""))

    def read(self, name: str, room: Bytes | None = None) -> Bytes:
        """Return the bytes of an array, read into ``room`` if given; raise unless its checksum is right."""
        entry = self.entries[name]
        size = entry.end - entry.start
        content = np.empty(size, np.uint8) if room is None else room[:size]
        view, done = content.data, 0
        self.file.seek(entry.start)
        while done < size and (n := self.file.readinto(view[done:])):
            done += n
        self._compare(name, zlib.crc32(view[:done]))
        return content

    def verify(self) -> None:
        """Read the whole file in blocks; raise unless all checksums are right."""
        for name, entry in self.entries.items():
            self.file.seek(entry.start)
            left, crc = entry.end - entry.start, 0
            while left and (block := self.file.read(min(left, _BLOCK))):
                left, crc = left - len(block), zlib.crc32(block, crc)
            self._compare(name, crc)

    def _compare(self, name: str, crc: int) -> None:
        if self._sums.get(name) != f"{crc:08x}":
            refuse(f"the checksum of {name!r} does not match its content")


def parsed(text: bytes | str) -> dict[str, Any]:
    """Parse a JSON object; raise if it is none, or is nested too deep."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as err:
        msg = f"its header is no JSON ({type(err).__name__})"
        raise UnusableFileError(msg) from err
    return content if isinstance(content, dict) else refuse("its header is no JSON object")


def _read_header(file: FileIO, kind: FileKind) -> tuple[dict[str, str], dict[str, Entry]]:
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= _MOST_HEADER:
        refuse("it does not begin with a header")
    content = parsed(file.read(size))
    marks = content.get("__metadata__")
    if not isinstance(marks, dict) or not all(isinstance(mark, str) for mark in marks.values()):
        refuse("its header names no format")
    if (known := (marks.get("format"), marks.get("version"))) != kind:
        refuse(f"it is {known[0]} version {known[1]}, not {kind.format} version {kind.version}")
    entries: dict[str, Entry] = {}
    end = origin = 8 + size
    for name, said in content.items():
        if name != "__metadata__":
            entries[name] = entry = _entry(name, said, end, origin)
            end = entry.end
    if missing := end - os.fstat(file.fileno()).st_size:
        refuse(f"it is {abs(missing)} bytes too {'short' if missing > 0 else 'long'}")
    if marks.pop("crc32", None) != _header_sum(content):
        refuse("the checksum of its header does not match")
    return marks, entries


def _entry(name: str, said: object, start: int, origin: int) -> Entry:
    """Return an array that must begin at byte ``start`` of the file, the first one at ``origin``."""
    match said:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(first), int(end)],
            **more,
        } if not more:
            size = _ITEM_SIZES.get(dtype, -1)
            sound = all(type(n) is int and n >= 0 for n in shape) and first == start - origin
            if sound and end - first == math.prod(shape) * size:
                return Entry(dtype, tuple(shape), start, origin + end)
    refuse(f"its header says of {name!r} what cannot be")


def _head(
    kind: FileKind, marks: Mapping[str, str], arrays: Mapping[str, Content], sums: Mapping[str, str]
) -> bytes:
    """Return the first bytes of a file; their number does not depend on the checksums."""
    said = {**marks, "format": kind.format, "version": kind.version, "tensors": json.dumps(sums)}
    content: dict[str, Any] = {"__metadata__": said}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        content[name] = {
            "dtype": array.dtype, "shape": [*array.shape], "data_offsets": [start, end],
        }  # fmt: skip
    said["crc32"] = _header_sum(content)
    head = json.dumps(content).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _header_sum(content: Mapping[str, Any]) -> str:
    """Return the CRC-32 of a header but for its mark ``crc32``."""
    marks = {name: mark for name, mark in content["__metadata__"].items() if name != "crc32"}
    said = json.dumps({**content, "__metadata__": marks}, sort_keys=True)
    return f"{zlib.crc32(said.encode()):08x}"
