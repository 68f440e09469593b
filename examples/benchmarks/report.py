"""A result of ``run.py`` as Markdown tables, and the pages of the docs filled with them.

A page holds ``<!-- table NAME from FILE -->`` and ``<!-- end -->``, each on a line of its own; what stands between
is made from the committed JSON ``FILE`` (a path from the root of the repository), so no figure of a page is typed.
``NAME`` is one of :data:`TABLES`; where it is of one length, ``NAME@7200`` chooses it, else the longest counts.
Results of ``drafters.py``, ``streams.py``, ``pipelines.py`` and ``vllm_cpu.py`` have the tables of :data:`OTHERS`.

Example::

    python examples/benchmarks/report.py README.md docs/explanation/results.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from catalog import BASELINE, ENGINES
from quality_figures import TITLES, rows_of
from vllm_figures import vllm_rows
from weights_figures import weights_rows

ROOT = Path(__file__).parents[2]
MARKED = re.compile(
    r"^<!-- table (?P<name>\S+) from (?P<file>\S+) -->\n(?P<body>.*?)^<!-- end -->$",
    re.MULTILINE | re.DOTALL,
)
NONE = "-"
Row = list[str]
Column = tuple[str, str, str]

PIPELINE_KINDS = {
    "a": "first questions over a collection",
    "b": "the same reworded",
    "c": "objects of one schema",
    "d": "an agent with tools",
    "e": "chat that comes back to earlier answers",
    "f": "a document edited by instruction",
}

ENGINE_COLUMNS: tuple[Column, ...] = (
    ("first token, cold, s", "first_token_cold_s", ".2f"),
    ("first token, cached, s", "first_token_cached_s", ".3f"),
    ("decode, median, ms a token", "decode_ms_per_token", ".1f"),
    ("decode, all tokens, ms a token", "decode_ms_per_token_mean", ".1f"),
    ("tokens a step", "tokens_per_step", ".2f"),
    ("times transformers", f"times_{BASELINE}", ".2f"),
    ("peak memory, MiB", "peak_memory_mib", ".0f"),
)
SUMMARY_COLUMNS: tuple[Column, ...] = (
    ("first token, s", "first_token_cold_s", ".1f"),
    ("ms a token", "decode_ms_per_token_mean", ".0f"),
    ("memory, MiB", "peak_memory_mib", ".0f"),
)
FLOOR_COLUMNS: tuple[Column, ...] = (
    ("floor of a plain step, ms", "floor_ms", ".1f"),
    ("a step, ms", "step_ms", ".1f"),
    ("efficiency of a step", "engine_efficiency", ".2f"),
    ("multiple of the floor", "multiple_of_floor", ".2f"),
    ("wait for the next piece, median, ms", "gap_p50_ms", ".1f"),
    ("95th of 100, ms", "gap_p95_ms", ".1f"),
)


def table(document: dict[str, Any], name: str) -> str:
    """Return one table of a result as Markdown.

    Raises:
        ValueError: There is no table of that name, or no cell of that length.
    """
    kind, _, context = name.partition("@")
    if kind not in TABLES | OTHERS:
        msg = f"There is no table {kind!r}; choose from {', '.join(TABLES | OTHERS)}."
        raise ValueError(msg)
    if kind in OTHERS:
        return _markdown(OTHERS[kind](document))
    lengths = sorted({cell["context"] for cell in document["cells"]})
    if context and int(context) not in lengths:
        msg = f"The result has no cell of {context} tokens; it has {lengths}."
        raise ValueError(msg)
    chosen = int(context) if context else max(lengths, default=0)
    return _markdown(TABLES[kind](document, chosen))


def _markdown(rows: list[Row]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest])


def label(document: dict[str, Any], name: str) -> str:
    """Return the name of an engine; a variant carries that of its family."""
    engine = ENGINES[name]
    first = next(e for e in ENGINES.values() if e.library == engine.library)
    own = str(document["engines"][name]["label"])
    return own.replace("its ", f"{first.label.removesuffix(' generate')}, ", 1)


def _cells(document: dict[str, Any], **wanted: object) -> list[dict[str, Any]]:
    return [
        cell
        for cell in document["cells"]
        if all(cell[key] == value for key, value in wanted.items())
    ]


def total(document: dict[str, Any], engine: str, context: int) -> dict[str, Any] | None:
    """Return the row over all tasks, which is the task's own where there is one task."""
    cells = {cell["task"]: cell for cell in _cells(document, engine=engine, context=context)}
    return cells.get("all") or next(iter(cells.values()), None)


def _figure(cell: dict[str, Any] | None, key: str, form: str) -> str:
    value = None if cell is None else cell.get(key)
    return NONE if value is None else format(value, form)


def _by_engine(
    document: dict[str, Any], context: int, columns: Sequence[Column], *, same: bool
) -> list[Row]:
    rows = [["", *(title for title, _, _ in columns), *(["same tokens"] if same else [])]]
    for name, about in document["engines"].items():
        cell = total(document, name, context)
        row = [label(document, name), *(_figure(cell, key, form) for _, key, form in columns)]
        if cell is None:
            row[1] = f"skipped: {about.get('skipped', 'not run at this length')}".replace("|", "/")
        if same:
            found = cell and cell.get(f"same_as_{BASELINE}")
            row.append(f"{found['identical']} of {found['of']}" if found else NONE)
        rows.append(row)
    return rows


def _engines(document: dict[str, Any], context: int) -> list[Row]:
    return _by_engine(document, context, ENGINE_COLUMNS, same=True)


def _summary(document: dict[str, Any], context: int) -> list[Row]:
    return _by_engine(document, context, SUMMARY_COLUMNS, same=False)


def _floor(document: dict[str, Any], context: int) -> list[Row]:
    return _by_engine(document, context, FLOOR_COLUMNS, same=False)


def _matrix(
    document: dict[str, Any], heads: Sequence[Any], found: Callable[[str, Any], Any]
) -> list[Row]:
    """Return engines against ``heads``: milliseconds a token over all tokens, tokens a step."""
    rows = [["ms a token, tokens a step", *(str(head) for head in heads)]]
    for name in document["engines"]:
        cells = [found(name, head) for head in heads]
        if any(cells):
            figures = (
                f"{_figure(c, 'decode_ms_per_token_mean', '.1f')}, {_figure(c, 'tokens_per_step', '.2f')}"
                if c
                else NONE
                for c in cells
            )
            rows.append([label(document, name), *figures])
    return rows


def _tasks(document: dict[str, Any], context: int) -> list[Row]:
    cells = _cells(document, context=context)
    by = {(cell["engine"], cell["task"]): cell for cell in cells}
    heads = list(dict.fromkeys(cell["task"] for cell in cells))
    return _matrix(document, heads, lambda name, task: by.get((name, task)))


def _contexts(document: dict[str, Any], _context: int) -> list[Row]:
    heads = sorted({cell["context"] for cell in document["cells"]})
    return _matrix(document, heads, lambda name, context: total(document, name, context))


def _breakdown(document: dict[str, Any], context: int) -> list[Row]:
    parts = ("draft", "verify", "rest")
    rows = [["ms a step", *parts]]
    for name in document["engines"]:
        cell = total(document, name, context)
        if cell and "breakdown_ms" in cell:
            spent = cell["breakdown_ms"]
            rows.append([label(document, name), *(f"{spent[part]:.2f}" for part in parts)])
    return rows


def _steps(document: dict[str, Any], context: int) -> list[Row]:
    """Return the cost of a forward by its width, the fastest of the repetitions."""
    found: dict[str, dict[str, float]] = {}
    for entry in document["steps"]:
        if entry["context"] == context:
            best = found.setdefault(entry["engine"], {})
            for width, ms in entry["step_ms"].items():
                best[width] = min(ms, best.get(width, ms))
    widths = list(dict.fromkeys(width for best in found.values() for width in best))
    rows = [["tokens in a forward, ms", *widths]]
    for name, best in found.items():
        rows.append([label(document, name), *(f"{best[width]:.1f}" for width in widths)])
    return rows


def _versions(document: dict[str, Any], _context: int) -> list[Row]:
    rows = [["", "weights", "keys and values", "versions"]]
    aside = ("label", "load_s", "stolen", "skipped", "weights", "kv", "kv_bits", "weight_bytes")
    for name, about in document["engines"].items():
        versions = ", ".join(f"{k} {v}" for k, v in about.items() if k not in aside)
        weights = str(about.get("weights", NONE))
        kv = str(about.get("kv", weights))
        rows.append([label(document, name), weights, kv, versions or NONE])
    return rows


def _streams(document: dict[str, Any]) -> list[Row]:
    """Return several answers at once against the same ones one by one."""
    rows = [
        ["prompt", "", "at once", "one by one, tokens/s", "together, tokens/s", "times", "equal"]
    ]
    rows += [
        [
            str(c["tokens"]), c["drafter"], str(c["streams"]), f"{c['one_by_one_tokens_per_s']:.0f}",
            f"{c['together_tokens_per_s']:.0f}", f"{c['gain']:.2f}", f"{c['equal_answers']} of {c['streams']}",
        ]
        for c in document["cells"]
    ]  # fmt: skip
    return rows


def _drafters(document: dict[str, Any]) -> list[Row]:
    """Return drafters against lengths, with what was accepted and what drafting took."""
    rows = _drafters_by(document, "tokens")
    for row in rows[1:]:
        cells = [c for c in document["cells"] if c["drafter"] == row[0]]
        steps = sum(c["answer_tokens"] / c["tokens_per_step"] for c in cells)
        drafted = _summed(cells, "drafted_per_step")
        accepted = sum(
            (c["acceptance"] or 0)
            * c["drafted_per_step"]
            * c["answer_tokens"]
            / c["tokens_per_step"]
            for c in cells
        )
        row += [
            f"{accepted / drafted:.2f}" if drafted else NONE,
            f"{_summed(cells, 'draft_ms_per_step') / steps:.1f}",
        ]
    rows[0] += ["accepted of drafted", "draft ms a step"]
    return rows


def _drafters_by_task(document: dict[str, Any]) -> list[Row]:
    return _drafters_by(document, "task")


def _drafters_by(document: dict[str, Any], key: str) -> list[Row]:
    """Return drafters against what ``key`` tells cells apart by: tokens a step, milliseconds a token."""
    heads = list(dict.fromkeys(cell[key] for cell in document["cells"]))
    rows = [["tokens a step, ms a token", *map(str, heads), "all"]]
    for name in dict.fromkeys(cell["drafter"] for cell in document["cells"]):
        mine = [cell for cell in document["cells"] if cell["drafter"] == name]
        groups = [[cell for cell in mine if cell[key] == head] for head in heads]
        figures = []
        for cells in (*groups, mine):
            tokens = sum(cell["answer_tokens"] for cell in cells)
            steps = sum(cell["answer_tokens"] / cell["tokens_per_step"] for cell in cells)
            ms = sum(cell["decode_ms_per_token"] * cell["answer_tokens"] for cell in cells)
            figures.append(f"{tokens / steps:.2f}, {ms / tokens:.1f}" if tokens else NONE)
        rows.append([name, *figures])
    return rows


def _summed(cells: Sequence[dict[str, Any]], key: str) -> float:
    """Return over all steps what ``key`` says of one."""
    return float(sum(c[key] * c["answer_tokens"] / c["tokens_per_step"] for c in cells))


def _pipelines(document: dict[str, Any]) -> list[Row]:
    """Return kinds of work against engines: milliseconds a token of plain decoding, and times that."""
    engines = [n for n in document["engines"] if any(c["engine"] == n for c in document["cells"])]
    by = {(c["kind"], c["engine"]): c for c in document["cells"]}
    rows = [["times plain decoding (95 % interval)", "plain, ms a token"]]
    rows[0] += [document["engines"][name]["label"] for name in engines if name != "plain"]
    for kind in dict.fromkeys(c["kind"] for c in document["cells"]):
        row = [PIPELINE_KINDS[kind], _figure(by.get((kind, "plain")), "decode_ms_per_token", ".1f")]
        for name in engines:
            if name != "plain":
                cell = by.get((kind, name))
                ends = cell.get("times_plain_interval") if cell else None
                span = f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
                row.append(_figure(cell, "times_plain", ".2f") + span)
        rows.append(row)
    return rows


def _pipelines_summary(document: dict[str, Any]) -> list[Row]:
    """Return kinds of work: plain and default decoding, and the quicker of OpenVINO GenAI's modes."""
    rows = [["ms a token", "plain", "with drafts", "times (95 % interval)", "OpenVINO GenAI's better mode",
             "memory, MiB", "GenAI's"]]  # fmt: skip
    for kind in dict.fromkeys(c["kind"] for c in document["cells"]):
        cells = {c["engine"]: c for c in document["cells"] if c["kind"] == kind}
        peers = [c for name, c in cells.items() if name.startswith("openvino_genai")]
        best = min(peers, key=lambda c: float(c["decode_ms_per_token"]), default=None)
        ours = cells["auto"]
        ends = ours["times_plain_interval"]
        rows.append([
            PIPELINE_KINDS[kind], _figure(cells["plain"], "decode_ms_per_token", ".1f"),
            _figure(ours, "decode_ms_per_token", ".1f"),
            f"{ours['times_plain']:.2f} ({ends[0]:.2f} to {ends[1]:.2f})",
            _figure(best, "decode_ms_per_token", ".1f"),
            _figure(ours, "peak_memory_mib", ".0f"), _figure(best, "peak_memory_mib", ".0f"),
        ])  # fmt: skip
    return rows


def _pipelines_detail(document: dict[str, Any]) -> list[Row]:
    """Return a row for each kind of work and engine."""
    columns: tuple[Column, ...] = (
        ("prompt, tokens", "prompt_tokens", ".0f"),
        ("decode, ms a token", "decode_ms_per_token", ".1f"),
        ("behind the first token, ms a token", "wall_ms_per_token", ".1f"),
        ("an answer, s", "answer_s", ".2f"),
        ("tokens a step", "tokens_per_step", ".2f"),
        ("times plain", "times_plain", ".2f"),
        ("times the better of OpenVINO GenAI's", "times_best_genai", ".2f"),
        ("peak memory, MiB", "peak_memory_mib", ".0f"),
    )
    rows = [
        [
            "work",
            "engine",
            *(title for title, _, _ in columns),
            "same tokens",
            "accepted of drafted",
        ]
    ]
    for cell in document["cells"]:
        same = cell.get("same_as_plain")
        parts = (f"{n} {d['accepted']}/{d['drafted']}" for n, d in cell["drafters"].items())
        rows.append([
            PIPELINE_KINDS[cell["kind"]], document["engines"][cell["engine"]]["label"],
            *(_figure(cell, key, form) for _, key, form in columns),
            f"{same['identical']} of {same['of']}" if same else NONE, ", ".join(parts) or NONE,
        ])  # fmt: skip
    return rows


OTHERS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "streams": _streams,
    "vllm": vllm_rows,
    "weights": weights_rows,
    "pipelines": _pipelines,
    "pipelines_summary": _pipelines_summary,
    "pipelines_detail": _pipelines_detail,
    "drafters": _drafters,
    "drafters_by_task": _drafters_by_task,
    **{f"quality_{metric}": partial(rows_of, metric=metric) for metric in TITLES},
}
TABLES: dict[str, Callable[[dict[str, Any], int], list[Row]]] = {
    "engines": _engines,
    "summary": _summary,
    "floor": _floor,
    "tasks": _tasks,
    "contexts": _contexts,
    "breakdown": _breakdown,
    "steps": _steps,
    "versions": _versions,
}


def filled(text: str, root: Path = ROOT) -> str:
    """Return a page with every marked table made again from its file."""

    def fresh(match: re.Match[str]) -> str:
        document = json.loads((root / match["file"]).read_text(encoding="utf-8"))
        made = table(document, match["name"])
        return f"<!-- table {match['name']} from {match['file']} -->\n\n{made}\n\n<!-- end -->"

    return MARKED.sub(fresh, text)


def main() -> None:
    """Fill the pages that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path, help="Markdown files, changed in place")
    for page in parser.parse_args().pages:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
