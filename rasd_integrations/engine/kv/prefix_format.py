"""One prefix on disk: a safetensors file of keys, values and hidden states, written in one move, read with checks.

Read, not mapped: rows go into a buffer that grows anyway, and a file that is cut while it is read is a short
read here, where a mapped one would end the process (docs/adr/0010-warmed-files-are-read.md).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rasd_integrations.engine.kv.buffer import KVBuffer, LayerRow
from rasd_integrations.storage.atomic import replaced_file
from rasd_integrations.storage.tensor_file import (
    Entry,
    UnusableFileError,
    header_checksum,
    open_regular,
    parsed,
    read_header,
)

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
_NO_SUM = "0" * 8


@dataclass(frozen=True, slots=True)
class RowLayout:
    """What a model keeps of one token.

    Attributes:
        layers: Keys and values, layer by layer.
        hidden_size: Of its final hidden state.
    """

    layers: tuple[LayerRow, ...]
    hidden_size: int


def read_ids(path: Path, key: str, layout: RowLayout) -> Ids:
    """Return the tokens whose rows a file holds; reads and checks no more than them and the header.

    Raises:
        OSError: The file cannot be read.
        UnusableFileError: It is damaged, or of another key or layout.
    """
    with open_regular(path) as file:
        return _Header(file, key, layout).ids(file)


@torch.inference_mode()
def read(
    path: Path, key: str, layout: RowLayout, ids: Ids, capacity: int, device: torch.device,
    *, keeps_hidden: bool, row_major: bool = False,
) -> KVBuffer:  # fmt: skip
    """Return a buffer with the rows of ``ids``, which a file begins with; all of it is checked.

    Args:
        path: The file.
        key: It must carry it.
        layout: Its rows must have it.
        ids: At least one.
        capacity: Tokens to plan for.
        device: Where keys and values are wanted.
        keeps_hidden: Read hidden states, too, if the file has them.
        row_major: Lay keys out row by row.

    Raises:
        OSError: The file cannot be read.
        UnusableFileError: It is damaged, of another key or layout, or of other tokens.
    """
    length = len(ids)
    buffer = KVBuffer(max(capacity, length))
    if row_major:
        buffer.lay_by_rows()
    with open_regular(path) as file:
        header = _Header(file, key, layout)
        if not np.array_equal(header.ids(file)[:length], ids):
            msg = "another file of other tokens took its name"
            raise UnusableFileError(msg)
        # Used again for each layer: the system takes longer to hand out fresh memory than to fill it.
        rooms = [torch.empty(header.largest, dtype=torch.uint8) for _ in range(2)]
        for layer in range(len(layout.layers)):
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
        StorageError: The disk is full, or the folder cannot be written to.
        ValueError: Keys and values are of a type that files do not hold.
    """
    tensors = dict(_tensors(ids, buffer))
    sums = dict.fromkeys(tensors, _NO_SUM)
    head = _head(key, tensors, sums)
    with replaced_file(path, len(head) + sum(t.nbytes for t in tensors.values())) as file:
        file.write(head)
        for tensor_name, tensor in tensors.items():
            content = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
            sums[tensor_name] = f"{zlib.crc32(content):08x}"
            file.write(content)
        file.seek(0)
        file.write(_head(key, tensors, sums))


class _Header:
    """A file's header, checked: what it says of itself, and where its tensors lie."""

    def __init__(self, file: BinaryIO, key: str, layout: RowLayout) -> None:
        """Read it.

        Raises:
            UnusableFileError: It is no header of ours, of another model or namespace, or says what cannot be.
        """
        marks, self._entries = read_header(file, _FORMAT, _VERSION)
        if marks.get("crc32") != f"{header_checksum(marks, self._entries):08x}":
            msg = "the checksum of its header does not match"
            raise UnusableFileError(msg)
        if marks.get("key") != key:
            msg = "it belongs to another model, dtype, version of transformers or namespace"
            raise UnusableFileError(msg)
        self._sums = parsed(marks.get("tensors", ""))
        if not _fits(self._entries, layout):
            msg = "its layers are not the model's"
            raise UnusableFileError(msg)

    def __contains__(self, name: str) -> bool:
        """Whether the file has the tensor ``name``."""
        return name in self._entries

    def ids(self, file: BinaryIO) -> Ids:
        """Return the tokens whose rows these are."""
        ids: Ids = self.tensor(file, "ids").numpy().astype(np.int64)
        return ids

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(entry.end - entry.start for entry in self._entries.values())

    def tensor(self, file: BinaryIO, name: str, room: Tensor | None = None) -> Tensor:
        """Read a tensor, into ``room`` where it is given, and compare its checksum.

        Raises:
            UnusableFileError: The file is damaged.
        """
        entry = self._entries[name]
        size = entry.end - entry.start
        content = torch.empty(size, dtype=torch.uint8) if room is None else room[:size]
        view, done = content.numpy().data, 0
        file.seek(entry.start)
        while done < len(view) and (n := file.readinto(view[done:])):  # type: ignore[attr-defined]
            done += n
        if done < len(view) or f"{zlib.crc32(view):08x}" != self._sums.get(name):
            msg = f"the checksum of {name!r} does not match"
            raise UnusableFileError(msg)
        return content.view(_TYPES[entry.dtype]).view(entry.shape)


def _fits(entries: Mapping[str, Entry], layout: RowLayout) -> bool:
    """Whether a file has all tensors that rows of this layout have, each of its size and type."""
    (n, *_) = (*(entries["ids"].shape if "ids" in entries else ()), 0)
    expected: dict[str, tuple[str | None, tuple[int, ...]]] = {"ids": ("I32", (n,))}
    for layer, (heads, key_dim, value_dim, dtype) in enumerate(layout.layers):
        expected[f"key.{layer}"] = _NAMES.get(dtype), (heads, key_dim, n)
        expected[f"value.{layer}"] = _NAMES.get(dtype), (heads, n, value_dim)
    if (hidden := entries.get("hidden")) is not None and hidden.dtype in _TYPES:
        expected["hidden"] = hidden.dtype, (n, layout.hidden_size)
    return n > 0 and expected == {name: (e.dtype, e.shape) for name, e in entries.items()}


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
    content: dict[str, Any] = {}
    entries: dict[str, Entry] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        if (kind := _NAMES.get(tensor.dtype)) is None:
            msg = f"{name!r} is of {tensor.dtype}, which such a file has no place for"
            raise ValueError(msg)
        content[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [start, end]}
        entries[name] = Entry(kind, tuple(tensor.shape), start, end)
    marks["crc32"] = f"{header_checksum(marks, entries):08x}"
    head = json.dumps({"__metadata__": marks, **content}).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head
