"""An explained answer: who drafted each token, what was accepted, and why nothing was drafted where nothing was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rasd_integrations.stats import DecodingStats, DrafterStats, Quote
from rasd_integrations.text.answer.explanation_page import page
from rasd_integrations.text.answer.explanation_table import table
from rasd_integrations.types import StepRecord, TextDelta

TARGET = "target"


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """One token of an answer.

    Attributes:
        token_id: Its id.
        source: Who drafted it: the name of a drafter, ``"grammar"`` if it was forced, else ``"target"``.
        step: Index of its step.
        text: What it adds to the answer's text; empty for an end token or an incomplete character.
        reasoning: What it adds to the model's reasoning.
        call: What it adds to tool calls: a name, or JSON.
    """

    token_id: int
    source: str
    step: int
    text: str = ""
    reasoning: str = ""
    call: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """An answer and how it was drafted; printed it is a table, in a notebook its coloured text.

    Attributes:
        text: The answer, as the call itself returns it.
        tokens: All committed tokens; their texts joined are ``text``.
        steps: What each step of the target verified.
        stats: The answer's statistics.
    """

    text: str
    tokens: tuple[ExplainedToken, ...]
    steps: tuple[StepRecord, ...]
    stats: DecodingStats

    @property
    def drafters(self) -> dict[str, DrafterStats]:
        """Tokens drafted and accepted, by drafter."""
        return self.stats.drafters

    @property
    def off_reasons(self) -> dict[str, int]:
        """Steps that verified no token of a drafter, by the reason."""
        return dict(Counter(step.off_reason for step in self.steps if step.off_reason))

    @property
    def quotes(self) -> tuple[Quote, ...]:
        """Spans of the text that are word for word in a chunk."""
        return self.stats.quotes

    def __str__(self) -> str:
        """Return a table in ASCII, at most 100 columns wide."""
        return table(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        return page(self)


def explained(text: str, deltas: Iterable[TextDelta], steps: Sequence[StepRecord]) -> Explanation:
    """Return the explanation of an answer.

    Args:
        text: The answer.
        deltas: Its pieces, of at most one token each; where a stop string cut the last step, fewer than its tokens.
        steps: The records of its steps.
    """
    pieces = [delta for delta in deltas if delta.token_ids]
    sources = [
        (number, token, step.sources[place] if place < len(step.sources) else TARGET)
        for number, step in enumerate(steps)
        for place, token in enumerate(step.token_ids)
    ]
    pieces += [TextDelta("")] * (len(sources) - len(pieces))
    tokens = tuple(
        ExplainedToken(
            token, source, number, piece.text, piece.reasoning,
            "".join((call.name or "") + call.arguments for call in piece.tool_calls),
        )
        for (number, token, source), piece in zip(sources, pieces, strict=True)
    )  # fmt: skip
    stats = next((piece.stats for piece in pieces if piece.stats is not None), DecodingStats())
    return Explanation(text, tokens, tuple(steps), stats)
