"""Read the chunks first, the whole documents only where they are needed (LaRA, arXiv 2502.09977)."""

from __future__ import annotations

import math
import re
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace

from rasd_integrations.config import check_value
from rasd_integrations.runtime.modes.base import Mode, Pipelines
from rasd_integrations.runtime.pipeline import Gate, Request, joined
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import TextDelta

# LaRA: the whole text is better for comparison and for what is spread over it.
_WHOLE = re.compile(
    r"\b(summar\w+|overview|outline|overall|main (?:idea|point|theme|topic|contribution|finding)s?|in total"
    r"|how many (?:times|of the)|list (?:all|every)|compar\w+|differ(?:s|ences?)? (?:from|between)|throughout)\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"(?:\b(?:not|no|cannot|unable|unclear|unknown|insufficient)|n't)\b.{0,40}\b(?:mention|state|provid|specif|given|contain"
    r"|found|information|context|answer|determin|know)",
    re.IGNORECASE,
)
_REFUSAL_WITHIN = 160  # characters; later a "not" is part of an answer


@dataclass(frozen=True, slots=True)
class Route(Mode):
    """Answer from the prompt as sent; if that is in doubt, from the whole documents behind its chunks.

    ``stats.route`` is "prompt" or "documents", ``stats.route_reason`` says why. The first answer is shown only once it
    is judged.

    Attributes:
        least_probability: Of the first answer's tokens, the geometric mean that is trusted, in [0, 1].
    """

    least_probability: float = 0.5

    def __post_init__(self) -> None:
        """Check the range."""
        value = self.least_probability
        check_value(0 <= value <= 1, "least_probability", value, "in [0, 1]")

    def answer(
        self, pipelines: Pipelines, request: Request, stats: DecodingStats, gate: Gate | None
    ) -> Generator[TextDelta, None, None]:
        """Choose by the question, or by an answer from the chunks."""
        short, whole = pipelines("prompt"), pipelines("documents")
        plan = whole.plan(request)
        if request.bound or not plan.documents:
            why = "a grammar or tools" if request.bound else "no documents were found to read"
            stats.route, stats.route_reason = "prompt", why
            return short.answer(request, stats, gate)
        if asked := _asks_for_the_whole(plan.question):
            stats.route, stats.route_reason = "documents", asked
            return whole.answer(request, stats, gate, plan)
        tried = DecodingStats()
        scored = replace(request, params=replace(request.params, scored=True))
        first = short.answer(scored, tried, gate)
        # Checked now, so that its errors are the call's.
        second = whole.answer(request, stats, gate, plan)
        return self._judged(first, second, tried, stats)

    def _judged(
        self,
        first: Generator[TextDelta, None, None],
        second: Generator[TextDelta, None, None],
        tried: DecodingStats,
        stats: DecodingStats,
    ) -> Generator[TextDelta, None, None]:
        with closing(second):
            with closing(first):
                deltas = list(first)
            doubt = self.doubt(None, joined(deltas).text, tried)
            if doubt is None:
                stats.add(tried)
                stats.route, stats.route_reason = "prompt", "the answer from the chunks is likely"
                yield from deltas[:-1]
                yield replace(deltas[-1], stats=stats)
                return
            stats.route, stats.route_reason = "documents", doubt
            for delta in second:
                if delta.stats is not None:
                    stats.add_work(tried)
                yield delta

    def doubt(self, question: str | None, text: str, tried: DecodingStats) -> str | None:
        """Return why the documents should be read after the answer ``text`` from the chunks, if they should.

        ``tried`` has the answer's ``logprob`` and tokens.
        """
        if asked := _asks_for_the_whole(question):
            return asked
        if not text.strip():
            return "the answer from the chunks is empty"
        if _REFUSAL.search(text[:_REFUSAL_WITHIN]):
            return "the answer from the chunks says that they do not tell"
        probability = math.exp((tried.logprob or 0.0) / max(tried.generated_tokens, 1))
        if probability >= self.least_probability:
            return None
        return (
            f"the tokens of the answer from the chunks have a probability of {probability:.2f} on average, under "
            f"least_probability={self.least_probability:g}"
        )


def _asks_for_the_whole(question: str | None) -> str | None:
    """Return which words of the question do, if any."""
    asked = _WHOLE.search(question or "")
    return None if asked is None else f"the question says {asked[0]!r}"
