"""What drawing tokens in a row means for an executor, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from rasd_integrations.engine.attention import Segment
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.verification.exact import checked, first_best
from rasd_integrations.engine.verification.sampling import (
    sample_by_inverse_cdf,
    sampling_distribution,
)

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
        distribution = sampling_distribution(self.temperature, self.top_p, self.top_k)
        if distribution is None:
            tokens, probs = first_best(logits), logits.float().softmax(-1)
        else:
            probs = distribution(logits)
            tokens = sample_by_inverse_cdf(probs, uniform)
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


@runtime_checkable
class DrawingExecutor(Protocol):
    """An executor that draws several tokens without the host."""

    def can_record(self, buffer: KVBuffer, rows: int) -> bool:
        """Whether it can do so where ``rows`` tokens are to be read behind this prefix."""
        ...

    def draw(self, ids: Tensor, segment: Segment, sampler: Sampler, uniform: Tensor) -> Drawn:
        """Run ``ids``, then draw a token for each number of ``uniform`` and run all of them but the last."""
        ...
