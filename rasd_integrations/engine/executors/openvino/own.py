"""The package's own attention (:mod:`rasd_integrations.engine.native`) as an operation of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino.op import Constant, Parameter
from openvino.utils.node_factory import NodeFactory
from torch import Tensor

from rasd_integrations.engine.executors.openvino.attention import (
    Arrays,
    Attention,
    Place,
    Span,
    nothing,
)
from rasd_integrations.engine.executors.openvino.tracing import TraceLayout
from rasd_integrations.engine.kv.order import BLOCK, Order

_I32, _U8 = ov.Type.i32, ov.Type.u8
_KINDS = ("f32", "bf16")  # by their number in attention.hpp
_ADDRESS = 8  # bytes; as bytes, since OpenVINO turns 64-bit integers into 32-bit ones


class OwnAttention(Attention):
    """Reads keys and values in blocks, by their addresses; scores may be capped, and have sinks."""

    order = Order.BLOCKS
    windows_in_trees = True
    widths = (1,)

    def __init__(
        self, trace: TraceLayout, kind: ov.Type, library: Path, variant: str, *, in_8_bits: bool
    ) -> None:
        """Describe the layers.

        Args:
            trace: Of the model.
            kind: Of keys and values, unless they are bytes.
            library: The built extension (:mod:`rasd_integrations.engine.native.library`).
            variant: One of :func:`~rasd_integrations.engine.native.library.variants`.
            in_8_bits: Keys and values are bytes, which it :meth:`lacks <lacking>`.
        """
        super().__init__(trace, kind, in_8_bits=in_8_bits)
        self.name = f"own attention ({variant})"
        self._library, self._variant = library, variant
        self._addresses = np.zeros(2 * _ADDRESS * len(trace.layers), np.uint8)
        self._capacity = np.zeros(1, np.int32)

    def of(self, trace: TraceLayout) -> OwnAttention:
        """Return the same for other layers."""
        return OwnAttention(trace, self.kind, self._library, self._variant, in_8_bits=False)

    def lacking(self) -> str | None:
        """Return what the kernel cannot do."""
        if self.more:
            return "keeps keys and values in 8 bits"
        sizes = {size for layer in self.trace.layers for size in (layer.key_dim, layer.value_dim)}
        if any(size % BLOCK for size in sizes):
            return f"has heads of {sorted(sizes)} numbers, not multiples of {BLOCK}"
        return None

    def parameters(self) -> list[Parameter]:
        """Return each answer's numbers, depths of rows, tree masks, addresses, and the memory's rows."""
        return [
            Parameter(_I32, ov.PartialShape([-1, 4])),
            Parameter(_I32, ov.PartialShape([-1])),
            Parameter(_U8, ov.PartialShape([-1])),
            Parameter(_U8, ov.PartialShape([len(self._addresses)])),
            Parameter(_I32, ov.PartialShape([1])),
        ]

    def output(
        self, index: int, reads: Sequence[ov.Output], parameters: Sequence[Parameter]
    ) -> ov.Output:
        """Return the output of one layer."""
        layer = self.trace.layers[index]
        scoring = layer.scoring
        sinks = nothing(ov.Type.f32)
        if scoring.sinks is not None:
            sinks = Constant(scoring.sinks.detach().float().numpy()).output(0)
        node = _factory(self._library).create(
            "RasdAttention",
            [*reads, *(parameter.output(0) for parameter in parameters), sinks],
            {
                "kv_heads": layer.kv_heads,
                "group": layer.group,
                "key_dim": layer.key_dim,
                "value_dim": layer.value_dim,
                "scale": float(scoring.scale),
                "softcap": float(scoring.softcap or 0),
                "window": scoring.window or 0,
                "index": index,
                "kind": _KINDS.index(self.kind.get_type_name()),
                "variant": self._variant,
            },
        )
        return node.output(0)

    def bind(self, request: Any, stores: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write the addresses."""
        addresses = [tensor.data_ptr() for pair in stores for tensor in pair]
        self._addresses[:] = np.array(addresses, np.uint64).view(np.uint8)
        self._capacity[0] = stores[0][0].shape[1]

    def arrays(self, places: Sequence[Place], rows: int) -> Arrays:
        """Return each answer's first row, prefix, rows and start of its mask; then the rest of :meth:`parameters`."""
        starts, end = [], 0
        for place in places:
            starts.append(end if place.is_tree else -1)
            end += place.rows**2 * place.is_tree
        answers = [[p.first, 0, p.rows, start] for p, start in zip(places, starts, strict=True)]
        return [
            np.array(answers, np.int32), np.empty(sum(place.rows for place in places), np.int32),
            np.empty(end, np.uint8), self._addresses, self._capacity,
        ]  # fmt: skip

    def refresh(self, spans: Sequence[Span], made: Arrays) -> None:
        """Write prefixes, depths and masks."""
        answers, depths, sees, *_ = made
        answers[:, 1] = [span.prefix for span in spans]
        depths[:] = np.concatenate([span.depths for span in spans])
        masks = [span.sees.ravel() for span in spans if span.sees is not None]
        if masks:
            sees[:] = np.concatenate(masks)


@cache
def _factory(library: Path) -> NodeFactory:
    factory = NodeFactory()
    factory.add_extension(str(library))
    return factory
