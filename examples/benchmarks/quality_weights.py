r"""Try other weights of the two models on a finished run of ``quality.py``.

A run keeps of each reference token both models' log-likelihoods and entropies, so any rule that mixes p and q by a
weight is judged without a model. What a rule leaves open is fitted on documents with even numbers; the table is of
those with odd ones, against "confidence".

    python examples/benchmarks/quality_weights.py examples/benchmarks/results/quality.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality_figures import grouped

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
Weight = Callable[[Floats, Row, Sequence[float]], Floats]
"""Takes of each token log p, log q, H(p) and H(q), the row, and the rule's numbers; returns the target's weights."""


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -60, 60))))


def slope(tokens: Floats, _: Row, numbers: Sequence[float]) -> Floats:
    """Weigh by the difference of the entropies, more or less steeply; the target has a least weight."""
    steep, least = numbers
    return least + (1 - least) * _sigmoid(steep * (tokens[:, 3] - tokens[:, 2]))


def agreement(tokens: Floats, _: Row, numbers: Sequence[float]) -> Floats:
    """Weigh also by which model gave the answer's last tokens the higher probability."""
    strength, decay = numbers
    seen, past = np.zeros(len(tokens)), 0.0
    for i, gain in enumerate(tokens[:, 0] - tokens[:, 1]):
        seen[i] = past
        past = decay * past + gain
    return _sigmoid(strength * seen + tokens[:, 3] - tokens[:, 2])


def gap(tokens: Floats, row: Row, numbers: Sequence[float]) -> Floats:
    """Weigh also by how far the nearest chunk stands out of those retrieved."""
    steep, middle = numbers
    best, last = row["near"]
    return _sigmoid(steep * (middle - (best - last)) + tokens[:, 3] - tokens[:, 2])


def nearness(tokens: Floats, row: Row, numbers: Sequence[float]) -> Floats:
    """Weigh also by how near the nearest chunk is to the question."""
    steep, middle = numbers
    return _sigmoid(steep * (middle - row["near"][0]) + tokens[:, 3] - tokens[:, 2])


RULES: Mapping[str, tuple[Weight, Sequence[Sequence[float]]]] = {
    "entropies, slope and least weight": (slope, ((0.25, 0.5, 1, 1.5, 2, 4), (0, 0.1, 0.25, 0.5))),
    "agreement over the last tokens": (agreement, ((0.05, 0.1, 0.25, 0.5, 1), (0.5, 0.8, 1))),
    "gap of the ranks": (gap, ((2, 5, 10, 20), (0.05, 0.1, 0.2, 0.3))),
    "nearness of the best chunk": (nearness, ((2, 5, 10), (0.2, 0.35, 0.5, 0.65))),
}
CONFIDENCE = (1.0, 0.0)


def nats(row: Row, weight: Weight, numbers: Sequence[float]) -> float:
    """Return the negative log-likelihood of a reference answer."""
    tokens = np.asarray(row["tokens"], dtype=np.float64)
    w = weight(tokens, row, numbers)
    return -float(np.log(w * np.exp(tokens[:, 0]) + (1 - w) * np.exp(tokens[:, 1])).sum())


def _moved(row: Row, weight: Weight, numbers: Sequence[float]) -> float:
    return nats(row, weight, numbers) - nats(row, slope, CONFIDENCE)


def _further(row: Row, name: str) -> float:
    return -float(sum(row["extra"][name])) - nats(row, slope, CONFIDENCE)


def judged(rows: Sequence[Row]) -> dict[str, Any]:
    """Return for each rule the numbers fitted on one half and the change against "confidence" on the other."""
    even = [row for row in rows if row["key"][1] % 2 == 0]
    odd = [row for row in rows if row["key"][1] % 2]
    out: dict[str, Any] = {}
    for name, (weight, grids) in RULES.items():
        totals = {n: sum(nats(row, weight, n) for row in even) for n in product(*grids)}
        best = min(totals, key=totals.__getitem__)
        change = grouped(odd, partial(_moved, weight=weight, numbers=best), by_token=True)
        out[name] = {"numbers": list(best), "against_confidence": change}
    for name in odd[0].get("extra", {}) if odd else ():
        change = grouped(odd, partial(_further, name=name), by_token=True)
        out[name] = {"numbers": [], "against_confidence": change}
    return out


def main() -> None:
    """Print a line for each rule, and one JSON document."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0].removeprefix("r")
    )
    parser.add_argument("run", type=Path, help="results of quality.py, one a line")
    lines = parser.parse_args().run.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "key" in row]
    found: dict[str, Any] = {}
    for retrieval in dict.fromkeys(row["key"][3] for row in rows):
        found[retrieval] = judged([row for row in rows if row["key"][3] == retrieval])
        for name, said in found[retrieval].items():
            change = said["against_confidence"]
            moved = f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]"
            print(f"{retrieval}: {name} {said['numbers']}: {moved}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
