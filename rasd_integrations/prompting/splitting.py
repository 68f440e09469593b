"""Cuts text into pieces at paragraphs, lines or sentences, and ranks them by a question's words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from rasd_integrations.prompting.prompt_view import PromptView, Span
from rasd_integrations.prompting.token_counts import ContentCache
from rasd_integrations.retrieval.memory import LexicalIndex

_LARGEST_FENCE = 4  # times the size of a piece; a longer code block is cut at its lines
_FENCE = re.compile(r"^[ \t]{0,3}```", re.MULTILINE)
_BOUNDARIES = (  # best first; what matches belongs to the piece before
    re.compile(r"\n\s*\n|(?:\\n){2,}|\n[-=_*#]{3,}[^\n]*\n"),
    re.compile(r"\n|\\n"),
    re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])"),
    re.compile(r"\s+"),
)
_MIN_CHARS = 32  # shorter pieces are headers and rules between chunks
_Piece: TypeAlias = tuple[int, int, int]  # index of its text, start and end in it


def split(text: str, start: int, end: int, size: int) -> list[tuple[int, int]]:
    """Cut ``text[start:end]`` into ranges of at most ``size`` characters.

    Code fences of up to four times the size stay whole.
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
    """Return the last (or first) boundary of the best kind in ``text[start:end]``."""
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
    at = previous = start  # at: start of the open piece; previous: the last cut it may end at
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


class PieceRanker:
    """Cuts spans of a prompt into pieces and ranks them; pieces and index are cached."""

    def __init__(self) -> None:
        """Start with an empty cache."""
        self._cache: ContentCache[tuple[list[_Piece], LexicalIndex]] = ContentCache(8)

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

        With ``complete``, pieces that share no word with the question follow in reading order.
        """
        texts = [view.text(gap) for gap in gaps]
        size = max(size, _MIN_CHARS)
        pieces, index = self._cache.get((str(size), *texts), lambda: _cut(texts, size))
        order = index.rank(question)
        if complete:
            order = list(dict.fromkeys((*order, *range(len(pieces)))))
        return [
            Span(gaps[g].message, gaps[g].start + start, gaps[g].start + end)
            for g, start, end in (pieces[i] for i in order)
        ]


def _cut(texts: Sequence[str], size: int) -> tuple[list[_Piece], LexicalIndex]:
    pieces = [
        (i, *_trimmed(text, start, end))
        for i, text in enumerate(texts)
        for start, end in split(text, 0, len(text), size)
    ]
    pieces = [p for p in pieces if p[2] - p[1] >= _MIN_CHARS]
    return pieces, LexicalIndex([texts[i][start:end] for i, start, end in pieces])


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    stripped = piece.strip()
    start += len(piece) - len(piece.lstrip())
    return start, start + len(stripped)
