"""Tokens drawn one after another where the model stands, each fed back as it is drawn; the host looks once.

A drafter's forward is so short that asking the device for every token and its probability costs as much again.
Here a step ends by drawing its own successor into the memory that the next one reads (:mod:`.fixed`), so any
number of steps follow each other without the host, and one recording of a step serves drafts of every length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rasd_integrations.engine.executors.base import Drawn, Sampler
from rasd_integrations.engine.executors.cuda_graphs.fixed import FixedInputs

ROOM = 16  # tokens drawn in a row; longer drafts are several such runs

Choice = tuple[Tensor, Tensor, Tensor]
"""Tokens, their probabilities, and the logits ``[n, vocab]`` that they were drawn from."""


class Loop:
    """The memory of tokens drawn in a row: what the next step reads, and what the steps so far have left.

    Attributes:
        inputs: Of the next step, which reads one token.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """Take memory for :data:`ROOM` tokens."""
        self.inputs = FixedInputs(1, device)
        self._uniform = torch.zeros(ROOM, dtype=torch.float64, device=device)
        self._chosen = torch.zeros(2, ROOM, dtype=torch.float64, device=device)
        self._logits = torch.zeros(ROOM, vocab_size, device=device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)

    def begin(self, first: Choice, uniform: Tensor, length: int, position: int) -> None:
        """Go on behind the ``first`` token, which was drawn behind the last one that was read.

        Args:
            first: One token.
            uniform: ``[n]`` in [0, 1), for as many tokens as will be drawn.
            length: Rows of keys and values, that of the last token included.
            position: Of the last token.
        """
        self._place.zero_()
        self._uniform[: len(uniform)] = uniform
        self.inputs.set_position(length - 1, position)
        self._put(first)

    def take(self, sampler: Sampler, logits: Tensor) -> None:
        """Draw from the logits ``[1, vocab]`` of the step that was run, and make its token the next input."""
        self._put(sampler(logits, self._uniform.index_select(0, self._place)))

    def _put(self, choice: Choice) -> None:
        tokens, chances, logits = choice
        self._chosen.index_copy_(1, self._place, torch.stack([tokens.double(), chances.double()]))
        self._logits.index_copy_(0, self._place, logits.float())
        self._place += 1
        self.inputs.advance(tokens.clamp(min=0))

    def drawn(self, n: int) -> Drawn:
        """Return a copy of the first ``n`` tokens; the next draft overwrites this memory."""
        return Drawn(self._chosen[:, :n].clone(), self._logits[:n].clone())
