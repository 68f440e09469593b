"""Prints the demo's results: a table that fits a narrow terminal, then the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rasd_integrations.demo.measure import Measured, median

Answers = Sequence[Measured]


def print_report(
    console: Console, results: Mapping[str, Answers], baseline: str, note: str
) -> None:
    """Print the table, the note and every answer; equal answers once."""
    console.print()
    console.print(_table(results, baseline))
    console.print(Text(note, style="dim"))
    for i, reference in enumerate(results[baseline]):
        console.print()
        console.print(Text(f"Q{i + 1}  {reference.question}", style="bold"))
        names_of: dict[str, list[str]] = {}
        for name, answers in results.items():
            names_of.setdefault(answers[i].text.strip(), []).append(name)
        for text, names in names_of.items():
            console.print(Text(", ".join(names), style="cyan"))
            console.print(Text(text or "(empty)"))
            lines = (results[name][i].quoted for name in names)
            if line := next(filter(None, lines), None):
                console.print(Text(line, style="dim"))


def _table(results: Mapping[str, Answers], baseline: str) -> Table:
    """Return a table with a column per engine and a row per figure, medians over the questions."""
    reference = results[baseline]

    def same(answers: Answers) -> str:
        if answers is reference:
            return "reference"
        pairs = zip(answers, reference, strict=True)
        equal = sum(a.text.strip() == b.text.strip() for a, b in pairs)
        return "yes" if equal == len(reference) else f"{equal} of {len(reference)}"

    def first_token(answers: Answers, *, warm: bool) -> str:
        return _figure(median(a.first_s for a in answers if a.warm == warm), 2, " s")

    rows: dict[str, Callable[[Answers], str]] = {
        "prompt tokens": lambda r: _figure(median(a.prompt_tokens for a in r), 0),
        "first token, cold": lambda r: first_token(r, warm=False),
        "first token, cached": lambda r: first_token(r, warm=True),
        "decode, per token": lambda r: _figure(median(a.decode_ms for a in r), 1, " ms"),
        "tokens per step": lambda r: _figure(
            sum(a.tokens for a in r) / max(sum(a.steps for a in r), 1), 2
        ),
        "same output": same,
    }
    table = Table(title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("median", overflow="fold")
    for name in results:
        table.add_column(name, justify="right", overflow="fold")
    for label, cell in rows.items():
        table.add_row(label, *map(cell, results.values()))
    return table


def _figure(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"
