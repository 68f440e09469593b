"""Figures of ``pipelines.py``: by kind of work and engine, and against plain decoding of the same run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from answers import Answer
from metrics import agreement

RESAMPLES = 2000
BASELINE = "plain"
PEERS = ("openvino_genai", "openvino_genai_lookup")


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer of one engine.

    Attributes:
        kind: Letter of the kind of work.
        engine: Its name.
        number: Of the question within the kind.
        round: Of the repetition.
        answer: What was said, and when.
        peak_mib: The process' largest resident set until then.
    """

    kind: str
    engine: str
    number: int
    round: int
    answer: Answer
    peak_mib: float

    @property
    def decoding(self) -> tuple[float, int]:
        """Seconds of drafting and verifying, and all tokens; behind the first arrival where an engine says neither."""
        told = self.answer.stats
        if "verify_s" not in told:
            return self.waiting
        return told["draft_s"] + told["verify_s"], len(self.answer.ids)

    @property
    def waiting(self) -> tuple[float, int]:
        """Seconds behind the first arrival, and the tokens that came in them."""
        return self.answer.decode_s, self.answer.later_tokens

    def row(self) -> dict[str, Any]:
        """Return plain JSON values, without the text."""
        aside = ("ids", "arrivals", "stats")
        told = {k: v for k, v in asdict(self.answer).items() if k not in aside}
        seconds, tokens = self.decoding
        return {
            "kind": self.kind, "engine": self.engine, "number": self.number, "round": self.round,
            "tokens": len(self.answer.ids), "decode_s": seconds, "decode_tokens": tokens, **told,
        }  # fmt: skip


@dataclass(slots=True)
class Measured:
    """What a run has found until now.

    Attributes:
        header: Machine, options, model, collection.
        engines: What each said of itself; under ``skipped``, why it did not do a kind.
        answers: All of them.
    """

    header: dict[str, Any]
    engines: dict[str, dict[str, Any]]
    answers: list[Timed] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return all that is known as plain JSON values."""
        kinds = sorted({a.kind for a in self.answers})
        return {
            "benchmark": "pipelines",
            **self.header,
            "engines": self.engines,
            "cells": [c for k in kinds for e in self.engines if (c := self._cell(k, e))],
            "answers": [a.row() for a in self.answers],
        }

    def _of(self, kind: str, engine: str) -> list[Timed]:
        return [a for a in self.answers if a.kind == kind and a.engine == engine]

    def _cell(self, kind: str, engine: str) -> dict[str, Any] | None:
        timed = self._of(kind, engine)
        if not timed:
            return None
        answers = [t.answer for t in timed]
        steps = [a.steps for a in answers]
        known = sum(s or 0 for s in steps) if all(s is not None for s in steps) else 0
        tokens = sum(len(a.ids) for a in answers)
        drafters: dict[str, dict[str, int]] = {}
        for a in answers:
            for name, counts in a.stats.get("drafters", {}).items():
                into = drafters.setdefault(name, dict.fromkeys(counts, 0))
                for what, count in counts.items():
                    into[what] += count
        cell = {
            "kind": kind,
            "engine": engine,
            "questions": len({t.number for t in timed}),
            "prompt_tokens": median(a.prompt_tokens for a in answers),
            "answer_tokens": tokens,
            "decode_ms_per_token": _ms([t.decoding for t in timed]),
            "wall_ms_per_token": _ms([t.waiting for t in timed]),
            "first_token_s": median(a.first_s for a in answers),
            "answer_s": sum(a.total_s for a in answers) / len(answers),
            "tokens_per_step": tokens / known if known else None,
            "drafters": drafters,
            "peak_memory_mib": max(t.peak_mib for t in timed),
        }
        for other in (BASELINE, *PEERS):
            if base := self._of(kind, other):
                cell |= _against(other, base, timed)
        against = [cell[key] for name in PEERS if (key := f"times_{name}") in cell]
        return cell | ({"times_best_genai": min(against)} if against else {})


def _ms(spent: Sequence[tuple[float, int]]) -> float | None:
    tokens = sum(count for _, count in spent)
    return 1000 * sum(seconds for seconds, _ in spent) / tokens if tokens else None


def _against(name: str, base: Sequence[Timed], timed: Sequence[Timed]) -> dict[str, Any]:
    """Return how many times quicker than ``name``, with the interval of 95 in 100 over questions, and what is alike.

    Decoding where both say what it took, else the wait behind the first token of both.
    """
    both = all("verify_s" in t.answer.stats for t in (*base, *timed))
    sides = [_by_question(side, decoding=both) for side in (base, timed)]
    shared = sorted(set(sides[0]) & set(sides[1]))
    if not shared:
        return {}
    pairs = [(sides[0][number], sides[1][number]) for number in shared]
    draw = random.Random(0)
    drawn = sorted(ratio(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    ends = [drawn[int(share * (RESAMPLES - 1))] for share in (0.025, 0.975)]
    first = {t.number: t.answer for t in base if t.round == 0}
    mine = [t for t in timed if t.round == 0 and t.number in first]
    return {
        f"times_{name}": ratio(pairs),
        f"times_{name}_interval": ends,
        f"same_as_{name}": agreement([first[t.number] for t in mine], [t.answer for t in mine]),
    }


Spent = tuple[float, int]


def _by_question(timed: Sequence[Timed], *, decoding: bool) -> dict[int, Spent]:
    """Return seconds and tokens of each question that has later tokens, at the median pace of its repetitions."""
    found: dict[int, list[Spent]] = {}
    for t in timed:
        spent = t.decoding if decoding else t.waiting
        if spent[1]:
            found.setdefault(t.number, []).append(spent)
    return {
        number: (median(s / n for s, n in spent) * spent[0][1], spent[0][1])
        for number, spent in found.items()
    }


def ratio(pairs: Sequence[tuple[Spent, Spent]]) -> float:
    """Return the time of a token of the first side over that of the second."""
    (s0, n0), (s1, n1) = (
        (sum(s for s, _ in side), sum(n for _, n in side)) for side in zip(*pairs, strict=True)
    )
    return (s0 / n0) / (s1 / n1) if s1 else 0.0
