"""How rows of keys and values lie in memory: as columns, as rows, or in blocks as the native kernel multiplies them.

A store is a tensor ``[kv_heads, rows, head_dim]``. In blocks (``engine/native/attention.hpp``) the memory of a head is
``[rows / 16, head_dim / step, 16, step]`` of keys and ``[rows / step, head_dim, step]`` of values; ``step`` is 2 for
bfloat16, else 1. Slices of whole blocks are copied like those of any tensor; single rows are read and written here.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

BLOCK = 16  # rows


class Order(Enum):
    """How the rows of a head lie in memory."""

    # Scores of a few queries against thousands of keys by torch run twice as fast on transposed keys
    # (docs/explanation/experiments.md).
    COLUMNS = "keys transposed on a CPU"
    ROWS = "row by row"
    BLOCKS = "in blocks"

    @property
    def fixed(self) -> Order:
        """An order whose strides do not depend on the capacity."""
        return Order.ROWS if self is Order.COLUMNS else self


def allocate(like: Tensor, rows: int, order: Order, *, is_key: bool) -> Tensor:
    """Return an uninitialised store of ``rows`` rows such as those of ``like`` ``[kv_heads, n, head_dim]``."""
    heads, _, dim = like.shape
    if order is Order.COLUMNS and is_key and like.device.type == "cpu":
        memory = torch.empty(heads, dim, rows, dtype=like.dtype, device=like.device)
        return memory.transpose(1, 2)
    return torch.empty(heads, rows, dim, dtype=like.dtype, device=like.device)


def whole(rows: int) -> int:
    """Return ``rows``, rounded up to whole blocks."""
    return -(-rows // BLOCK) * BLOCK


def read(store: Tensor, order: Order, start: int, end: int, *, is_key: bool) -> Tensor:
    """Return rows ``start:end`` ``[kv_heads, n, head_dim]``: a copy if they lie in blocks, else a view."""
    if order is not Order.BLOCKS:
        return store[:, start:end]
    cells = _cells(store, is_key=is_key)
    size = cells.shape[2]
    first = start // size
    some = cells[:, first : -(-end // size)]
    rows = some.reshape(store.shape[0], some.shape[1] * size, store.shape[2])
    return rows[:, start - first * size : end - first * size]


def write(store: Tensor, order: Order, start: int, rows: Tensor, *, is_key: bool) -> None:
    """Write ``rows`` ``[kv_heads, n, head_dim]`` from row ``start`` on."""
    n = rows.shape[1]
    if order is not Order.BLOCKS:
        store[:, start : start + n] = rows
        return
    cells = _cells(store, is_key=is_key)
    size = cells.shape[2]
    before = min(n, -start % size)  # rows up to the first whole block
    blocks = (n - before) // size
    first, after = (start + before) // size, before + blocks * size
    cells[:, first : first + blocks] = rows[:, before:after].reshape(
        len(rows), blocks, *cells.shape[2:]
    )
    single = torch.tensor([*range(before), *range(after, n)])
    if len(single):
        where = start + single
        cells[:, where // size, where % size] = rows[:, single].reshape(
            len(rows), len(single), *cells.shape[3:]
        )


def _cells(store: Tensor, *, is_key: bool) -> Tensor:
    """Return a view ``[kv_heads, blocks, rows of a block, head_dim / step, step]`` (of values the last are swapped)."""
    heads, rows, dim = store.shape
    step = 2 if store.dtype == torch.bfloat16 else 1
    if is_key:
        shape = heads, rows // BLOCK, BLOCK, dim // step, step
        strides = store.stride(0), BLOCK * dim, step, BLOCK * step, 1
    else:
        shape = heads, rows // step, step, dim, 1
        strides = store.stride(0), step * dim, 1, step, 1
    return store.as_strided(shape, strides)
