"""Cuts text into pieces at the best boundaries there are, and ranks them against a question by words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rasd_integrations.prompting.prompt_view import PromptView, Span
from rasd_integrations.prompting.token_counts import ContentCache
from rasd_integrations.retrieval.lexical import LexicalIndex

_LARGEST_FENCE = 4  # times the size of a piece; a longer code block is cut at its lines
_FENCE = re.compile(r"^[ \t]{0,3}```", re.MULTILINE)
_BOUNDARIES = (  # best first; what matches belongs to the piece before
    re.compile(r"\n\s*\n|(?:\\n){2,}|\n[-=_*#]{3,}[^\n]*\n"),
    re.compile(r"\n|\\n"),
    re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])"),
    re.compile(r"\s+"),
)
_LEAST = 32  # characters; shorter pieces are headers and rules between chunks


def split(text: str, start: int, end: int, size: int) -> list[tuple[int, int]]:
    """Cut ``text[start:end]`` into stretches of at most ``size`` characters, code fences whole.

    A code fence may be up to four times as long.
    """
    pieces: list[tuple[int, int]] = []
    at = start
    for low, high in _fences(text, start, end):
        if high - low <= _LARGEST_FENCE * size:
            pieces += _split(text, at, low, size, 0)
            pieces.append((low, high))
            at = high
    pieces += _split(text, at, end, size, 0)
    return pieces


def boundary(text: str, start: int, end: int, *, last: bool) -> int:
    """Return the best place to cut within ``text[start:end]``: the last or first of the best kind."""
    for pattern in _BOUNDARIES:
        cuts = [match.end() for match in pattern.finditer(text, start, end)]
        if cuts:
            return cuts[-1 if last else 0]
    return end if last else start


def _fences(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    marks = [match.start() for match in _FENCE.finditer(text, start, end)]
    for low, high in zip(marks[::2], marks[1::2], strict=False):
        line_end = text.find("\n", high, end)
        yield low, end if line_end < 0 else line_end + 1


def _split(text: str, start: int, end: int, size: int, level: int) -> list[tuple[int, int]]:
    if end - start <= size:
        return [(start, end)] if start < end else []
    if level == len(_BOUNDARIES):
        return [(i, min(i + size, end)) for i in range(start, end, size)]
    pieces: list[tuple[int, int]] = []
    cuts = [m.end() for m in _BOUNDARIES[level].finditer(text, start, end)]
    at = previous = start  # at: where the open piece starts; previous: the last cut it may end at
    for cut in (*cuts, end):
        if cut - at > size:
            if previous > at:
                pieces.append((at, previous))
                at = previous
            if cut - at > size:
                pieces += _split(text, at, cut, size, level + 1)
                at = cut
        previous = cut
    if at < end:
        pieces.append((at, end))
    return pieces


@dataclass(frozen=True, slots=True)
class _Cut:
    """The pieces of some gaps, as (gap, start, end) relative to each gap, and the index over them."""

    pieces: list[tuple[int, int, int]]
    index: LexicalIndex


class PieceRanker:
    """Ranks the pieces of a prompt's stretches. What was cut and indexed is kept for the next question."""

    def __init__(self) -> None:
        """Start with nothing cut."""
        self._cuts: ContentCache[_Cut] = ContentCache(8)

    def rank(
        self,
        view: PromptView,
        gaps: Sequence[Span],
        question: str,
        size: int,
        *,
        complete: bool,
    ) -> list[Span]:
        """Return pieces of about ``size`` characters of ``gaps``, best first.

        ``complete``: those that share no word with the question follow, in reading order.
        """
        texts = [view.text(gap) for gap in gaps]
        size = max(size, _LEAST)
        cut = self._cuts.get((str(size), *texts), lambda: _cut(texts, size))
        order = cut.index.rank(question)
        if complete:
            seen = set(order)
            order = [*order, *(i for i in range(len(cut.pieces)) if i not in seen)]
        ranked = (cut.pieces[i] for i in order)
        return [
            Span(gaps[g].message, gaps[g].start + start, gaps[g].start + end)
            for g, start, end in ranked
        ]


def _cut(texts: Sequence[str], size: int) -> _Cut:
    pieces = [
        (i, *_trimmed(text, start, end))
        for i, text in enumerate(texts)
        for start, end in split(text, 0, len(text), size)
    ]
    pieces = [p for p in pieces if p[2] - p[1] >= _LEAST]
    return _Cut(pieces, LexicalIndex([texts[i][start:end] for i, start, end in pieces]))


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    stripped = piece.strip()
    start += len(piece) - len(piece.lstrip())
    return start, start + len(stripped)
