"""An explained answer as HTML: text coloured by source, quotes linked to their chunks.

It holds no script and loads nothing. Colours are translucent and text has the colour of the page around it, which may
be light or dark.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from rasd_integrations.stats import Quote
from rasd_integrations.text.answer.explanation_table import drafted, drafter_rows, summary_lines

if TYPE_CHECKING:
    from rasd_integrations.text.answer.explanation import Explanation

_COLOURS = {
    "suffix": "66,133,244,.38",
    "answers": "251,140,0,.42",
    "collection": "52,168,83,.38",
    "recycling": "171,71,188,.38",
    "grammar": "128,128,128,.38",
}
_OTHERS = ("0,172,193,.42", "233,30,99,.38", "175,180,43,.5")
_CAPTION = "Coloured by who drafted it; a bar begins a step of the target; underlined is quoted."
_MOST = 200  # characters of a chunk's metadata
_STYLE = """
.rasd-answer{line-height:1.7;max-width:60em}
.rasd-answer .rasd-text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;margin:.6em 0}
.rasd-answer .rasd-text span{border-radius:2px;padding:.1em 0}
.rasd-answer .rasd-step{box-shadow:-1px 0 0 rgba(128,128,128,.9)}
.rasd-answer .rasd-off{opacity:.65;font-style:italic}
.rasd-answer a.rasd-quote{color:inherit;text-decoration:underline;text-underline-offset:.25em}
.rasd-answer a.rasd-quote sup{font-size:.7em}
.rasd-answer b{font-weight:normal;border-radius:2px;padding:.1em .4em}
.rasd-answer table{font-size:inherit;color:inherit;border-collapse:collapse;margin:.6em 0}
.rasd-answer td,.rasd-answer th{padding:.1em .8em;text-align:right}
.rasd-answer td:first-child,.rasd-answer th:first-child{text-align:left}
.rasd-answer ul,.rasd-answer ol{margin:0 0 .6em}
.rasd-answer li{unicode-bidi:isolate;overflow-wrap:anywhere}
.rasd-answer li:target{outline:2px solid rgba(128,128,128,.9)}
"""


class _Piece(NamedTuple):
    """Text of one source and step, within one quote or none.

    Attributes:
        step: Index of the step.
        source: Who drafted it.
        quote: Index of the quote that it is part of.
        is_answer: False for reasoning and tool calls.
    """

    step: int
    source: str
    quote: int | None
    is_answer: bool


def page(answer: Explanation) -> str:
    """Return HTML in ASCII: every text in it is escaped."""
    key = sha256(answer.text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    names = [*answer.drafters]
    others = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    colours = {name: f"background:rgba({_COLOURS.get(name) or next(others)})" for name in names}
    parts = [
        f'<div class="rasd-answer"><style>{_STYLE}</style><div class="rasd-text">',
        *_text(answer, colours, key),
        f'</div><div class="rasd-off">{_CAPTION}</div>',
        *_table(answer, colours),
        *(f"<div>{escape(line)}</div>" for line in summary_lines(answer)),
        *_list("Steps without a draft", map(_off, answer.off_reasons.items())),
        *_list("Quotes", map(_chunk, answer.quotes), f"rasd-{key}-"),
        *_list("Faults", map(escape, answer.stats.faults)),
        "</div>",
    ]
    return "".join(parts).encode("ascii", "xmlcharrefreplace").decode("ascii")


def _text(answer: Explanation, colours: dict[str, str], key: str) -> Iterator[str]:
    """Yield the coloured text, quotes as links to the list of chunks."""
    step = -1
    for quote, group in groupby(_pieces(answer), lambda pair: pair[0].quote):
        link = "" if quote is None else f'<a class="rasd-quote" href="#rasd-{key}-{quote + 1}">'
        yield link
        for piece, texts in groupby(group, lambda pair: pair[0]):
            names = [*["rasd-step"] * (piece.step != step), *["rasd-off"] * (not piece.is_answer)]
            step = piece.step
            told = escape(f"step {step + 1}: {piece.source} ({drafted(answer.steps[step])})")
            style = colours.get(piece.source, "")
            text = escape("".join(text for _, text in texts))
            yield f'<span class="{" ".join(names)}" style="{style}" title="{told}">{text}</span>'
        yield link and f"<sup>{(quote or 0) + 1}</sup></a>"


def _pieces(answer: Explanation) -> Iterator[tuple[_Piece, str]]:
    """Yield the text of each token, cut where quotes begin and end."""
    at, quotes = 0, list(enumerate(answer.quotes))
    for token in answer.tokens:
        if other := token.reasoning + token.call:
            yield _Piece(token.step, token.source, None, is_answer=False), other
        rest = token.text
        while rest:
            while quotes and quotes[0][1].end <= at:
                del quotes[0]
            number, edge = None, at + len(rest)
            if quotes:
                index, quote = quotes[0]
                number = index if quote.start <= at else None
                edge = quote.end if quote.start <= at else quote.start
            head, rest = rest[: edge - at], rest[edge - at :]
            yield _Piece(token.step, token.source, number, is_answer=True), head
            at += len(head)


def _table(answer: Explanation, colours: dict[str, str]) -> Iterator[str]:
    yield "<table>"
    for place, (name, *figures) in enumerate(drafter_rows(answer)):
        cell = "td" if place else "th"
        named = f'<b style="{colours.get(name, "")}">{escape(name)}</b>'
        cells = "".join(f"<{cell}>{escape(figure)}</{cell}>" for figure in figures)
        yield f"<tr><{cell}>{named}</{cell}>{cells}</tr>"
    yield "</table>"


def _list(title: str, items: Iterator[str], ids: str = "") -> Iterator[str]:
    """Yield a titled list of HTML, numbered if it is linked to, or nothing if there are no items."""
    if rows := list(items):
        kind = "ol" if ids else "ul"
        yield f"<div>{title}</div><{kind}>"
        for i, row in enumerate(rows, 1):
            yield f'<li id="{ids}{i}">{row}</li>' if ids else f"<li>{row}</li>"
        yield f"</{kind}>"


def _off(reason: tuple[str, int]) -> str:
    why, steps = reason
    return f"{steps}: {escape(why)}"


def _chunk(quote: Quote) -> str:
    """Return where a quote is from."""
    metadata = quote.as_dict()["metadata"]
    told = "; ".join(f"{key}: {value}" for key, value in metadata.items())
    chunk = f"chunk {quote.chunk_id}" if quote.chunk_id is not None else "a chunk without an id"
    place = f"{chunk}, at character {quote.chunk_start}. {told[:_MOST]}"
    return f"&ldquo;{escape(quote.text)}&rdquo;<br>{escape(place)}"
