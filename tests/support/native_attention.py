"""The kernels of ``engine/native`` by ctypes, and the same attention in float64."""

from __future__ import annotations

import ctypes as c
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = {"f32": torch.float32, "bf16": torch.bfloat16}
BLOCK = 16


class _Layer(c.Structure):
    _fields_ = [
        ("kv_heads", c.c_int32), ("group", c.c_int32), ("key_dim", c.c_int32), ("value_dim", c.c_int32),
        ("scale", c.c_float), ("softcap", c.c_float), ("window", c.c_int32), ("sinks", c.c_void_p), ("kind", c.c_int32),
    ]  # fmt: skip


class _Answer(c.Structure):
    _fields_ = [
        ("first", c.c_int64), ("prefix", c.c_int64), ("rows", c.c_int64), ("depths", c.c_void_p), ("sees", c.c_void_p),
    ]  # fmt: skip


class _Step(c.Structure):
    _fields_ = [
        ("layer", _Layer), ("rows", c.c_int64), ("query", c.c_void_p), ("key", c.c_void_p), ("value", c.c_void_p),
        ("out", c.c_void_p), ("keys", c.c_void_p), ("values", c.c_void_p), ("capacity", c.c_int64),
        ("answers", c.c_void_p), ("num_answers", c.c_int32),
    ]  # fmt: skip


class Asked(NamedTuple):
    """One answer's rows: ``sees`` ``[rows, rows]`` and ``depths`` ``[rows]`` of a tree, ``None`` for a chain."""

    prefix: int
    rows: int
    sees: Tensor | None = None
    depths: Tensor | None = None

    @property
    def depth(self) -> Tensor:
        """Positions of the rows behind the prefix's end."""
        return torch.arange(self.rows) if self.depths is None else self.depths


class Shape(NamedTuple):
    """Of a layer."""

    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    kind: str = "bf16"
    window: int = 0
    softcap: float = 0.0
    has_sinks: bool = False


class Case:
    """Random keys, values and queries of a step."""

    def __init__(self, shape: Shape, asked: Sequence[Asked], seed: int = 0) -> None:
        self.shape, self.asked = shape, asked
        draw = torch.Generator().manual_seed(seed)
        self.rows = sum(a.rows for a in asked)
        heads = shape.kv_heads
        self.firsts, end = [], BLOCK
        for a in asked:
            self.firsts.append(end)
            end += -(-(a.prefix + a.rows) // BLOCK) * BLOCK
        self.capacity = end + BLOCK

        def rows(*size: int) -> Tensor:
            made = torch.randn(*size, generator=draw)
            return made if shape.kind == "f32" else made.bfloat16().float()

        self.query = rows(heads, self.rows, shape.group, shape.key_dim)
        self.key, self.value = (rows(heads, self.rows, d) for d in (shape.key_dim, shape.value_dim))
        self.sinks = torch.randn(heads * shape.group, generator=draw) if shape.has_sinks else None
        self.keys, self.values = (
            _memory(shape.kind, heads, self.capacity, d, draw)
            for d in (shape.key_dim, shape.value_dim)
        )

    def run(self, library: c.CDLL, variant: str) -> Tensor:
        """Return ``[kv_heads, rows, group, value_dim]``; the step's rows are in the memory then."""
        shape = self.shape
        out = torch.full((shape.kv_heads, self.rows, shape.group, shape.value_dim), math.nan)
        masks = [
            None if a.sees is None else a.sees.to(torch.uint8).contiguous() for a in self.asked
        ]
        depths = [a.depth.int() for a in self.asked]
        answers = (_Answer * len(self.asked))(
            *(
                _Answer(
                    first,
                    a.prefix,
                    a.rows,
                    depth.data_ptr(),
                    None if mask is None else mask.data_ptr(),
                )
                for first, a, depth, mask in zip(
                    self.firsts, self.asked, depths, masks, strict=True
                )
            )
        )
        layer = _Layer(
            shape.kv_heads, shape.group, shape.key_dim, shape.value_dim, shape.key_dim**-0.5, shape.softcap,
            shape.window, None if self.sinks is None else self.sinks.data_ptr(), [*KINDS].index(shape.kind),
        )  # fmt: skip
        step = _Step(
            layer, self.rows, self.query.data_ptr(), self.key.data_ptr(), self.value.data_ptr(), out.data_ptr(),
            self.keys.data_ptr(), self.values.data_ptr(), self.capacity, c.addressof(answers), len(self.asked),
        )  # fmt: skip
        library.rasd_attend(variant.encode(), c.byref(step))
        return out

    def expected(self) -> Tensor:
        """Return the same in float64, over the memory as it is: after :meth:`run` with the step's rows in it."""
        shape, start, outs = self.shape, 0, []
        keys, values = keys_of(self.keys).double(), values_of(self.values).double()
        for first, a in zip(self.firsts, self.asked, strict=True):
            end = a.prefix + a.rows
            mine, theirs = (m[:, first : first + end] for m in (keys, values))
            scores = torch.einsum(
                "hngd,hkd->hgnk", self.query[:, start : start + a.rows].double(), mine
            )
            scores *= shape.key_dim**-0.5
            if shape.softcap:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            scores.masked_fill_(~_seen(a, shape.window), -math.inf)
            if self.sinks is not None:
                sink = (
                    self.sinks.double()
                    .view(shape.kv_heads, shape.group, 1, 1)
                    .expand(-1, -1, a.rows, 1)
                )
                scores = torch.cat([scores, sink], -1)
            weights = scores.softmax(-1)[..., :end]
            outs.append(torch.einsum("hgnk,hkd->hngd", weights, theirs))
            start += a.rows
        return torch.cat(outs, 1)


def loaded(path: Path) -> c.CDLL:
    return c.CDLL(str(path))


def _seen(asked: Asked, window: int) -> Tensor:
    end = asked.prefix + asked.rows
    seen = torch.ones(asked.rows, end, dtype=torch.bool)
    tail = torch.ones(asked.rows, asked.rows, dtype=torch.bool).tril()
    seen[:, asked.prefix :] = tail if asked.sees is None else asked.sees
    if window:
        positions = torch.cat([torch.arange(asked.prefix), asked.prefix + asked.depth])
        ages = asked.prefix + asked.depth[:, None] - positions
        seen &= ages < window
    return seen


def _memory(kind: str, heads: int, rows: int, dim: int, draw: Any) -> Tensor:
    return torch.randn(heads, rows, dim, generator=draw).to(KINDS[kind])


def keys_of(memory: Tensor) -> Tensor:
    """Return ``[kv_heads, rows, key_dim]`` of keys in blocks."""
    heads, rows, dim = memory.shape
    step = 2 if memory.dtype == torch.bfloat16 else 1
    blocks = memory.view(heads, rows // BLOCK, dim // step, BLOCK, step)
    return blocks.transpose(2, 3).reshape(heads, rows, dim)


def values_of(memory: Tensor) -> Tensor:
    """Return ``[kv_heads, rows, value_dim]`` of values in blocks."""
    heads, rows, dim = memory.shape
    step = 2 if memory.dtype == torch.bfloat16 else 1
    return memory.view(heads, rows // step, dim, step).transpose(2, 3).reshape(heads, rows, dim)


def cases(count: int, seed: int) -> Iterator[Case]:
    """Return random cases: chains and trees, windows, caps, sinks, several answers."""
    draw = random.Random(seed)
    for number in range(count):
        is_tree = draw.random() < 0.5
        window = draw.choice((0, 0, 1, 5, 100, 700))
        key_dim = draw.choice((16, 32, 64, 80, 96, 128, 256))
        value_dim = key_dim if draw.random() < 0.8 else draw.choice((16, 48, 64, 128))
        shape = Shape(
            draw.choice((1, 2, 3)), draw.choice((1, 2, 3, 7, 16)), key_dim, value_dim, draw.choice([*KINDS]), window,
            draw.choice((0.0, 0.0, 20.0)), draw.random() < 0.3,
        )  # fmt: skip
        asked = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            prefix = draw.choice((0, 1, 31, 32, 100, 513, draw.randrange(3000)))
            rows = draw.choice((1, 2, 5, 9, 17, draw.randrange(1, 70)))
            sees = depths = None
            if is_tree and draw.random() < 0.8:
                sees, depths = (
                    torch.eye(rows, dtype=torch.bool),
                    torch.zeros(rows, dtype=torch.long),
                )
                for row in range(1, rows):
                    parent = draw.randrange(row)
                    sees[row] |= sees[parent]
                    depths[row] = depths[parent] + 1
            asked.append(Asked(prefix, rows, sees, depths))
        yield Case(shape, asked, number)
