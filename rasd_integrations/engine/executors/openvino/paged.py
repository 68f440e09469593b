"""OpenVINO's paged attention.

Every key head is a sequence of its own to that operation, so that pages are parts of ``KVBuffer``'s memory, read and
written without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import torch
from openvino.op import Parameter, _PagedAttentionExtension
from torch import Tensor

from rasd_integrations.engine.executors.openvino.attention import (
    Arrays,
    Attention,
    Place,
    Span,
    nothing,
    number,
)
from rasd_integrations.engine.executors.openvino.tracing import TraceLayout
from rasd_integrations.engine.kv.order import Order

PAGE = 32  # rows, fixed by OpenVINO's CPU kernels
_I32, _F32, _U8 = ov.Type.i32, ov.Type.f32, ov.Type.u8
# For each number of key heads: prefix lengths, starts of the step's rows, pages and their starts, tree masks and
# their starts (both empty for chains).
_INDICES = (_I32, _I32, _I32, _I32, _U8, _I32)


class PagedAttention(Attention):
    """OpenVINO's own operation."""

    name = "OpenVINO's paged attention"
    order = Order.ROWS

    def of(self, trace: TraceLayout) -> PagedAttention:
        """Return the same for other layers."""
        return PagedAttention(trace, self.kind, in_8_bits=self.more > 0)

    def lacking(self) -> str | None:
        """Return a term of the scores that the operation does not have."""
        scorings = [layer.scoring for layer in self.trace.layers]
        if any(scoring.softcap is not None for scoring in scorings):
            return "caps its scores"
        if any(scoring.sinks is not None for scoring in scorings):
            # The operation takes one sink a head, and all our key heads are sequences of one head.
            return "has attention sinks"
        if self.more and any(scoring.window is not None for scoring in scorings):
            return "has layers with a sliding window, some steps of which run eagerly, in 16 bits or more"
        return None

    def parameters(self) -> list[Parameter]:
        """Return the longest total length, indices for each number of key heads, and pages of keys and of values."""
        each = [Parameter(kind, ov.PartialShape([-1])) for kind in _INDICES * len(self._heads)]
        sizes = [layer.key_dim for layer in self.trace.layers]
        sizes += [layer.value_dim for layer in self.trace.layers]
        pages = [ov.PartialShape([-1, 1, PAGE, size + self.more]) for size in sizes]
        memory = [Parameter(self.kind, shape) for shape in pages]
        return [Parameter(_I32, ov.PartialShape([])), *each, *memory]

    def output(
        self, index: int, reads: Sequence[ov.Output], parameters: Sequence[Parameter]
    ) -> ov.Output:
        """Return the output of one layer."""
        layer = self.trace.layers[index]
        most, *rest = (parameter.output(0) for parameter in parameters)
        start = self._heads.index(layer.kv_heads) * len(_INDICES)
        past, begins, blocks, block_begins, sees, sees_begins = rest[start : start + len(_INDICES)]
        keys, values = rest[index - 2 * self._layers], rest[index - self._layers]
        op = _PagedAttentionExtension(
            [
                *reads, keys, values, past, begins, blocks, block_begins,
                number(layer.scoring.scale, _F32), number(layer.scoring.window or 0, _I32),
                nothing(_F32),  # slopes by distance
                most,
                nothing(_I32), nothing(_I32), nothing(_I32), nothing(_F32),  # scores out, rotation of pages
                nothing(_F32), number(0, _I32), number(0, _I32),  # sparse attention
                nothing(_F32, 4),  # sinks
                number(0, _I32), nothing(_I32), nothing(_I32), nothing(_I32),  # eviction of pages
                nothing(_I32),  # kinds of tokens
                sees, sees_begins,
            ]
        )  # fmt: skip
        sizes = {"num_k_heads": 1, "num_v_heads": 1} | {
            "k_head_size": layer.key_dim,
            "v_head_size": layer.value_dim,
        }
        for name, size in sizes.items():
            op.get_rt_info()[name] = size
        return op.output(0)

    def bind(self, request: Any, stores: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set pages of keys and values as inputs, those of a head one after the other."""
        tensors = [keys for keys, _ in stores] + [values for _, values in stores]
        first = len(request.model_inputs) - len(tensors)
        for index, tensor in enumerate(tensors, first):
            request.set_input_tensor(index, _shared(tensor.view(-1, 1, PAGE, tensor.shape[-1])))

    def arrays(self, places: Sequence[Place], rows: int) -> Arrays:
        """Return the longest total length, and indices head by head."""
        made: Arrays = [np.zeros((), np.int32)]
        firsts = [(place.first // PAGE, place.capacity // PAGE) for place in places]
        mine = np.concatenate([np.arange(first, first + count) for first, count in firsts])
        squares = [p.rows**2 for p in places] if any(p.is_tree for p in places) else []
        for heads in self._heads:
            blocks = rows // PAGE * np.arange(heads)[:, None] + mine
            made += [
                np.empty(heads * len(places), np.int32),
                _begins([p.rows for p in places], heads),
                blocks.ravel().astype(np.int32),
                _begins([count for _, count in firsts], heads),
                np.empty(heads * sum(squares), np.uint8),
                _begins(squares, heads) if squares else np.empty(0, np.int32),
            ]
        return made

    def refresh(self, spans: Sequence[Span], made: Arrays) -> None:
        """Write lengths and masks."""
        made[0][...] = max(span.prefix + span.rows for span in spans)
        masks = [np.tri(s.rows, dtype=np.bool_) if s.sees is None else s.sees for s in spans]
        for index, heads in enumerate(self._heads):
            past, *_, sees, _ = made[1 + index * len(_INDICES) :][: len(_INDICES)]
            past.reshape(heads, -1)[:] = [span.prefix for span in spans]
            if sees.size:
                sees.reshape(heads, -1)[:] = np.concatenate([mask.ravel() for mask in masks])

    @property
    def _layers(self) -> int:
        return len(self.trace.layers)

    @property
    def _heads(self) -> tuple[int, ...]:
        return self.trace.head_counts


def _begins(counts: Sequence[int], heads: int) -> npt.NDArray[np.int32]:
    """Return the cumulative sums, from 0, of ``counts`` repeated for each head."""
    return np.asarray([0, *accumulate([*counts] * heads)], np.int32)


def _shared(tensor: Tensor) -> ov.Tensor:
    """Return an OpenVINO tensor over the memory of ``tensor``, which must outlive it."""
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        return ov.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), ov.Type.bf16)
    return ov.Tensor(tensor.numpy(), shared_memory=True)
