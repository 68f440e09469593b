"""Headers of safetensors files, checked before anything they say is believed.

Checksums tell damage, not malice: who can write to a folder can also write a file with right checksums.
Whatever a header says, reading it ends in an answer or in a :class:`UnusableFileError`.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_ITEM_SIZES = {
    "U8": 1, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip
_MOST_HEADER = 1 << 24  # bytes


class UnusableFileError(ValueError):
    """Why a file is not used."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: Its type's name in the file.
        shape: Its sizes; their product times the type's size is ``end - start``.
        start: Its first byte in the file.
        end: The byte behind its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def open_regular(path: Path) -> BinaryIO:
    """Open a file unbuffered; what is no file (a folder, a pipe that nobody writes to) is refused at once.

    Raises:
        OSError: It is not there or cannot be read.
        UnusableFileError: It is no file.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a folder is an OSError of its own
        msg = "it is no file"
        raise UnusableFileError(msg)
    return path.open("rb", buffering=0)


def read_header(file: BinaryIO, kind: str, version: str) -> tuple[dict[str, str], dict[str, Entry]]:
    """Return what a file's writer said of it, and its tensors in the order in which they lie.

    Args:
        file: At its start.
        kind: What its mark ``format`` must be.
        version: What its mark ``version`` must be.

    Raises:
        UnusableFileError: It is damaged, cut, of another format, or says what cannot be.
    """
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= _MOST_HEADER:
        msg = "it does not begin with a header"
        raise UnusableFileError(msg)
    content = parsed(file.read(size))
    marks = content.pop("__metadata__", None)
    if not isinstance(marks, dict) or not all(isinstance(mark, str) for mark in marks.values()):
        msg = "its header names no format"
        raise UnusableFileError(msg)
    known = (marks.get("format"), marks.get("version"))
    if known != (kind, version):
        msg = f"it is {known[0]} version {known[1]}, not {kind} version {version}"
        raise UnusableFileError(msg)
    entries: dict[str, Entry] = {}
    end = origin = 8 + size
    for name, said in content.items():
        entries[name] = entry = _entry(name, said, end, origin)
        end = entry.end
    missing = end - os.fstat(file.fileno()).st_size
    if missing:
        msg = f"it is {abs(missing)} bytes too {'short' if missing > 0 else 'long'}"
        raise UnusableFileError(msg)
    return marks, entries


def parsed(text: bytes | str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        UnusableFileError: It is none, or is nested without end.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as err:
        msg = f"its header is no JSON ({type(err).__name__})"
        raise UnusableFileError(msg) from err
    if not isinstance(content, dict):
        msg = "its header is no JSON object"
        raise UnusableFileError(msg)
    return content


def header_checksum(marks: Mapping[str, str], entries: Mapping[str, Entry]) -> int:
    """Return the CRC-32 of all that a header says but of the mark ``crc32``."""
    origin = min((entry.start for entry in entries.values()), default=0)
    said: dict[str, Any] = {
        name: {
            "dtype": entry.dtype,
            "shape": [*entry.shape],
            "data_offsets": [entry.start - origin, entry.end - origin],
        }
        for name, entry in entries.items()
    }
    said["__metadata__"] = {name: mark for name, mark in marks.items() if name != "crc32"}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


def _entry(name: str, said: object, start: int, origin: int) -> Entry:
    """Return a tensor that must begin at byte ``start`` of the file, ``origin`` being that of the first."""
    match said:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(end)]}:
            size = _ITEM_SIZES.get(dtype, -1)
            sound = all(type(n) is int and n >= 0 for n in shape) and first == start - origin
            if sound and end - first == math.prod(shape) * size:
                return Entry(dtype, tuple(shape), start, origin + end)
    msg = f"its header says of {name!r} what cannot be"
    raise UnusableFileError(msg)
