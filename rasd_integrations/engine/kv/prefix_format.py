"""One prefix on disk: a safetensors file of keys, values and hidden states, written in one move, read with checks.

Read, not mapped: rows go into a buffer that grows anyway, and a file that is cut while it is read is a short
read here, where a mapped one would end the process (docs/adr/0010-warmed-files-are-read.md).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rasd_integrations.engine.kv.buffer import KVBuffer

Ids = npt.NDArray[np.int64]
_FORMAT, _VERSION = "rasd-prefix", "1"
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MOST_HEADER = 1 << 24
_NO_SUM = "0" * 8


def read_ids(path: Path, key: str) -> Ids:
    """Return the tokens whose rows a file holds; reads and checks no more than them.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or of another key.
    """
    with path.open("rb", buffering=0) as file:
        return _Header(file, key).ids(file)


@torch.inference_mode()
def read(
    path: Path, key: str, ids: Ids, capacity: int, device: torch.device,
    *, keeps_hidden: bool, by_rows: bool = False,
) -> KVBuffer:  # fmt: skip
    """Return a buffer with the rows of ``ids``, which a file begins with; all of it is checked.

    Args:
        path: The file.
        key: It must carry it.
        ids: At least one.
        capacity: Tokens to plan for.
        device: Where keys and values are wanted.
        keeps_hidden: Read hidden states, too, if the file has them.
        by_rows: Lay keys out row by row.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, of another key or of other tokens.
    """
    length = len(ids)
    buffer = KVBuffer(max(capacity, length))
    if by_rows:
        buffer.lay_by_rows()
    with path.open("rb", buffering=0) as file:
        header = _Header(file, key)
        if not np.array_equal(header.ids(file)[:length], ids):
            msg = "another file of other tokens took its name"
            raise ValueError(msg)
        # Used again for each layer: the system takes longer to hand out fresh memory than to fill it.
        rooms = [torch.empty(header.largest, dtype=torch.uint8) for _ in range(2)]
        for layer in range(header.num_layers):
            keys = header.tensor(file, f"key.{layer}", rooms[0]).transpose(1, 2)[:, :length]
            values = header.tensor(file, f"value.{layer}", rooms[1])[:, :length]
            buffer.write(layer, keys.to(device), values.to(device))
        if keeps_hidden and "hidden" in header:
            buffer.write_hidden(header.tensor(file, "hidden", rooms[0])[:length].to(device))
    buffer.commit(range(length))
    return buffer


@torch.inference_mode()
def write(path: Path, key: str, ids: Ids, buffer: KVBuffer) -> None:
    """Write rows to a file in one move: a reader sees all of it or nothing.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
        ValueError: Keys and values are of a type that files do not hold.
    """
    tensors = dict(_tensors(ids, buffer))
    sums = dict.fromkeys(tensors, _NO_SUM)
    head = _head(key, tensors, sums)
    temporary = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        with temporary.open("xb") as file:
            file.write(head)
            for tensor_name, tensor in tensors.items():
                content = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
                sums[tensor_name] = f"{zlib.crc32(content):08x}"
                file.write(content)
            file.seek(0)
            file.write(_head(key, tensors, sums))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


class _Header:
    """A file's header, checked: what it says of itself, and where its tensors lie."""

    def __init__(self, file: FileIO, key: str) -> None:
        """Read it.

        Raises:
            ValueError: It is no header of ours, or of another model or namespace, or the file is cut.
        """
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= _MOST_HEADER:
            msg = "it does not begin with a header"
            raise ValueError(msg)
        content: dict[str, Any] = json.loads(file.read(size))
        marks = content["__metadata__"]
        known = (marks.get("format"), marks.get("version"))
        if known != (_FORMAT, _VERSION):
            msg = f"it is {known[0]} version {known[1]}, not {_FORMAT} version {_VERSION}"
            raise ValueError(msg)
        if marks.pop("crc32") != _checksum(content):
            msg = "the checksum of its header does not match"
            raise ValueError(msg)
        if marks["key"] != key:
            msg = "it belongs to another model, dtype, version of transformers or namespace"
            raise ValueError(msg)
        self._entries = {name: entry for name, entry in content.items() if name != "__metadata__"}
        self._sums: dict[str, str] = json.loads(marks["tensors"])
        self._start = 8 + size
        end = max(end for _, end in map(_place, self._entries.values()))
        missing = self._start + end - os.fstat(file.fileno()).st_size
        if missing:
            msg = f"it is {abs(missing)} bytes too {'short' if missing > 0 else 'long'}"
            raise ValueError(msg)

    @property
    def num_layers(self) -> int:
        """Layers that have keys and values."""
        return sum(name.startswith("key.") for name in self._entries)

    def __contains__(self, name: str) -> bool:
        """Whether the file has the tensor ``name``."""
        return name in self._entries

    def ids(self, file: FileIO) -> Ids:
        """Return the tokens whose rows these are."""
        ids: Ids = self.tensor(file, "ids").numpy().astype(np.int64)
        return ids

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(end - first for first, end in map(_place, self._entries.values()))

    def tensor(self, file: FileIO, name: str, room: Tensor | None = None) -> Tensor:
        """Read a tensor, into ``room`` where it is given, and compare its checksum.

        Raises:
            ValueError: The file is damaged.
        """
        entry = self._entries[name]
        first, end = _place(entry)
        content = (
            torch.empty(end - first, dtype=torch.uint8) if room is None else room[: end - first]
        )
        view, done = content.numpy().data, 0
        file.seek(self._start + first)
        while done < len(view) and (n := file.readinto(view[done:])):
            done += n
        if done < len(view) or f"{zlib.crc32(view):08x}" != self._sums[name]:
            msg = f"the checksum of {name!r} does not match"
            raise ValueError(msg)
        return content.view(_TYPES[entry["dtype"]]).view(entry["shape"])


def _place(entry: Mapping[str, Any]) -> tuple[int, int]:
    first, end = entry["data_offsets"]
    return int(first), int(end)


def _tensors(ids: Ids, buffer: KVBuffer) -> Iterator[tuple[str, Tensor]]:
    """Yield a file's tensors in their order: the ids first, which alone are read to know the file.

    Keys are ``[kv_heads, head_dim, tokens]`` on every device, as they lie in memory on a CPU; values are
    ``[kv_heads, tokens, head_dim]``.
    """
    n = len(ids)
    yield "ids", torch.from_numpy(ids.astype(np.int32))
    for layer in range(buffer.num_layers):
        key, value = buffer.rows(layer, 0, n)
        yield f"key.{layer}", key.transpose(1, 2)
        yield f"value.{layer}", value
    first, hidden = buffer.hidden()
    if first == 0:  # else rows were run when nobody asked for them
        yield "hidden", hidden[:n]


def _head(key: str, tensors: Mapping[str, Tensor], sums: Mapping[str, str]) -> bytes:
    """Return the header's bytes; their number does not depend on the checksums."""
    marks = {"format": _FORMAT, "version": _VERSION, "key": key, "tensors": json.dumps(sums)}
    content: dict[str, Any] = {"__metadata__": marks}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        if (kind := _NAMES.get(tensor.dtype)) is None:
            msg = f"{name!r} is of {tensor.dtype}, which such a file has no place for"
            raise ValueError(msg)
        content[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [start, end]}
    marks["crc32"] = _checksum(content)
    head = json.dumps(content).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
