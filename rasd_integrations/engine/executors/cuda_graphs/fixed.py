"""A step at fixed addresses and shapes, which can be recorded once and replayed with other contents.

Rows and prefix are rounded up, and the true numbers are in tensors on the device: keys behind the length are masked,
and padding rows repeat the last real one and write its keys and values to the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rasd_integrations.engine.attention import (
    Scoring,
    Segment,
    merged,
    tail_attention,
    with_sinks,
)
from rasd_integrations.engine.kv.buffer import KVBuffer

PrefixAttention = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""From packed queries, keys, values, length ``[1]`` int32 and scale: output and log-sum-exp ``[kv_heads, rows]``."""


class FixedInputs:
    """The tensors that a graph of ``rows`` rows reads, at fixed addresses.

    Attributes:
        ids: ``[rows]``.
        positions: ``[rows]``.
        source: ``[rows]`` the row that each row repeats: itself, or the last real one.
        tail: ``[rows, rows]`` True if a row may not see another.
        length: ``[1]`` tokens of the prefix.
        used: ``[1]`` the same in int32.
        end: ``[1]`` end of the step's keys in the buffer.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        """Allocate the tensors."""
        self._order = torch.arange(rows, device=device)
        self._tail = torch.zeros(rows, rows, dtype=torch.bool, device=device)  # of the real rows
        self.ids, self.positions, self.source = (torch.zeros_like(self._order) for _ in range(3))
        self.tail = torch.zeros_like(self._tail)
        self.length, self.end = self._order.new_zeros(1), self._order.new_zeros(1)
        self.used = torch.zeros(1, dtype=torch.int32, device=device)

    def fill(self, ids: Tensor, segment: Segment) -> None:
        """Write a step of at most ``rows`` rows, without a copy to the host."""
        n, length = len(ids), segment.buffer.length
        torch.clamp(self._order, max=n - 1, out=self.source)
        torch.index_select(ids, 0, self.source, out=self.ids)
        torch.index_select(segment.positions, 0, self.source, out=self.positions)
        blocked, _ = segment.blocked(length, None, ids.device)
        if blocked is not None:  # else there is one row
            self._tail[:n, :n] = blocked
        torch.index_select(self._tail, 0, self.source, out=self.tail)
        self.tail |= self.source != self._order  # a repeated row is seen once
        self.length.fill_(length)
        self.used.fill_(length)
        self.end.fill_(length + n)

    def set_position(self, length: int, position: int) -> None:
        """Set a step of one row behind ``length`` tokens; :meth:`advance` writes its token."""
        self.positions.fill_(position)
        self.length.fill_(length)
        self.used.fill_(length)
        self.end.fill_(length + 1)

    def advance(self, ids: Tensor) -> None:
        """Write ``ids`` ``[1]`` and advance by one position."""
        self.ids.copy_(ids)
        for number in (self.positions, self.length, self.used, self.end):
            number.add_(1)


@dataclass(frozen=True, slots=True)
class _View:
    """The keys that layers of one window read.

    Attributes:
        start: ``[1]`` the first of them; ``None`` is 0.
        columns: ``[m]`` their rows in the buffer.
        blocked: ``[n, m]`` True if a row may not see a key.
        behind: ``[m]`` True behind the step's last key.
    """

    start: Tensor | None
    columns: Tensor
    blocked: Tensor
    behind: Tensor


class FixedSegment(Segment):
    """A sequence with device-side lengths, for attention inside a CUDA graph."""

    __slots__ = ("_inputs", "_places", "_prefix", "_views")

    def __init__(
        self, inputs: FixedInputs, buffer: KVBuffer, prefix: PrefixAttention | None
    ) -> None:
        """Describe the rows of ``inputs``; made again for each run.

        Args:
            inputs: Of the step.
            buffer: Memory that is read and written; its length is not used.
            prefix: Attention over the prefix in layers without window and cap; ``None``: by a mask.
        """
        super().__init__(buffer, inputs.positions, None)
        self._inputs = inputs
        self._prefix = prefix
        self._places = inputs.length + inputs.source
        self._views: dict[int | None, _View] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        """Attend as :meth:`Segment.attend` does, over all rows of the bucket."""
        _, heads, n, dim = query.shape
        source = self._inputs.source
        keys, values = self.buffer.stores(layer)
        keys.index_copy_(1, self._places, key[0].index_select(1, source))
        values.index_copy_(1, self._places, value[0].index_select(1, source))
        kv_heads = keys.shape[0]
        packed = query.reshape(kv_heads, heads // kv_heads * n, dim)
        is_plain = scoring.window is None and scoring.softcap is None and dim == value.shape[-1]
        if self._prefix is not None and is_plain:
            head = self._prefix(packed, keys, values, self._inputs.used, scoring.scale)
            tail = tail_attention(packed, key[0], value[0], n, self._inputs.tail, scoring.scale)
            out = merged(head, tail, scoring.sinks).to(packed.dtype)
        else:
            view = self._view(keys.shape[1], scoring.window)
            if view.start is not None:
                keys, values = (t.index_select(1, view.columns) for t in (keys, values))
            out = _masked(packed, keys, values, n, view, scoring)
        return out.view(1, heads, n, -1).transpose(1, 2).contiguous()

    def _view(self, bucket: int, window: int | None) -> _View:
        """Return the keys that layers of this window read; made once a run, by recorded kernels."""
        known = self._views.get(window)
        if known is None:
            known = self._views[window] = self._made_view(bucket, window)
        return known

    def _made_view(self, bucket: int, window: int | None) -> _View:
        inputs, n = self._inputs, self.rows
        size = bucket if window is None else min(bucket, window + n)
        columns = torch.arange(size, device=inputs.length.device)
        start, own, blocked = None, self._places, inputs.tail
        if size < bucket:
            # The first row's window and the step fit behind it.
            start = (inputs.length + 1 - (window or 0)).clamp(0, bucket - size)
            columns, own = columns + start, own - start
        hidden = (columns >= inputs.length).expand(n, -1)
        if window is not None:
            places = inputs.positions[:, None]
            hidden = hidden | (places - columns >= window)
            blocked = blocked | (places - inputs.positions >= window)
        full = hidden.clone().index_copy_(1, own, blocked.index_select(1, inputs.source))
        return _View(start, columns, full, columns >= inputs.end)


def _masked(
    packed: Tensor, keys: Tensor, values: Tensor, n: int, view: _View, scoring: Scoring
) -> Tensor:
    """Attend to all keys of the view with a mask."""
    kv_heads, rows, _ = packed.shape
    scores = torch.bmm(packed * scoring.scale, keys.mT)
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores.view(kv_heads, rows // n, n, -1).masked_fill_(view.blocked, float("-inf"))
    # Memory that was never written may hold NaN, and 0 * NaN is NaN.
    out = torch.bmm(scores.softmax(-1), values.masked_fill(view.behind[:, None], 0.0))
    return with_sinks(out, scores, scoring.sinks)


def flash_prefix(
    packed: Tensor, keys: Tensor, values: Tensor, used: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the first ``used`` keys by torch's variable-length flash attention."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    rows, bucket = packed.shape[1], keys.shape[1]
    ends = torch.arange(2, dtype=torch.int32, device=packed.device)
    query, keys, values = (t.transpose(0, 1) for t in (packed, keys, values))
    out, lse = varlen_attn(
        query, keys, values, ends * rows, ends * bucket, rows, bucket,
        return_aux=AuxRequest(lse=True), scale=scale, seqused_k=used,
    )  # fmt: skip
    return out.transpose(0, 1), lse
