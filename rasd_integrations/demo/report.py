"""What the tour prints: one table that fits a narrow terminal, then the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rasd_integrations.demo.measure import Answer, median

Results = Mapping[str, Sequence[Answer]]


def _figure(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _same(answers: Sequence[Answer], baseline: Sequence[Answer]) -> str:
    equal = sum(a.text.strip() == b.text.strip() for a, b in zip(answers, baseline, strict=True))
    return "yes" if equal == len(baseline) else f"{equal} of {len(baseline)}"


def results_table(results: Results, baseline: str) -> Table:
    """Return the table: one column an engine, one row a figure; medians over the questions."""
    table = Table(title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("median", overflow="fold")
    for name in results:
        table.add_column(name, justify="right", overflow="fold")

    def row(label: str, cells: Sequence[str]) -> None:
        table.add_row(label, *cells)

    each = list(results.values())
    row("prompt tokens", [_figure(median(a.prompt_tokens for a in r), 0) for r in each])
    row(
        "first token, cold",
        [_figure(median(a.first_s for a in r if not a.warm), 2, " s") for r in each],
    )
    row(
        "first token, cached",
        [_figure(median(a.first_s for a in r if a.warm), 2, " s") for r in each],
    )
    row("decode, per token", [_figure(median(a.decode_ms for a in r), 1, " ms") for r in each])
    row(
        "tokens per step",
        [_figure(sum(a.tokens for a in r) / max(sum(a.steps for a in r), 1), 2) for r in each],
    )
    row(
        "same output",
        [
            "reference" if name == baseline else _same(r, results[baseline])
            for name, r in results.items()
        ],
    )
    return table


def print_report(console: Console, results: Results, baseline: str, note: str) -> None:
    """Print the table, the note and every answer; equal answers once."""
    console.print()
    console.print(results_table(results, baseline))
    console.print(Text(note, style="dim"))
    for i, reference in enumerate(results[baseline]):
        console.print()
        console.print(Text(f"Q{i + 1}  {reference.question}", style="bold"))
        spoken: dict[str, list[str]] = {}
        for name, answers in results.items():
            spoken.setdefault(answers[i].text.strip(), []).append(name)
        for text, names in spoken.items():
            console.print(Text(", ".join(names), style="cyan"))
            console.print(Text(text or "(empty)"))
