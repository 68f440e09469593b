"""From the parts that the engines' processes wrote to one JSON document of plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from answers import Answer
from catalog import BASELINE, ENGINES
from floor import StepBytes
from metrics import agreement, breakdown, copied, floor_figures, summary
from tasks import Example

from rasd_integrations.demo.measure import median

ALL, UNCOPIED = "all", "nothing copied"
UNCOPIED_SHARE = 0.1
"""Questions whose answer copies at most this share of its runs of four tokens form a row of their own."""

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Questions:
    """One task at one length."""

    task: str
    context: int
    examples: tuple[Example, ...]
    cut: bool = False
    skipped: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what the document says of it."""
        head = {"task": self.task, "context": self.context}
        if self.skipped:
            return head | {"skipped": self.skipped}
        length = median(len(e.ids) for e in self.examples)
        count = len(self.examples)
        return head | {"questions": count, "prompt_tokens": length, "cut": self.cut}


@dataclass(slots=True)
class Part:
    """What one process of one engine gave: ``result`` as ``worker.py`` writes it, or why there is none."""

    engine: str
    context: int
    result: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""
    stolen: float | None = None


@dataclass(slots=True)
class Run:
    """Everything that was asked and answered so far.

    Attributes:
        header: Machine, options and model.
        questions: Tasks at lengths, in the order in which every engine is asked.
        ends: Token ids that end an answer; some engines hand them out, some do not, so they are not compared.
        size: What a plain step reads.
        bandwidths: Bytes/s before the engines and, once they are done, after; the fastest makes the floor.
        parts: In the order in which they ran.
    """

    header: dict[str, Any]
    questions: Sequence[Questions]
    ends: frozenset[int]
    size: StepBytes
    bandwidths: list[float]
    parts: list[Part] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return plain JSON."""
        contexts = dict.fromkeys(q.context for q in self.questions if not q.skipped)
        cells = [cell for context in contexts for cell in self._cells(context)]
        document = self.header | {
            "bytes": {"weights": self.size.weights, "kv_token": self.size.kv_token},
            "bandwidth_gb_s": [b / 1e9 for b in self.bandwidths],
            "questions": [q.as_dict() for q in self.questions],
            "engines": {name: self._engine(name) for name in self.header["options"]["engines"]},
            "cells": cells,
            "steps": [
                {"engine": p.engine, "context": p.context, "step_ms": p.result["step_ms"]}
                for p in self.parts
                if "step_ms" in p.result
            ],
            "answers": [a for context in contexts for a in self._answers(context)],
        }
        rounded: dict[str, Any] = _rounded(document)
        return rounded

    def _engine(self, name: str) -> dict[str, Any]:
        parts = [p for p in self.parts if p.engine == name]
        out: dict[str, Any] = {"label": ENGINES[name].label}
        for p in parts:
            out |= p.result.get("about", {})
        out["load_s"] = median(p.result["load_s"] for p in parts if p.result)
        out["stolen"] = max((p.stolen or 0.0 for p in parts), default=None)
        reasons = list(dict.fromkeys(p.skipped for p in parts if p.skipped))
        return out | ({"skipped": "; ".join(reasons)} if reasons else {})

    def _keys(self, context: int) -> list[Key]:
        here = [q for q in self.questions if q.context == context]
        return [(q.task, i) for q in here for i in range(len(q.examples))]

    def _repeats(self, engine: str, context: int) -> list[dict[Key, Answer]]:
        """Return an engine's answers by question, one mapping a repetition."""
        keys = self._keys(context)
        found = []
        for part in self.parts:
            if (part.engine, part.context) == (engine, context) and part.result:
                answers = [Answer(**raw) for raw in part.result["answers"]]
                found.append(dict(zip(keys, answers, strict=True)))
        return found

    def _said(self, answer: Answer) -> Answer:
        """Return an answer without the tokens that end it."""
        ids = answer.ids
        while ids and ids[-1] in self.ends:
            ids = ids[:-1]
        return replace(answer, ids=ids)

    def _groups(self, context: int) -> dict[str, list[Key]]:
        """Return the rows of this length: each task, all tasks, and where there was nothing to copy."""
        keys = self._keys(context)
        groups: dict[str, list[Key]] = {}
        for key in keys:
            groups.setdefault(key[0], []).append(key)
        if len(groups) > 1:
            groups[ALL] = keys
        plain = self._repeats(BASELINE, context)
        if plain:
            prompts = {
                (q.task, i): e.ids
                for q in self.questions
                if q.context == context
                for i, e in enumerate(q.examples)
            }
            own = [
                k for k in keys if copied(self._said(plain[0][k]).ids, prompts[k]) <= UNCOPIED_SHARE
            ]
            if own:
                groups[UNCOPIED] = own
        return groups

    def _cells(self, context: int) -> Iterable[dict[str, Any]]:
        baseline = self._repeats(BASELINE, context)
        for group, keys in self._groups(context).items():
            rate: float | None = None
            names = sorted({p.engine for p in self.parts}, key=[BASELINE, *ENGINES].index)
            for name in names:
                repeats = self._repeats(name, context)
                if not repeats:
                    continue
                cell = self._cell(name, context, [[r[k] for k in keys] for r in repeats])
                if name == BASELINE:
                    rate = cell["decode_tokens_per_s"]
                if rate and cell["decode_tokens_per_s"]:
                    cell["times_" + BASELINE] = cell["decode_tokens_per_s"] / rate
                if baseline:
                    ours, theirs = (
                        [self._said(found[0][k]) for k in keys] for found in (repeats, baseline)
                    )
                    cell["same_as_" + BASELINE] = agreement(ours, theirs)
                yield {"engine": name, "task": group, "context": context} | cell

    def _cell(self, name: str, context: int, repeats: list[list[Answer]]) -> dict[str, Any]:
        pooled = [answer for repeat in repeats for answer in repeat]
        parts = [p for p in self.parts if (p.engine, p.context) == (name, context) and p.result]
        means = [summary(repeat)["decode_ms_per_token_mean"] for repeat in repeats]
        cell = summary(pooled) | {"questions": len(repeats[0]), "repeats": len(repeats)}
        cell["decode_ms_spread"] = [min(means), max(means)] if None not in means else None
        cell["peak_memory_mib"] = max(p.result["peak_memory_mib"] for p in parts)
        about = parts[-1].result["about"]
        cell |= floor_figures(cell, pooled, self.size, max(self.bandwidths), about)
        parts_of_a_step = breakdown(pooled)
        return cell | ({"breakdown_ms": parts_of_a_step} if parts_of_a_step else {})

    def _answers(self, context: int) -> Iterable[dict[str, Any]]:
        """Return the first repetition's answers: what was said, and what it took."""
        for name in dict.fromkeys(p.engine for p in self.parts):
            for repeat in self._repeats(name, context)[:1]:
                for (task, number), answer in repeat.items():
                    yield {
                        "engine": name,
                        "task": task,
                        "context": context,
                        "question": number,
                        "ids": answer.ids,
                        "cached_tokens": answer.cached_tokens,
                        "steps": answer.steps,
                        "first_s": answer.first_s,
                        "total_s": answer.total_s,
                        "drafters": answer.stats.get("drafters", {}),
                    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
