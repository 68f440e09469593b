"""Steps of a cheap reader, judged by a scorer; the target writes again what is not good enough (arXiv 2501.19324)."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import Self

from rasd_integrations.config import check_value
from rasd_integrations.errors import DecodingError
from rasd_integrations.prompting import Prompt
from rasd_integrations.runtime.modes.base import Mode, Pipelines
from rasd_integrations.runtime.pipeline import Gate, Request
from rasd_integrations.stats import DecodingStats, Reward
from rasd_integrations.types import TextDelta

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Step(str):
    """A step's text, for scorers that read no more than that.

    Attributes:
        before: The answer up to it.
        prompt: What is answered.
    """

    __slots__ = ("before", "prompt")
    before: str
    prompt: Prompt

    def __new__(cls, text: str, before: str, prompt: Prompt) -> Self:
        """Return the step ``text``."""
        self = super().__new__(cls, text)
        self.before, self.prompt = before, prompt
        return self


@dataclass(frozen=True, slots=True)
class RewardGuided(Mode):
    """Let the teacher write each step, and the target where a scorer gives it less than ``least``.

    The teacher is a drafter model, or the target itself, on the retrieved chunks; it reads less and may be smaller.
    ``stats.rewards`` has every step's reward and who wrote it.

    Attributes:
        scorer: Maps a :class:`Step` to a number: a function, or a LangChain runnable whose output is a number, or a
            text or message with one in it (the first counts).
        least: Of a step that is kept.
        ends: What ends a step.
        most_steps: After so many the target writes the rest.
    """

    scorer: Any
    least: float = 0.7
    ends: str = "\n\n"
    most_steps: int = 100

    def __post_init__(self) -> None:
        """Check the values."""
        usable = callable(self.scorer) or callable(getattr(self.scorer, "invoke", None))
        check_value(usable, "scorer", self.scorer, "a function of a step's text, or a runnable")
        check_value(bool(self.ends), "ends", self.ends, "a non-empty text")
        check_value(self.most_steps >= 1, "most_steps", self.most_steps, "at least 1")

    def answer(
        self, pipelines: Pipelines, request: Request, stats: DecodingStats, gate: Gate | None
    ) -> Generator[TextDelta, None, None]:
        """Answer by a pipeline whose decoder writes in steps."""
        from rasd_integrations.decoding.stepwise import StepwiseDecoder

        pipeline = pipelines("prompt")
        rewards: list[Reward] = []

        def keeps(before: str, text: str) -> bool:
            reward = self._reward(Step(text, before, request.prompt))
            rewards.append(Reward(reward, reward >= self.least))
            stats.rewards = tuple(rewards)
            return reward >= self.least

        tokenizer = pipeline.template.tokenizer

        def decode(ids: Any) -> str:
            return str(tokenizer.decode([*ids], skip_special_tokens=True))

        decoder = StepwiseDecoder(pipeline.decoder, decode, self.ends, self.most_steps, keeps)
        return replace(pipeline, decoder=decoder, teaches=True).answer(request, stats, gate)

    def _reward(self, step: Step) -> float:
        """Return the scorer's number.

        Raises:
            DecodingError: It failed, or returned none.
        """
        try:
            invoke = getattr(self.scorer, "invoke", None)
            said = self.scorer(step) if invoke is None else invoke(step)
        except Exception as err:  # the user's own code
            msg = f"The scorer {self.scorer!r} failed: {type(err).__name__}: {err}"
            raise DecodingError(msg) from err
        said = getattr(said, "content", said)
        found = _NUMBER.search(said) if isinstance(said, str) else None
        try:
            return float(said if found is None else found[0])
        except (TypeError, ValueError) as err:
            msg = f"The scorer {self.scorer!r} returned {said!r} for a step, but must return a number."
            raise DecodingError(msg) from err
