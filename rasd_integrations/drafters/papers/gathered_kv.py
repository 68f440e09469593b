"""Some rows of a KV buffer, each at its own position, for drafting over a part of the context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from rasd_integrations.engine.kv.buffer import KVBuffer


class GatheredKV(KVBuffer):
    """A copy of some committed rows of ``live`` that continues at its next position.

    Keys keep the rotation of their positions. Hidden states are not copied.
    """

    is_gathered = True

    @torch.inference_mode()
    def __init__(self, live: KVBuffer, rows: Sequence[int], capacity: int) -> None:
        """Copy ``rows``, ascending, into memory for ``capacity`` rows."""
        super().__init__(max(capacity, len(rows)))
        self.long_rope = live.long_rope
        self._positions = list(rows)  # of the gathered rows; later rows are consecutive
        self._shift = live.length - len(rows)  # position of the next row less ``length``
        for layer in range(live.num_layers):
            key, value = live.rows(layer, 0, live.length)
            index = torch.tensor(rows, dtype=torch.long, device=key.device)
            self.append(layer, key.index_select(1, index), value.index_select(1, index))
        self.length = len(rows)

    @property
    def next_position(self) -> int:
        """Position of the next token."""
        return self.length + self._shift

    def positions(self, start: int, end: int, device: torch.device) -> Tensor:
        """Return the positions ``[end - start]`` of rows ``start:end``."""
        later = range(max(start, len(self._positions)) + self._shift, end + self._shift)
        return torch.tensor([*self._positions[start:end], *later], device=device)

    def first_from(self, position: int) -> int:
        """Return the first row at ``position`` or later."""
        if self._positions and position <= self._positions[-1]:
            return bisect_left(self._positions, position)
        return max(position - self._shift, len(self._positions))

    def truncate(self, length: int) -> None:
        """Drop the rows from ``length`` on, none of them gathered."""
        super().truncate(max(length, len(self._positions)))

    @torch.inference_mode()
    def extend(self, live: KVBuffer, start: int, end: int) -> None:
        """Append committed rows ``start:end`` of ``live``, the first of them at :attr:`next_position`."""
        self.reserve(end - start)
        for layer in range(live.num_layers):
            self.append(layer, *live.rows(layer, start, end))
        self.length += end - start
