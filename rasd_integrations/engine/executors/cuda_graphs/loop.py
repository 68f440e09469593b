"""Tokens drawn one after another on the device; the host reads them once.

Copying every token to the host would double the time of a drafter's short forward. Here a step ends by drawing its
successor into the inputs of the next one (:mod:`.fixed`), and one recorded step serves drafts of every length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rasd_integrations.engine.executors.base import Drawn, Sampler
from rasd_integrations.engine.executors.cuda_graphs.fixed import FixedInputs

ROOM = 16  # tokens drawn in a row; longer drafts are several such runs


class Loop:
    """State of a draft on the device.

    Attributes:
        inputs: Of the next step, one token.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """Allocate memory for :data:`ROOM` tokens."""
        self.inputs = FixedInputs(1, device)
        self._uniform = torch.zeros(ROOM, dtype=torch.float64, device=device)
        self._chosen = torch.zeros(2, ROOM, dtype=torch.float64, device=device)
        self._logits = torch.zeros(ROOM, vocab_size, device=device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)

    def begin(
        self, first: tuple[Tensor, Tensor, Tensor], uniform: Tensor, length: int, position: int
    ) -> None:
        """Start a draft at ``first``, the token sampled after the last one read.

        Args:
            first: What :class:`~rasd_integrations.engine.executors.base.Sampler` returned for it.
            uniform: ``[n]`` in [0, 1), a number for each token of the draft.
            length: Tokens read.
            position: Of the last token read.
        """
        self._place.zero_()
        self._uniform[: len(uniform)] = uniform
        self.inputs.set_position(length - 1, position)
        self._put(first)

    def take(self, sampler: Sampler, logits: Tensor) -> None:
        """Draw from a step's logits ``[1, vocab]``, and make the token the next input."""
        self._put(sampler(logits, self._uniform.index_select(0, self._place)))

    def _put(self, choice: tuple[Tensor, Tensor, Tensor]) -> None:
        tokens, chances, logits = choice
        self._chosen.index_copy_(1, self._place, torch.stack([tokens.double(), chances.double()]))
        self._logits.index_copy_(0, self._place, logits.float())
        self._place += 1
        self.inputs.advance(tokens.clamp(min=0))

    def drawn(self, n: int) -> Drawn:
        """Return a copy of the first ``n`` tokens."""
        return Drawn(self._chosen[:, :n].clone(), self._logits[:n].clone())
