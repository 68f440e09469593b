"""Tokens drawn one after another where the model stands, each fed back as it is drawn; the host looks once.

A drafter's forward is so short that asking the device for every token and its probability costs as much again.
Here a step ends by drawing its own successor into the memory that the next one reads (:mod:`.fixed`), so any
number of steps follow each other without the host, and one recording of a step serves drafts of every length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rasd_integrations.engine.attention import Segment
from rasd_integrations.engine.executors.cuda_fixed import FixedInputs
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.verification.exact import checked, first_best
from rasd_integrations.engine.verification.sampling import inverted, sampling_law

ROOM = 16  # tokens drawn in a row; longer drafts are several such runs


Choice = tuple[Tensor, Tensor, Tensor]
"""Tokens, their probabilities, and the logits ``[n, vocab]`` that they were drawn from."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """How a token is drawn from a row of logits, without a question to the host.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus in (0, 1]; 1 is off.
        top_k: Tokens kept; 0 is off.
        fit: Turns the model's logits ``[n, vocab]`` into those that are drawn from.
    """

    temperature: float
    top_p: float
    top_k: int
    fit: Callable[[Tensor], Tensor]

    def __call__(self, logits: Tensor, uniform: Tensor) -> Choice:
        """Return tokens ``[n]`` (-1 where none may follow), their probabilities ``[n]`` and the fitted logits."""
        logits = self.fit(logits)
        law = sampling_law(self.temperature, self.top_p, self.top_k)
        if law is None:
            tokens, probs = first_best(logits), logits.float().softmax(-1)
        else:
            probs = law(logits)
            tokens = inverted(probs, uniform)
        chances = probs.gather(-1, tokens.clamp(min=0)[:, None]).squeeze(-1)
        return tokens, chances, logits


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn, still where the model stands.

    Attributes:
        chosen: ``[2, n]`` float64: the tokens, and the probability of each.
        logits: ``[n, vocab]`` float32, the row that each token was drawn from.
    """

    chosen: Tensor
    logits: Tensor

    def read(self) -> tuple[list[int], list[float]]:
        """Wait for the device, once, and return the tokens and their probabilities.

        Raises:
            DecodingError: No token may follow one of them.
        """
        tokens, chances = self.chosen.tolist()
        return [checked(int(token)) for token in tokens], chances


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
        self.inputs.stand_at(length - 1, position)
        self._put(first)

    def take(self, sampler: Sampler, logits: Tensor) -> None:
        """Draw from the logits ``[1, vocab]`` of the step that was run, and make its token the next input."""
        self._put(sampler(logits, self._uniform.index_select(0, self._place)))

    def _put(self, choice: Choice) -> None:
        tokens, chances, logits = choice
        self._chosen.index_copy_(1, self._place, torch.stack([tokens.double(), chances.double()]))
        self._logits.index_copy_(0, self._place, logits.float())
        self._place += 1
        self.inputs.follow(tokens.clamp(min=0))

    def drawn(self, n: int) -> Drawn:
        """Return a copy of the first ``n`` tokens; the next draft overwrites this memory."""
        return Drawn(self._chosen[:, :n].clone(), self._logits[:n].clone())


@runtime_checkable
class DrawingExecutor(Protocol):
    """An executor that draws several tokens without the host."""

    def can_record(self, buffer: KVBuffer, rows: int) -> bool:
        """Whether it can do so where ``rows`` tokens are to be read behind this prefix."""
        ...

    def draw(self, ids: Tensor, segment: Segment, sampler: Sampler, uniform: Tensor) -> Drawn:
        """Run ``ids``, then draw a token for each number of ``uniform`` and run all of them but the last."""
        ...
