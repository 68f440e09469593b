"""Figures of ``quality.py``: changes against the target, with intervals over resampled documents."""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rasd_integrations.runtime.modes import Route
from rasd_integrations.stats import DecodingStats

TARGET, CHUNKS = "target", "chunks alone"
TITLES = {"nats": "nats a token", "f1": "F1", "exact": "exact match", "rouge_l": "ROUGE-L"}
RESAMPLES = 2000
Row = Mapping[str, Any]


def words(text: str) -> list[str]:
    """Return lower-case words without punctuation and articles, as SQuAD compares them."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of the words, 0 to 100."""
    said, right = words(answer), words(reference)
    common = sum((Counter(said) & Counter(right)).values())
    return 200.0 * common / (len(said) + len(right)) if common else 0.0


def exact(answer: str, reference: str) -> float:
    """Return 100 if the words are the same."""
    return 100.0 * (words(answer) == words(reference))


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of the words, 0 to 100."""
    said, right = words(answer), words(reference)
    before = [0] * (len(right) + 1)
    for word in said:
        now = [0]
        for i, other in enumerate(right):
            now.append(before[i] + 1 if word == other else max(now[i], before[i + 1]))
        before = now
    return 200.0 * before[-1] / (len(said) + len(right)) if before[-1] else 0.0


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "f1": f1, "exact": exact, "rouge_l": rouge_l,
}  # fmt: skip


def change(
    groups: Sequence[Sequence[tuple[float, float]]],
) -> dict[str, float]:
    """Return the mean of sums over weights, and its 95 % interval: the groups are resampled.

    Args:
        groups: Of each document the pairs of a sum and its weight.
    """
    totals = [(sum(x for x, _ in group), sum(w for _, w in group)) for group in groups]
    draw = random.Random(0)

    def mean(chosen: Sequence[tuple[float, float]]) -> float:
        return sum(x for x, _ in chosen) / max(sum(w for _, w in chosen), 1e-9)

    means = sorted(mean(draw.choices(totals, k=len(totals))) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return {"mean": round(mean(totals), 4), "low": round(low, 4), "high": round(high, 4)}


def grouped(
    rows: Sequence[Row], value: Callable[[Row], float], *, by_token: bool
) -> dict[str, float]:
    """Return :func:`change` of a value of each row, a mean over tokens or over questions."""
    groups: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in rows:
        weight = len(row["tokens"]) if by_token else 1
        groups.setdefault(tuple(row["key"][:2]), []).append((value(row), weight))
    return change(list(groups.values()))


def _nats(row: Row, rule: str) -> float:
    extra = row.get("extra", {})
    return -float(sum(extra[rule])) if rule in extra else float(row["nats"][rule])


def _score(row: Row, rule: str, metric: str) -> float:
    return METRICS[metric](row["answers"][rule]["text"], row["reference"])


def _cell(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures of rows of one setting."""

    def figures(
        metric: str, value: Callable[[Row, str], float], rules: Sequence[str], found: Sequence[Row]
    ) -> dict[str, Any]:
        by_token = metric == "nats"

        def moved(rule: str) -> dict[str, float]:
            return grouped(found, lambda r: value(r, rule) - value(r, TARGET), by_token=by_token)

        own = grouped(found, lambda r: value(r, TARGET), by_token=by_token)
        return {metric: own, f"{metric}_change": {n: moved(n) for n in rules if n != TARGET}}

    first = rows[0]
    cell: dict[str, Any] = {"questions": len(rows)}
    cell |= figures("nats", _nats, [*first["nats"], *first.get("extra", {})], rows)
    if "answers" not in first:
        return cell
    for metric in METRICS:

        def score(row: Row, rule: str, metric: str = metric) -> float:
            return _score(row, rule, metric)

        cell |= figures(metric, score, [*first["answers"]], rows)
    if {TARGET, CHUNKS} <= set(first["answers"]):
        cell["route"] = routed(rows)
    cell["answers"] = {
        rule: {
            "ms_a_token": round(
                1000 * _sum(rows, rule, "decode_s") / max(_sum(rows, rule, "tokens"), 1), 2
            ),
            "changed": round(_sum(rows, rule, "changed") / len(rows), 4),
        }
        for rule in first["answers"]
    }
    return cell


def routed(rows: Sequence[Row]) -> dict[str, Any]:
    """Return F1 of always the documents, always the chunks and ``mode="route"``, and what the last one reads.

    Tokens read are a share of those of always reading the documents, without what a cache saves.
    """
    route = Route()

    def doubt(row: Row) -> str | None:
        short = row["answers"][CHUNKS]
        total = short["logprob"] * short["tokens"]
        told = DecodingStats(logprob=total, generated_tokens=short["tokens"])
        return route.doubt(row["question"], short["text"], told)

    doubts = {json.dumps(row["key"]): doubt(row) for row in rows}

    def choice(row: Row) -> str:
        return CHUNKS if doubts[json.dumps(row["key"])] is None else TARGET

    def read(row: Row) -> int:
        why = doubts[json.dumps(row["key"])] or ""
        first = 0 if why.startswith("the question") else row["short_tokens"]
        return int(first + (row["prompt_tokens"] if why else 0))

    def of(choose: Callable[[Row], str]) -> dict[str, float]:
        return grouped(rows, lambda r: _score(r, choose(r), "f1"), by_token=False)

    fixed = {TARGET: of(lambda _: TARGET), CHUNKS: of(lambda _: CHUNKS)}
    better = max(fixed, key=lambda rule: fixed[rule]["mean"])
    lost = grouped(
        rows, lambda r: _score(r, choice(r), "f1") - _score(r, better, "f1"), by_token=False
    )
    return {
        "f1": {**fixed, "route": of(choice)},
        "better": better,
        "against_better": lost,
        "documents_share": round(sum(choice(row) == TARGET for row in rows) / len(rows), 3),
        "tokens_read": round(sum(map(read, rows)) / sum(r["prompt_tokens"] for r in rows), 3),
    }


def _sum(rows: Sequence[Row], rule: str, name: str) -> float:
    return float(sum(row["answers"][rule][name] for row in rows))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures by task, retrieval and number of chunks, and of all tasks together."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        task, _, _, retrieval, k = row["key"]
        for name in (task, "all tasks"):
            cells.setdefault(f"{name}, {retrieval}, {k} chunks", []).append(row)
    return {"cells": {name: _cell(found) for name, found in cells.items()}}


def rows_of(found: Mapping[str, Any], metric: str) -> list[list[str]]:
    """Return a table of changes against the target, a rule a row; empty if it was not measured.

    The first row is the head, the second says how many questions there are, the third what the target reaches.
    """
    cells = {name: cell for name, cell in found["cells"].items() if metric in cell}
    if not cells:
        return []
    digits = 3 if metric == "nats" else 2
    rules = list(next(iter(cells.values()))[f"{metric}_change"])
    return [
        [TITLES[metric], *cells],
        ["questions", *(str(cell["questions"]) for cell in cells.values())],
        [TARGET, *(f"{cell[metric]['mean']:.{digits}f}" for cell in cells.values())],
        *(
            [rule, *(_shown(cell[f"{metric}_change"][rule], digits) for cell in cells.values())]
            for rule in rules
        ),
    ]


def _shown(value: Mapping[str, float], digits: int) -> str:
    mean, low, high = (f"{value[n]:+.{digits}f}" for n in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def draw_quality(found: Mapping[str, Any], path: Path) -> Path | None:
    """Draw the changes in likelihood and F1 with their intervals; ``None`` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    cells = {n: c for n, c in found["cells"].items() if n.startswith("all tasks")}
    metrics = [m for m in ("nats", "f1") if any(m in c for c in cells.values())]
    figure = Figure(figsize=(6.5 * len(metrics), 4.2), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        rules: list[str] = []
        for place, (name, cell) in enumerate(cells.items()):
            changes = cell.get(f"{metric}_change", {})
            rules = rules or list(changes)
            for row, rule in enumerate(r for r in rules if r in changes):
                value = changes[rule]
                at = row + 0.15 * (place - (len(cells) - 1) / 2)
                axis.plot([value["low"], value["high"]], [at, at], color=f"C{place}", lw=2)
                label = name.removeprefix("all tasks, ") if row == 0 else None
                axis.plot([value["mean"]], [at], "o", color=f"C{place}", label=label)
        axis.axvline(0.0, color="grey", lw=1)
        axis.set_yticks(range(len(rules)), rules)
        axis.invert_yaxis()
        better = "lower is better" if metric == "nats" else "higher is better"
        axis.set_xlabel(f"change of {TITLES[metric]} against the target ({better})")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path
