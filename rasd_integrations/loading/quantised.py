"""Linear layers and embeddings whose weights are 4- or 8-bit codes with a scale for each group of a row.

They run on any device, a part of the rows at a time, so that no dense copy of a weight is ever held. The compiled
executor reads the codes themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor, nn

CodeType = Literal["i4", "u4", "i8", "u8"]
_PART = 1 << 20  # numbers that are dequantised at once: they stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Coding:
    """How a weight ``[rows, columns]`` is coded.

    Attributes:
        kind: Type of a code; two codes of 4 bits share a byte, the first one in the low half.
        group: Columns that share a scale; divides the columns.
        has_minimum: A group has a minimum too.
    """

    kind: CodeType
    group: int
    has_minimum: bool

    @property
    def codes_per_byte(self) -> int:
        """1 or 2."""
        return 2 if self.kind in ("i4", "u4") else 1


class QuantisedWeight(nn.Module):
    """A weight as codes: ``scale * code - minimum``, in float32 and in this order.

    Attributes:
        codes: Bytes ``[rows, columns / codes_per_byte]``.
        scales: ``[rows, columns / group]``, float32 or float16.
        minimums: As ``scales``, or ``None``.
        coding: How to read them.
    """

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None

    def __init__(
        self, coding: Coding, codes: Tensor, scales: Tensor, minimums: Tensor | None
    ) -> None:
        """Wrap what ``coding`` describes."""
        super().__init__()
        self.coding = coding
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("minimums", minimums)

    @classmethod
    def empty(
        cls, coding: Coding, rows: int, columns: int, scale_type: torch.dtype
    ) -> QuantisedWeight:
        """Return a weight to be filled."""
        scales = torch.empty(rows, columns // coding.group, dtype=scale_type)
        codes = torch.empty(rows, columns // coding.codes_per_byte, dtype=torch.uint8)
        return cls(coding, codes, scales, scales.clone() if coding.has_minimum else None)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.codes), self.codes.shape[1] * self.coding.codes_per_byte

    def rows(self, order: Tensor) -> QuantisedWeight:
        """Return the weight of the rows ``order``."""
        minimums = None if self.minimums is None else self.minimums[order]
        return QuantisedWeight(self.coding, self.codes[order], self.scales[order], minimums)

    def dense(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return the weight's rows in float32."""
        values = numbers(self.codes[rows], self.coding)
        grouped = values.view(len(values), -1, self.coding.group)
        grouped.mul_(self.scales[rows].float()[..., None])
        if self.minimums is not None:
            grouped.sub_(self.minimums[rows].float()[..., None])
        return values


def numbers(codes: Tensor, coding: Coding) -> Tensor:
    """Return the codes ``[rows, columns]`` as new floats."""
    if coding.codes_per_byte == 1:
        return (codes.view(torch.int8) if coding.kind == "i8" else codes).float()
    is_signed = coding.kind == "i4"
    halves = codes ^ 0x88 if is_signed else codes
    values = halves.new_empty(*halves.shape, 2, dtype=torch.float32)
    values[..., 0] = halves & 15
    values[..., 1] = halves >> 4
    return values.sub_(8).flatten(1) if is_signed else values.flatten(1)


def packed(codes: Tensor, kind: CodeType) -> Tensor:
    """Return codes ``[n, columns]`` as the bytes of a `QuantisedWeight`."""
    codes = codes.view(torch.uint8)
    if kind in ("i8", "u8"):
        return codes
    pairs = codes.reshape(len(codes), -1, 2)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


class QuantisedLinear(nn.Module):
    """``nn.Linear`` over a quantised weight."""

    def __init__(self, quantised: QuantisedWeight, bias: nn.Parameter | None = None) -> None:
        """Take the place of a linear layer with this ``bias``."""
        super().__init__()
        self.quantised = quantised
        self.bias = bias
        self.out_features, self.in_features = quantised.shape

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``, a part of the rows at a time."""
        rows = max(1, _PART // self.in_features)
        parts = [slice(first, first + rows) for first in range(0, self.out_features, rows)]
        out = torch.cat([F.linear(x, self.quantised.dense(part).to(x.dtype)) for part in parts], -1)
        return out if self.bias is None else out + self.bias

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the same over the dense ``weight``."""
        return F.linear(x, weight, self.bias)


class QuantisedEmbedding(nn.Module):
    """``nn.Embedding`` over a quantised weight.

    Attributes:
        scale: Factor of the rows (Gemma).
    """

    def __init__(self, quantised: QuantisedWeight, dtype: torch.dtype, scale: float = 1.0) -> None:
        """Take the place of an embedding whose rows are of ``dtype``."""
        super().__init__()
        self.quantised = quantised
        self.dtype = dtype
        self.scale = scale
        self.num_embeddings, self.embedding_dim = quantised.shape

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` ``[...]``: ``[..., columns]``."""
        rows = self.quantised.dense(ids.reshape(-1)).to(self.dtype)
        return self._scaled(rows.reshape(*ids.shape, -1))

    def run(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Return the same of the dense ``weight``."""
        return self._scaled(F.embedding(ids, weight))

    def _scaled(self, rows: Tensor) -> Tensor:
        return (
            rows if self.scale == 1 else rows * rows.new_tensor(self.scale)
        )  # rounded as Gemma's is
