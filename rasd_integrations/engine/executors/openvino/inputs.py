"""Input arrays of a compiled step, allocated once per shape and refilled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import openvino as ov
import torch
from torch import Tensor

from rasd_integrations.engine.executors.openvino.attention import Attention, Place, Span
from rasd_integrations.engine.executors.openvino.copies import flags


class Frame:
    """The inputs of steps of one shape, at fixed addresses, so that they are bound to a request once.

    Attributes:
        tensors: The graph's first inputs, in their order.
    """

    def __init__(
        self, attention: Attention, places: Sequence[Place], rows: int, first_row: int
    ) -> None:
        """Allocate inputs for answers at ``places`` in a memory of ``rows``; logits are made from ``first_row`` on."""
        width = sum(place.rows for place in places)
        self._attention = attention
        self._trace = attention.trace
        self._ids, self._positions = np.zeros((2, 1, width), np.int64)
        self._angles = [np.array(table, order="C") for table in self._tables()]
        self._where = attention.arrays(places, rows)
        chosen = [np.array([flag]) for flag in flags(width, attention.widths)]
        arrays = [self._ids, self._positions, np.arange(first_row, width), *self._angles]
        arrays += [*self._where, *chosen]
        self.tensors = [ov.Tensor(array, shared_memory=True) for array in arrays]

    def fill(self, ids: Tensor, positions: Tensor, spans: Sequence[Span]) -> None:
        """Write a step of ``ids`` ``[n]`` at ``positions`` ``[n]``; padding rows repeat the last one."""
        n = len(ids)
        for row, given in ((self._ids, ids), (self._positions, positions)):
            row[0, :n] = given.numpy()
            row[0, n:] = row[0, n - 1]
        for array, table in zip(self._angles, self._tables(), strict=True):
            array[...] = table
        self._attention.refresh(spans, self._where)

    def _tables(self) -> list[npt.NDArray[np.float32]]:
        """Return the angles at the positions."""
        positions = torch.from_numpy(self._positions)
        return [table.numpy() for call in self._trace.angles for table in call.at(positions)]
