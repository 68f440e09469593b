"""What a compiled graph knows of its attention: an operation that reads and writes ``KVBuffer``'s memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino.op import Constant, Parameter
from torch import Tensor

from rasd_integrations.engine.executors.openvino.tracing import TraceLayout
from rasd_integrations.engine.kv.order import Order

SCALE_BYTES = 8  # of a row in 8 bits: scale and zero point

Arrays = list[npt.NDArray[Any]]


class Place(NamedTuple):
    """The part of a :class:`Span` that does not change from step to step.

    Attributes:
        rows: Of the step, ``n``.
        first: Row in the memory of a head.
        capacity: Rows of the answer's memory.
        is_tree: Rows see what a mask says.
    """

    rows: int
    first: int
    capacity: int
    is_tree: bool


class Span(NamedTuple):
    """The rows of one answer in a step.

    Attributes:
        prefix: Tokens before the step.
        rows: Of the step, ``n``.
        first: Row in the memory of a head.
        capacity: Rows of the answer's memory.
        depths: ``[n]``, positions behind the prefix's end.
        sees: ``[n, n]``, True if a row sees a column; ``None`` for a chain.
    """

    prefix: int
    rows: int
    first: int
    capacity: int
    depths: npt.NDArray[np.int32]
    sees: npt.NDArray[np.bool_] | None = None

    @property
    def place(self) -> Place:
        """The part that is the same in steps of this width."""
        return Place(self.rows, self.first, self.capacity, self.sees is not None)


class Attention(ABC):
    """An operation of the graph, and the inputs that tell it where each answer's rows are.

    Attributes:
        name: For people.
        order: Of the rows that it reads and writes.
        windows_in_trees: Windows count positions; otherwise they count rows.
        widths: Of steps that have a copy of the graph (:mod:`.copies`).
        trace: Of the model.
        kind: Of keys and values.
        more: Bytes before each row.
    """

    name: str
    order: Order
    windows_in_trees = False
    widths: tuple[int, ...] = ()

    def __init__(self, trace: TraceLayout, kind: ov.Type, *, in_8_bits: bool) -> None:
        """Describe the layers.

        Args:
            trace: Of the model.
            kind: Of keys and values, unless they are bytes.
            in_8_bits: Keys and values are bytes, each row after its :data:`SCALE_BYTES`.
        """
        self.trace = trace
        self.kind, self.more = (ov.Type.u8, SCALE_BYTES) if in_8_bits else (kind, 0)

    @abstractmethod
    def of(self, trace: TraceLayout) -> Attention:
        """Return the same operation for other layers."""

    @abstractmethod
    def lacking(self) -> str | None:
        """Return what it cannot do of the model, if anything, as a sentence's end."""

    @abstractmethod
    def parameters(self) -> list[Parameter]:
        """Return new inputs of a graph: those of :meth:`arrays`, then those of :meth:`bind`."""

    @abstractmethod
    def output(
        self, index: int, reads: Sequence[ov.Output], parameters: Sequence[Parameter]
    ) -> ov.Output:
        """Return the output of layer ``index``; ``reads``: its queries, new keys and new values (:mod:`.tracing`)."""

    @abstractmethod
    def bind(self, request: Any, stores: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Have a request of the graph read and write keys and values ``[kv_heads, rows, dim]`` of the layers."""

    @abstractmethod
    def arrays(self, places: Sequence[Place], rows: int) -> Arrays:
        """Return the inputs of steps at ``places`` of a memory of ``rows``; :meth:`refresh` fills the rest in."""

    @abstractmethod
    def refresh(self, spans: Sequence[Span], made: Arrays) -> None:
        """Update such inputs with new prefix lengths and tree masks."""


def number(value: float, kind: ov.Type) -> ov.Output:
    """Return a scalar constant."""
    return Constant(kind, ov.Shape([]), [value]).output(0)


def nothing(kind: ov.Type, rank: int = 1) -> ov.Output:
    """Return an empty constant."""
    return Constant(kind, ov.Shape([0] * rank), []).output(0)
