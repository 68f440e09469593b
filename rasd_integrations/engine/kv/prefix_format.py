"""The file of a kept prefix: token ids, keys, values and perhaps hidden states.

Read, not mapped: rows go into a buffer that grows anyway, and a file that is cut while it is read is a short
read here, where a mapped one would end the process (docs/adr/0010-warmed-files-are-read.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rasd_integrations.engine.kv.buffer import KVBuffer, KVLayout
from rasd_integrations.storage import tensor_file
from rasd_integrations.storage.tensor_file import (
    Bytes,
    Content,
    FileKind,
    TensorFile,
    content_of,
    opened,
    refuse,
)

Ids = npt.NDArray[np.int64]
_KIND = FileKind("rasd-prefix", "1")
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


def read_ids(path: Path, key: str, layout: KVLayout) -> Ids:
    """Return a file's token ids; reads and checks only these and the header.

    Raises:
        OSError: The file cannot be read.
        UnusableFileError: It is damaged, or of another key or layout.
    """
    with _checked(path, key, layout) as file:
        return _ids(file)


@torch.inference_mode()
def read(
    path: Path, key: str, layout: KVLayout, ids: Ids, capacity: int, device: torch.device,
    *, keeps_hidden: bool,
) -> KVBuffer:  # fmt: skip
    """Return a buffer with the rows of ``ids``, one or more first tokens of a file; all that is read is checked.

    Raises:
        OSError: The file cannot be read.
        UnusableFileError: It is damaged, of another key or layout, or of other tokens.
    """
    length = len(ids)
    buffer = KVBuffer(max(capacity, length))
    buffer.lay(layout.order)
    with _checked(path, key, layout) as file:
        if not np.array_equal(_ids(file)[:length], ids):
            refuse("another file of other tokens took its name")
        # Reused for each layer: page faults on fresh memory cost more than the read.
        largest = max(entry.end - entry.start for entry in file.entries.values())
        rooms = [np.empty(largest, np.uint8) for _ in range(2)]
        for layer in range(len(layout.layers)):
            keys = _tensor(file, f"key.{layer}", rooms[0]).transpose(1, 2)[:, :length]
            values = _tensor(file, f"value.{layer}", rooms[1])[:, :length]
            buffer.append(layer, keys.to(device), values.to(device))
        if keeps_hidden and "hidden" in file.entries:
            buffer.write_hidden(_tensor(file, "hidden", rooms[0])[:length].to(device))
    buffer.commit(range(length))
    return buffer


@torch.inference_mode()
def write(path: Path, key: str, ids: Ids, buffer: KVBuffer) -> None:
    """Write the first ``len(ids)`` rows of ``buffer`` to a file atomically.

    Keys are ``[kv_heads, head_dim, tokens]`` on every device, as they lie in memory on a CPU; values are
    ``[kv_heads, tokens, head_dim]``.

    Raises:
        StorageError: The disk is full, or the folder cannot be written to.
        ValueError: Keys and values are of a type that files do not hold.
    """
    n = len(ids)
    arrays = {"ids": content_of(ids.astype(np.int32))}
    for layer in range(buffer.num_layers):
        keys, values = buffer.rows(layer, 0, n)
        arrays[f"key.{layer}"] = _content(keys.transpose(1, 2))
        arrays[f"value.{layer}"] = _content(values)
    first, hidden = buffer.hidden()
    if first == 0:  # hidden states of all rows were kept
        arrays["hidden"] = _content(hidden[:n])
    tensor_file.write(path, _KIND, {"key": key}, arrays)


@contextmanager
def _checked(path: Path, key: str, layout: KVLayout) -> Iterator[TensorFile]:
    """Open a file of this key and layout."""
    with opened(path, _KIND) as file:
        if file.marks.get("key") != key:
            refuse("it belongs to another model, dtype, version of transformers or namespace")
        ids, hidden = (file.entries.get(name) for name in ("ids", "hidden"))
        n = ids.shape[0] if ids is not None and ids.shape else 0
        expected: dict[str, tuple[str | None, tuple[int, ...]]] = {"ids": ("I32", (n,))}
        for layer, (heads, key_dim, value_dim, dtype) in enumerate(layout.layers):
            expected[f"key.{layer}"] = _NAMES.get(dtype), (heads, key_dim, n)
            expected[f"value.{layer}"] = _NAMES.get(dtype), (heads, n, value_dim)
        if hidden is not None and hidden.dtype in _TYPES:
            expected["hidden"] = hidden.dtype, (n, layout.hidden_size)
        if not n or expected != {name: (e.dtype, e.shape) for name, e in file.entries.items()}:
            refuse("its layers are not the model's")
        yield file


def _ids(file: TensorFile) -> Ids:
    return file.read("ids").view("<i4").astype(np.int64)


def _tensor(file: TensorFile, name: str, room: Bytes) -> Tensor:
    entry = file.entries[name]
    return torch.from_numpy(file.read(name, room)).view(_TYPES[entry.dtype]).view(entry.shape)


def _content(tensor: Tensor) -> Content:
    """Describe a tensor to write; it is made contiguous only when it is written."""
    if (dtype := _NAMES.get(tensor.dtype)) is None:
        msg = f"it has values of {tensor.dtype}, which such a file cannot hold"
        raise ValueError(msg)

    def content() -> Bytes:
        return tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()

    return Content(dtype, tuple(tensor.shape), content)
