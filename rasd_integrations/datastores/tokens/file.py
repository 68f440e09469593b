"""Stores on disk: one safetensors file, written in one move, mapped into memory, checked when opened.

The file is written and read here, not by safetensors' functions: those name no offsets, which mapping
needs, and a checksum over header and content needs both before the first byte is written.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import weakref
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.datastores.tokens.segment import Segment
from rasd_integrations.errors import RetrievalError

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
_MOST_HEADER = 1 << 24


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
        OSError: The folder cannot be written to.
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
    header["__metadata__"]["crc32"] = _checksum(header, (array for _, array, _ in named))
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for _, array, _ in named:
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


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
        with path.open("rb") as file:
            header = _checked_header(file, tokenizer, verify=verify)
            return tuple(_segments(header, MappedFile(path, file)))
    except (FileNotFoundError, IsADirectoryError) as err:
        msg = f"There is no token store at {path}. Make one: TokenStore.build(texts, encode).save(path)."
        raise RetrievalError(msg) from err
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as err:
        reason = err if isinstance(err, _UnusableError) else f"{type(err).__name__}: {err}"
        msg = f"{path} cannot be used as a token store: {reason}. Build it again from its texts."
        raise RetrievalError(msg) from err


class _UnusableError(ValueError):
    """Why a file is not used."""


def _checked_header(file: BinaryIO, tokenizer: str, *, verify: bool) -> dict[str, Any]:
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= _MOST_HEADER:
        msg = "it does not begin with a header"
        raise _UnusableError(msg)
    header: dict[str, Any] = json.loads(file.read(size))
    marks = header["__metadata__"]
    known = (marks.get("format"), marks.get("version"))
    if known != (_FORMAT, _VERSION):
        msg = f"it is {known[0]} version {known[1]}, not {_FORMAT} version {_VERSION}"
        raise _UnusableError(msg)
    if marks["tokenizer"] != tokenizer:
        msg = f"its ids are of another tokenizer, {marks['tokenizer']} instead of {tokenizer}"
        raise _UnusableError(msg)
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    end = max((entry["data_offsets"][1] for entry in tensors), default=0)
    missing = 8 + size + end - os.fstat(file.fileno()).st_size
    if missing:
        msg = f"it is {abs(missing)} bytes too {'short' if missing > 0 else 'long'}"
        raise _UnusableError(msg)
    expected = marks.pop("crc32")
    if verify and _checksum(header, _blocks(file)) != expected:
        msg = "its checksum does not match its content"
        raise _UnusableError(msg)
    return header


def _segments(header: dict[str, Any], origin: MappedFile) -> Iterable[Segment]:
    start = 8 + int.from_bytes(origin.bytes[:8], "little")
    for i in range(sum(name.endswith(".text") for name in header)):
        arrays: dict[str, NDArray[Any]] = {}
        bases: dict[str, int] = {}
        for name, dtype, _ in _ARRAYS:
            first, end = header[f"{i}.{name}"]["data_offsets"]
            count = (end - first) // np.dtype(dtype).itemsize
            bases[name] = start + first
            arrays[name] = np.frombuffer(origin.bytes, dtype, count, start + first)
        alive = np.ones(len(arrays["keys"]), bool)
        yield Segment(**arrays, alive=alive, raw=origin.bytes, base=bases["text"], origin=origin)


def _blocks(file: BinaryIO) -> Iterable[bytes]:
    """Yield the rest of a file; read, not mapped, so that it does not stay in memory."""
    while block := file.read(_BLOCK):
        yield block


def _checksum(header: dict[str, Any], parts: Iterable[Any]) -> str:
    """Return the checksum of what a file says and holds, in hex."""
    crc = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"
