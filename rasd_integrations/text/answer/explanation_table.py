"""An explained answer as a table for terminals: ASCII, without control characters of documents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rasd_integrations.stats import Quote
from rasd_integrations.types import StepRecord

if TYPE_CHECKING:
    from rasd_integrations.text.answer.explanation import Explanation

_COLUMNS = 100
_ROW = "{:>7}  {:>6}  {:<51}  {}"
_DRAFTER = "{:<24}  {:>7}  {:>8}  {:>5}  {:>13}"


def table(answer: Explanation) -> str:
    """Return the steps, the drafters and the quotes of an answer, a line each."""
    lines = [*_step_lines(answer), ""]
    lines += [_DRAFTER.format(_fit(name, 24), *figures) for name, *figures in drafter_rows(answer)]
    lines += ["", *summary_lines(answer)]
    lines += [f"{steps:>7} without a draft: {why}" for why, steps in answer.off_reasons.items()]
    lines += [f"quote {i}: {_told(quote)}" for i, quote in enumerate(answer.quotes, 1)]
    lines += [f"fault: {fault}" for fault in answer.stats.faults]
    return "\n".join(_fit(line, _COLUMNS) for line in lines)


def drafter_rows(answer: Explanation) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield drafter, tokens drafted and accepted, their rate and the share of the answer, after a header."""
    total = max(len(answer.tokens), 1)
    yield "tokens of", "drafted", "accepted", "rate", "of the answer"
    for name, of in answer.drafters.items():
        rate = f"{of.accepted / max(of.drafted, 1):.0%}"
        yield name, str(of.drafted), str(of.accepted), rate, f"{of.accepted / total:.0%}"
    own = len(answer.tokens) - answer.stats.accepted
    yield "the target itself", "", "", "", f"{own / total:.0%}"


def summary_lines(answer: Explanation) -> Iterator[str]:
    """Yield how long the answer is and what took the time."""
    stats, steps = answer.stats, len(answer.steps)
    each = len(answer.tokens) / max(steps, 1)
    yield f"{len(answer.tokens)} tokens in {steps} steps, {each:.2f} a step"
    yield f"seconds: prefill {stats.prefill_s:.3f}, drafting {stats.draft_s:.3f}, steps {stats.verify_s:.3f}"


def drafted(step: StepRecord) -> str:
    """Return what a step verified, by drafter, and why nothing."""
    counts = (f"{name} {step.sources.count(name)}/{n}" for name, n in step.drafted.items())
    return "; ".join(filter(None, (" ".join(counts), step.off_reason)))


def _step_lines(answer: Explanation) -> Iterator[str]:
    """Yield a line for each step, and one for steps in a row that drafted nothing for the same reason."""
    texts = {
        number: "".join(token.reasoning + token.text + token.call for token in tokens)
        for number, tokens in groupby(answer.tokens, lambda token: token.step)
    }
    yield _ROW.format("step", "tokens", "accepted/drafted", "text")
    alone = (
        (drafted(step), number if step.drafted else -1) for number, step in enumerate(answer.steps)
    )
    at = 0
    for (told, _), same in groupby(alone):
        first, at = at, at + len(list(same))
        numbers = f"{at}" if at - first == 1 else f"{first + 1}-{at}"
        tokens = sum(len(step.token_ids) for step in answer.steps[first:at])
        text = "".join(texts.get(number, "") for number in range(first, at))
        yield _ROW.format(numbers, tokens, _fit(told, 51), ascii(text))


def _told(quote: Quote) -> str:
    where = ", ".join(f"{key}={value!r}" for key, value in quote.as_dict()["metadata"].items())
    return f"chunk {quote.chunk_id!r} at {quote.chunk_start}, {where}: {quote.text!r}"


def _fit(line: str, columns: int) -> str:
    """Return ``line`` in printable ASCII, cut to ``columns``."""
    plain = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in line)
    return plain if len(plain) <= columns else f"{plain[: columns - 3]}..."
