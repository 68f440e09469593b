"""Draw a result of ``run.py``: decode time and tokens a step by length of the prompt, and what a step's time is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from catalog import ENGINES
from report import PIPELINE_KINDS, label, total

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

# Okabe and Ito's colours, one a family; how its members draft is told by the dash, so grey print works too.
COLOURS = {
    "rasd_integrations": "#0072B2",
    "transformers": "#D55E00",
    "openvino_genai": "#009E73",
    "vllm": "#CC79A7",
    "llama_cpp": "#E69F00",
    "flashspec": "#56B4E9",
}
MARKERS = dict(zip(COLOURS, "osD^vX", strict=True))
DASHES = ("-", "--", ":", "-.")
PARTS = {"verify": "#0072B2", "draft": "#E69F00", "rest": "#999999"}
SIZE = (7.2, 4.4)


def draw(document: dict[str, Any], stem: Path) -> list[Path]:
    """Write the pictures beside one another, named ``STEM_WHAT.png``; return them."""
    pictures = {"decode": _decode, "tokens_per_step": _tokens_per_step, "breakdown": _breakdown}
    paths = []
    for what, paint in pictures.items():
        figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
        paint(document, axis)
        axis.spines[["top", "right"]].set_visible(False)
        path = stem.with_name(f"{stem.name}_{what}.png")
        figure.savefig(path, dpi=150)
        plt.close(figure)
        paths.append(path)
    return paths


def draw_pipelines(document: dict[str, Any], path: Path) -> Path:
    """Write a picture of a result of ``pipelines.py``: bars of each kind of work, times plain; return its path."""
    kinds = list(dict.fromkeys(cell["kind"] for cell in document["cells"]))
    cells = {(c["engine"], c["kind"]): c for c in document["cells"] if c.get("times_plain")}
    names = [n for n in document["engines"] if n != "plain" and any(e == n for e, _ in cells)]
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    height = 0.8 / max(len(names), 1)
    for turn, name in enumerate(names):
        there = [(place, cells[name, k]) for place, k in enumerate(kinds) if (name, k) in cells]
        times = [cell["times_plain"] for _, cell in there]
        ends = [cell["times_plain_interval"] for _, cell in there]
        reach = [[max(t - low, 0) for t, (low, _) in zip(times, ends, strict=True)],
                 [max(high - t, 0) for t, (_, high) in zip(times, ends, strict=True)]]  # fmt: skip
        places = [place + (turn + 0.5) * height - 0.4 for place, _ in there]
        axis.barh(
            places, times, height=0.9 * height, xerr=reach, color=list(COLOURS.values())[turn % len(COLOURS)],
            label=document["engines"][name]["label"], error_kw={"linewidth": 0.8, "ecolor": "0.3"},
        )  # fmt: skip
        for place, value, (_, high) in zip(places, times, ends, strict=True):
            axis.annotate(f" {value:.2f}", (high, place), va="center", fontsize=7)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=(0, (1, 1)))
    axis.set_yticks(range(len(kinds)), [PIPELINE_KINDS[kind] for kind in kinds], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("decoding, times plain of the same run (95 % over questions)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def _contexts(document: dict[str, Any]) -> list[int]:
    return sorted({cell["context"] for cell in document["cells"]})


def _lines(document: dict[str, Any], axis: Axes, key: str) -> None:
    seen: dict[str, int] = {}
    for name in document["engines"]:
        points = [
            (context, cell[key])
            for context in _contexts(document)
            if (cell := total(document, name, context)) and cell[key] is not None
        ]
        if points:
            family = ENGINES[name].library
            dash = DASHES[seen.setdefault(family, 0) % len(DASHES)]
            seen[family] += 1
            axis.plot(
                *zip(*points, strict=True), label=label(document, name), color=COLOURS[family],
                marker=MARKERS[family], linestyle=dash, linewidth=1.8, markersize=5,
            )  # fmt: skip
    axis.set_xlabel("tokens in the prompt")
    axis.set_xscale("log")
    axis.set_xticks(_contexts(document), [str(context) for context in _contexts(document)])
    axis.set_xticks([], minor=True)
    axis.grid(axis="y", color="0.9")


def _legend(axis: Axes) -> None:
    axis.legend(
        fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handlelength=3.5
    )


def _decode(document: dict[str, Any], axis: Axes) -> None:
    _lines(document, axis, "decode_ms_per_token_mean")
    floor = {cell["context"]: cell["floor_ms"] for cell in document["cells"]}
    axis.plot(
        sorted(floor), [floor[context] for context in sorted(floor)], color="black",
        linestyle=(0, (1, 1)), label="floor of a plain step",
    )  # fmt: skip
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(ScalarFormatter())
    axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.set_ylabel("decode, ms a token")
    _legend(axis)


def _tokens_per_step(document: dict[str, Any], axis: Axes) -> None:
    _lines(document, axis, "tokens_per_step")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens a target step")
    _legend(axis)


def _breakdown(document: dict[str, Any], axis: Axes) -> None:
    bars = [
        (f"{label(document, name)}, {context} tokens", cell["breakdown_ms"])
        for context in _contexts(document)
        for name in document["engines"]
        if (cell := total(document, name, context)) and "breakdown_ms" in cell
    ]
    places = range(len(bars))
    left = [0.0] * len(bars)
    for part, colour in PARTS.items():
        widths = [max(spent[part], 0.0) for _, spent in bars]
        axis.barh(places, widths, left=left, color=colour, label=part, height=0.65)
        left = [low + width for low, width in zip(left, widths, strict=True)]
    for place, end in zip(places, left, strict=True):
        axis.annotate(f" {end:.1f}", (end, place), ha="left", va="center", fontsize=8)
    axis.set_yticks(list(places), [title for title, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("ms a step")
    _legend(axis)


def main() -> None:
    """Draw the result that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("result", type=Path, help="JSON document of run.py or pipelines.py")
    parser.add_argument("--out", type=Path, help="pictures' common path (default: the result's)")
    args = parser.parse_args()
    document = json.loads(args.result.read_text(encoding="utf-8"))
    stem = args.out or args.result.with_suffix("")
    if document.get("benchmark") == "pipelines":
        print(draw_pipelines(document, stem.with_suffix(".png")))
        return
    for path in draw(document, stem):
        print(path)


if __name__ == "__main__":
    main()
