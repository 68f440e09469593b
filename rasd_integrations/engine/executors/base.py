"""What the engine knows of an executor: it runs steps, and may draw several tokens on its device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rasd_integrations.engine.attention import Segment, StepContext
from rasd_integrations.engine.kv.buffer import KVBuffer, KVLayout
from rasd_integrations.engine.verification.exact import checked, first_best
from rasd_integrations.engine.verification.sampling import (
    sample_by_inverse_cdf,
    sampling_distribution,
)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step returns; its keys and values are in the buffer, behind the committed ones.

    Attributes:
        logits: ``[num_logits, vocab]``, of the last positions.
        hidden: ``[n, hidden]``, the input of the output layer.
    """

    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class Sampler:
    """How a token is drawn from logits, on their device.

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

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens ``[n]`` (-1 if none may follow), their probabilities ``[n]`` and the fitted logits."""
        logits = self.fit(logits)
        distribution = sampling_distribution(self.temperature, self.top_p, self.top_k)
        if distribution is None:
            tokens, probs = first_best(logits), logits.float().softmax(-1)
        else:
            probs = distribution(logits)
            tokens = sample_by_inverse_cdf(probs, uniform)
        return tokens, probs.gather(-1, tokens.clamp(min=0)[:, None]).squeeze(-1), logits


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens drawn one after another, still on the device.

    Attributes:
        chosen: ``[2, n]`` float64: the tokens and their probabilities.
        logits: ``[n, vocab]`` float32, that each token was drawn from.
    """

    chosen: Tensor
    logits: Tensor

    def read(self) -> tuple[list[int], list[float]]:
        """Copy tokens and probabilities to the host.

        Raises:
            DecodingError: No token may follow one of them.
        """
        tokens, probs = self.chosen.tolist()
        return [checked(int(token)) for token in tokens], probs


class Executor(ABC):
    """Runs steps of one model.

    Attributes:
        layout: How it keeps keys and values, and step widths.
        shares_weights: It reads the model's own parameters, so a change of them shows in its steps.
    """

    layout = KVLayout()
    shares_weights = False

    @property
    def name(self) -> str:
        """Class, and version of what decides its rounding."""
        return type(self).__name__

    @abstractmethod
    def step(self, ids: Tensor, context: StepContext, *, num_logits: int) -> StepOutput:
        """Run ``ids`` ``[n]`` behind the prefixes in ``context``, which are read and not changed.

        Args:
            ids: Tokens of all answers in the step.
            context: Their positions, masks and prefixes.
            num_logits: Of the last positions: all ``n`` in decoding, 0 or 1 in a prefill.
        """

    def max_drawn(self, buffer: KVBuffer, n: int) -> int:
        """Return how many tokens :meth:`draw` may draw after reading ``n`` behind ``buffer``; 0: it cannot."""
        return 0

    def draw(self, ids: Tensor, segment: Segment, sampler: Sampler, uniform: Tensor) -> Drawn:
        """Run ``ids``, then draw a token for each number of ``uniform`` and run all of them but the last.

        Called only if :meth:`max_drawn` allows it.
        """
        raise NotImplementedError
