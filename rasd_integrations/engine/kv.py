"""Keys and values of the committed tokens of one stream: preallocated, append-only.

A step lays the rows of its own tokens in the spare room behind ``length``, where nobody reads; the
decoder then commits the rows of the accepted path. Until it does, the buffer holds what it held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GRANULE = 256


class KVBuffer:
    """The keys and values of one token sequence, one pair of tensors a layer.

    Attributes:
        length: Committed tokens.
    """

    def __init__(self, capacity: int) -> None:
        """Plan for ``capacity`` tokens; memory is taken at the first write of each layer."""
        self.length = 0
        self._capacity = _rounded(capacity)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the committed tokens (spare room is reserved, on a CPU not yet taken)."""
        return self.row_nbytes * self.length

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token, in the layers that have written."""
        stores = (*self._keys.values(), *self._values.values())
        return sum(t.element_size() * t.shape[0] * t.shape[2] for t in stores)

    @property
    def num_layers(self) -> int:
        """Layers that have written."""
        return len(self._keys)

    @torch.inference_mode()
    def reserve(self, num_rows: int) -> None:
        """Make room for ``num_rows`` tokens behind the committed ones."""
        needed = self.length + num_rows
        if needed <= self._capacity:
            return
        self._capacity = _rounded(max(needed, self._capacity * 3 // 2))
        for store in (self._keys, self._values):
            for layer, old in store.items():  # layer by layer: only one is held twice at a time
                store[layer] = _allocate(old, self._capacity, is_key=store is self._keys)
                store[layer][:, : self.length] = old[:, : self.length]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Lay a step's rows behind the committed ones and return both together.

        Args:
            layer: Index of the layer.
            key: ``[kv_heads, n, head_dim]``.
            value: ``[kv_heads, n, head_dim]``.

        Returns:
            Views ``[kv_heads, length + n, head_dim]`` of keys and values.
        """
        if layer not in self._keys:
            self._keys[layer] = _allocate(key, self._capacity, is_key=True)
            self._values[layer] = _allocate(value, self._capacity, is_key=False)
        end = self.length + key.shape[1]
        keys, values = self._keys[layer], self._values[layer]
        keys[:, self.length : end] = key
        values[:, self.length : end] = value
        return keys[:, :end], values[:, :end]

    @torch.inference_mode()
    def commit(self, rows: Sequence[int]) -> None:
        """Append the rows of the last step that ``rows`` names, ascending, and forget the others."""
        n, start = len(rows), self.length
        if list(rows) != list(range(n)):
            for store in (*self._keys.values(), *self._values.values()):
                index = torch.tensor(rows, device=store.device) + start
                store[:, start : start + n] = store.index_select(1, index)
        self.length = start + n

    def rows(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return views of committed rows ``start:end`` of a layer's keys and values."""
        return self._keys[layer][:, start:end], self._values[layer][:, start:end]

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on: between answers, and where a drafter's own guess failed."""
        self.length = min(self.length, length)

    @torch.inference_mode()
    def copy(self, length: int, capacity: int) -> KVBuffer:
        """Return a buffer of its own that holds the first ``length`` tokens."""
        new = KVBuffer(max(capacity, length))
        new.length = length
        for layer, key in self._keys.items():
            new._keys[layer] = _allocate(key, new._capacity, is_key=True)
            new._values[layer] = _allocate(self._values[layer], new._capacity, is_key=False)
            new._keys[layer][:, :length] = key[:, :length]
            new._values[layer][:, :length] = self._values[layer][:, :length]
        return new


def _rounded(capacity: int) -> int:
    return -(-max(capacity, 1) // GRANULE) * GRANULE


def _allocate(like: Tensor, capacity: int, *, is_key: bool) -> Tensor:
    """Return an uninitialised ``[kv_heads, capacity, head_dim]``.

    On a CPU the keys lie transposed in memory: scores of a few queries against thousands of keys then
    run twice as fast (docs/explanation/experiments.md). GPU kernels want both row by row.
    """
    heads, _, dim = like.shape
    if is_key and like.device.type == "cpu":
        return torch.empty(heads, dim, capacity, dtype=like.dtype).transpose(1, 2)
    return torch.empty(heads, capacity, dim, dtype=like.dtype, device=like.device)
