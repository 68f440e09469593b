"""Stores on disk: one safetensors file, written in one move, mapped into memory, checked when opened.

The file is written and read here, not by safetensors' functions: those name no offsets, which mapping
needs, and a checksum over header and content needs both before the first byte is written.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.datastores.tokens.segment import Segment
from rasd_integrations.errors import RetrievalError
from rasd_integrations.storage.atomic import replaced_file
from rasd_integrations.storage.tensor_file import (
    Entry,
    UnusableFileError,
    header_checksum,
    open_regular,
    read_header,
)

_FORMAT, _VERSION = "rasd-token-store", "1"
# Name, type here and type in the file of a segment's arrays, wide ones first as safetensors wants them.
# The text's bytes are in the order that look-ups compare them in, which the format has no name for.
_ARRAYS = (
    ("keys", "<u8", "U64"),
    ("starts", "<u4", "U32"),
    ("order", "<u4", "U32"),
    ("text", ">u4", "U8"),
)
_BLOCK = 1 << 20


class MappedFile:
    """A file mapped into memory, which must not change while it is.

    It is looked at before each use. One that is cut in the very microseconds of a look-up still ends the
    process, as any mapped file would; one that is replaced does no harm.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Map the whole of ``file``."""
        self.path = path
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.bytes = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # look-ups jump: reading ahead would only fill memory
            self.bytes.madvise(mmap.MADV_RANDOM)
        self._mark = self._state()

    def check(self) -> None:
        """See that the file is the one that was opened.

        Raises:
            RetrievalError: It was written to in place. (A file that was replaced is still the old one here.)
        """
        if self._state() != self._mark:
            msg = (
                f"The token store {self.path} was changed in place while it was open. Open it again, and "
                f"exchange it with TokenStore.save, which replaces the file in one move."
            )
            raise RetrievalError(msg)

    def _state(self) -> tuple[int, int]:
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns


def write(path: Path, segments: Sequence[Segment], tokenizer: str) -> None:
    """Write living chunks to ``path`` in one move: a reader sees the old file or the new one.

    Raises:
        StorageError: The disk is full, or the folder cannot be written to.
    """
    kept = [segment.compact() for segment in segments]
    named = [
        (f"{i}.{name}", getattr(segment, name).astype(dtype, copy=False), kind)
        for name, dtype, kind in _ARRAYS
        for i, segment in enumerate(kept)
    ]
    header: dict[str, Any] = {
        "__metadata__": {"format": _FORMAT, "version": _VERSION, "tokenizer": tokenizer}
    }
    end = 0
    for name, array, kind in named:
        shape = [*array.shape, 4] if kind == "U8" else [*array.shape]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    said = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    header["__metadata__"]["crc32"] = _checksum(said, (array for _, array, _ in named))
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with replaced_file(path, len(head) + end) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _, array, _ in named:
            file.write(array.data)


def read(path: Path, tokenizer: str, *, verify: bool = True) -> tuple[Segment, ...]:
    """Map a file's segments.

    Args:
        path: The file.
        tokenizer: The fingerprint that it must carry.
        verify: Read the whole file once and compare its checksum.

    Raises:
        RetrievalError: There is no such file, it is damaged, of another format or of another tokenizer.
    """
    try:
        with open_regular(path) as file:
            entries = _checked_entries(file, tokenizer, verify=verify)
            return tuple(_segments(entries, MappedFile(path, file)))
    except (FileNotFoundError, IsADirectoryError) as err:
        msg = f"There is no token store at {path}. Make one: TokenStore.build(texts, encode).save(path)."
        raise RetrievalError(msg) from err
    except (OSError, ValueError, OverflowError) as err:
        msg = f"{path} cannot be used as a token store: {err}. Build it again from its texts."
        raise RetrievalError(msg) from err


def _checked_entries(file: BinaryIO, tokenizer: str, *, verify: bool) -> dict[str, Entry]:
    marks, entries = read_header(file, _FORMAT, _VERSION)
    if marks.get("tokenizer") != tokenizer:
        msg = f"its ids are of another tokenizer, {marks.get('tokenizer')} instead of {tokenizer}"
        raise UnusableFileError(msg)
    expected = {
        f"{i}.{name}": kind
        for i in range(len(entries) // len(_ARRAYS))
        for name, _, kind in _ARRAYS
    }
    if {name: entry.dtype for name, entry in entries.items()} != expected:
        msg = "its arrays are not those of a token store"
        raise UnusableFileError(msg)
    if verify and _checksum(header_checksum(marks, entries), _blocks(file)) != marks.get("crc32"):
        msg = "its checksum does not match its content"
        raise UnusableFileError(msg)
    return entries


def _segments(entries: dict[str, Entry], origin: MappedFile) -> Iterable[Segment]:
    for i in range(len(entries) // len(_ARRAYS)):
        arrays: dict[str, NDArray[Any]] = {}
        for name, dtype, _ in _ARRAYS:
            entry = entries[f"{i}.{name}"]
            count = (entry.end - entry.start) // np.dtype(dtype).itemsize
            arrays[name] = np.frombuffer(origin.bytes, dtype, count, entry.start)
        alive = np.ones(len(arrays["keys"]), bool)
        base = entries[f"{i}.text"].start
        yield Segment(**arrays, alive=alive, raw=origin.bytes, base=base, origin=origin)


def _blocks(file: BinaryIO) -> Iterable[bytes]:
    """Yield the rest of a file; read, not mapped, so that it does not stay in memory."""
    while block := file.read(_BLOCK):
        yield block


def _checksum(crc: int, parts: Iterable[Any]) -> str:
    """Return the checksum of what a file says, ``crc``, and holds, in hex."""
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"
