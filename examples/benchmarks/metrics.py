"""What a run says: medians over questions, tokens over seconds, the floor, and where two engines' answers part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from answers import Answer
from floor import StepBytes
from machine import machine

from rasd_integrations.demo.measure import median

__all__ = [
    "Answer",
    "agreement",
    "breakdown",
    "copied",
    "first_difference",
    "floor_figures",
    "machine",
    "summary",
]

COLD_SHARE, CACHED_SHARE = 0.1, 0.7  # vLLM counts whole blocks of 128 tokens
COPY_TOKENS = 4
"""So many tokens in a row that stand in the prompt as well are taken as copied from it."""


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return one engine's figures over its answers."""
    seconds = sum(a.decode_s for a in answers)
    tokens = sum(a.later_tokens for a in answers)
    cold = [a.first_s for a in answers if a.cached_tokens <= COLD_SHARE * a.prompt_tokens]
    cached = [a.first_s for a in answers if a.cached_tokens >= CACHED_SHARE * a.prompt_tokens]
    gaps = [gap for a in answers for gap in a.gaps_ms]
    known = all(a.steps is not None for a in answers)
    steps = sum(a.steps or 0 for a in answers)
    later = steps - len(answers)  # the first token's step is the prefill's
    return {
        "questions": len(answers),
        "prompt_tokens": median(a.prompt_tokens for a in answers),
        "answer_tokens": sum(len(a.ids) for a in answers),
        "first_token_cold_s": median(cold),
        "first_token_cached_s": median(cached),
        "decode_ms_per_token": median(a.decode_ms for a in answers if a.later_tokens),
        "decode_ms_per_token_mean": 1000 * seconds / tokens if tokens else None,
        "decode_tokens_per_s": tokens / seconds if seconds else None,
        "answer_s": sum(a.total_s for a in answers) / len(answers),
        "tokens_per_step": sum(len(a.ids) for a in answers) / steps if known and steps else None,
        "step_ms": 1000 * seconds / later if known and later > 0 else None,
        "gap_p50_ms": _percentile(gaps, 0.5),
        "gap_p95_ms": _percentile(gaps, 0.95),
    }


def floor_figures(
    cell: dict[str, Any],
    answers: Sequence[Answer],
    size: StepBytes,
    bytes_per_s: float,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Return the floor of a plain step in the run's dtype, the multiple of it, and the engine's efficiency.

    Efficiency counts what the engine's own formats make a step read. It is ``None`` for an engine that does
    not say its steps, or whose drafts cost forwards of their own.
    """
    context = sum(a.prompt_tokens + len(a.ids) / 2 for a in answers) / len(answers)
    floor_ms = 1000 * size.at(context) / bytes_per_s
    mean, step = cell["decode_ms_per_token_mean"], cell["step_ms"]
    own = size.at(context, weights=about.get("weight_bytes"), kv_bits=about.get("kv_bits"))
    known = step and "drafts_with" not in about
    return {
        "floor_ms": floor_ms,
        "multiple_of_floor": floor_ms / mean if mean else None,
        "engine_efficiency": 1000 * own / bytes_per_s / step if known else None,
    }


def breakdown(answers: Sequence[Answer]) -> dict[str, float] | None:
    """Return the milliseconds of a step of ours by what they went into; ``None`` where an engine says nothing."""
    stats = [a.stats for a in answers if "verify_s" in a.stats]
    steps = sum(s["target_steps"] for s in stats)
    if not steps:
        return None
    draft, verify = (1000 * sum(s[key] for s in stats) / steps for key in ("draft_s", "verify_s"))
    aside = ("draft_s", "verify_s", "prefill_s", "retrieve_s")
    rest = sum(s["total_s"] - sum(s[key] for key in aside) for s in stats)
    return {"draft": draft, "verify": verify, "rest": 1000 * rest / steps}


def copied(answer: Sequence[int], prompt: Sequence[int]) -> float:
    """Return the share of the answer's runs of four tokens that stand in the prompt as well."""
    runs = {tuple(prompt[i : i + COPY_TOKENS]) for i in range(len(prompt) - COPY_TOKENS + 1)}
    own = [tuple(answer[i : i + COPY_TOKENS]) for i in range(len(answer) - COPY_TOKENS + 1)]
    return sum(run in runs for run in own) / max(len(own), 1)


def _percentile(values: Sequence[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the first place where two answers differ; ``None`` where they do not."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> dict[str, Any]:
    """Return how many answers are the same tokens, and where the others part."""
    places = [first_difference(a.ids, b.ids) for a, b in zip(ours, theirs, strict=True)]
    return {
        "identical": sum(p is None for p in places),
        "of": len(places),
        "first_differences": [p for p in places if p is not None],
    }
