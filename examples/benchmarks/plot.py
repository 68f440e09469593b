"""Draw a result of ``run.py``: decode speed, time to the first token, and the cost of a wider step."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

BARS = (
    ("decode_ms_per_token", "decode, ms per token"),
    ("first_token_cold_s", "first token, cold, s"),
    ("first_token_cached_s", "first token, cached, s"),
)


def draw(document: dict[str, Any], path: Path) -> None:
    """Write one picture with a panel a figure."""
    engines = document["engines"]
    with_steps = {n: e["step_ms"] for n, e in engines.items() if "step_ms" in e}
    panels = len(BARS) + bool(with_steps)
    figure, axes = plt.subplots(1, panels, figsize=(3.6 * panels, 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, BARS, strict=False):
        axis.bar(list(engines), [e[key] or 0 for e in engines.values()], color="0.4")
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", rotation=30)
    for name, steps in with_steps.items():
        axes[-1].plot([int(n) for n in steps], list(steps.values()), marker=".", label=name)
    if with_steps:
        axes[-1].set_title("one step of n tokens, ms", fontsize=10)
        axes[-1].set_ylim(bottom=0)
        axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Draw the result that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("result", type=Path, help="JSON document of run.py")
    parser.add_argument("--out", type=Path, help="picture (default: the result's name with .png)")
    args = parser.parse_args()
    document = json.loads(args.result.read_text(encoding="utf-8"))
    draw(document, args.out or args.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
