"""Finds retrieved chunks in a prompt: word for word, then up to white space and escapes, then nearly.

Spans are in the original text. All searching is by `str.find` and one pass over words, so the time is
linear in the prompt's length for each chunk.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rasd_integrations.prompting.prompt_view import PromptView, Span
from rasd_integrations.types import Chunk

MAX_CHUNKS = 512
"""More captured chunks than this are not looked for."""

_SEPARATOR = re.compile(
    r"(?:\s|\\[nrt])+"
)  # `repr` and `str(list)` leave newlines as two characters
_SHORT = 24  # characters; a shorter chunk must fill its lines, or "Yes" would stand everywhere
_ANCHOR = 8  # words
_SHINGLE = 4  # words
_OVERLAP = 0.6  # share of a chunk's shingles that must stand in the prompt
_TRIES = 4  # places of one anchor that are looked at; repeats are many, and alike


@dataclass(frozen=True, slots=True)
class Located:
    """A chunk that stands in the prompt, and where."""

    chunk: Chunk
    span: Span


class Needle:
    """A chunk's text, prepared to be looked for."""

    def __init__(self, text: str) -> None:
        """Prepare ``text``."""
        self.text = text.strip()
        escaped = (repr(self.text)[1:-1], json.dumps(self.text, ensure_ascii=False)[1:-1])
        self.forms = tuple(dict.fromkeys((self.text, *escaped)))

    @cached_property
    def words(self) -> list[str]:
        """The words, as :class:`Haystack` has them."""
        return Haystack(self.text).words

    @cached_property
    def shingles(self) -> frozenset[str]:
        """All runs of a few words."""
        return frozenset(_shingles(self.words))


class Haystack:
    """A text to look in. Its words are found once, and only when chunks do not stand there exactly."""

    def __init__(self, text: str) -> None:
        """Look in ``text``."""
        self.text = text

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        starts, ends = [0], []
        for gap in _SEPARATOR.finditer(self.text):
            ends.append(gap.start())
            starts.append(gap.end())
        ends.append(len(self.text))
        return [(s, e) for s, e in zip(starts, ends, strict=True) if s < e]

    @cached_property
    def words(self) -> list[str]:
        """The words, in one Unicode form."""
        return [_plain(self.text[start:end]) for start, end in self._bounds]

    @cached_property
    def _joined(self) -> str:
        return " ".join(self.words)

    @cached_property
    def _starts(self) -> list[int]:
        starts, at = [], 0
        for word in self.words:
            starts.append(at)
            at += len(word) + 1
        return starts

    def exact(self, needle: Needle) -> tuple[int, int] | None:
        """Return where the chunk stands as it is, or as `repr` or JSON writes it."""
        for form in needle.forms:
            at = self.text.find(form)
            while at >= 0 and len(form) < _SHORT and not self._fills_lines(at, at + len(form)):
                at = self.text.find(form, at + len(form))
            if at >= 0:
                return at, at + len(form)
        return None

    def loose(self, needle: Needle) -> tuple[int, int] | None:
        """Return where the chunk stands up to white space."""
        joined = " ".join(needle.words)
        at = self._joined.find(joined) if len(joined) >= _SHORT else -1
        return None if at < 0 else (self._start_of(at), self._end_of(at + len(joined)))

    def similar(self, needle: Needle) -> tuple[int, int] | None:
        """Return where most of the chunk stands, anchored by some words in a row of it."""
        words = needle.words
        last = len(words) - _ANCHOR
        if last < _SHINGLE:
            return None
        for offset in dict.fromkeys((0, last, last // 4, last // 2, 3 * last // 4)):
            anchor = " ".join(words[offset : offset + _ANCHOR])
            at = self._joined.find(anchor)
            for _ in range(_TRIES):
                if at < 0:
                    break
                if span := self._matching(needle, bisect_right(self._starts, at) - 1 - offset):
                    return span
                at = self._joined.find(anchor, at + len(anchor))
        return None

    def _matching(self, needle: Needle, first: int) -> tuple[int, int] | None:
        """Return the smallest span of the words from ``first`` on that holds enough of the chunk."""
        slack = len(needle.words) // 8 + _SHINGLE
        low, high = max(first - slack, 0), first + len(needle.words) + slack
        hits: dict[str, int] = {}
        places: list[int] = []
        for i, shingle in enumerate(_shingles(self.words[low:high]), low):
            if shingle in needle.shingles and shingle not in hits:
                hits[shingle] = i
                places.append(i)
        if len(hits) < _OVERLAP * len(needle.shingles):
            return None
        return self._bounds[places[0]][0], self._bounds[places[-1] + _SHINGLE - 1][1]

    def _fills_lines(self, start: int, end: int) -> bool:
        before = self.text[max(start - 64, 0) : start].rstrip(" \t")
        after = self.text[end : end + 64].lstrip(" \t")
        opens = not before or before.endswith(("\n", "\\n", "'", '"', ":"))
        return opens and (not after or after.startswith(("\n", "\\n", "'", '"')))

    def _start_of(self, at: int) -> int:
        word = bisect_right(self._starts, at) - 1
        start, end = self._bounds[word]
        same = end - start == len(self.words[word])
        return start + at - self._starts[word] if same else start

    def _end_of(self, at: int) -> int:
        word = bisect_right(self._starts, at - 1) - 1
        start, end = self._bounds[word]
        same = end - start == len(self.words[word])
        return start + at - self._starts[word] if same else end


class PromptIndex:
    """The haystacks of one prompt, those where retrieved text stands most likely first."""

    def __init__(self, view: PromptView, context: str | None = None) -> None:
        """Look into ``context`` first, where it stands in the prompt, then from the last message back.

        Assistant messages are left out: an earlier answer may quote a chunk, but is no context.
        """
        last = len(view.texts) - 1
        places = [i for i in range(last, -1, -1) if view.roles[i] != "assistant"]
        self._hay = [(Span(i, 0, len(view.texts[i])), Haystack(view.texts[i])) for i in places]
        self.context = self.find(context) if context and context.strip() else None
        if self.context is not None:
            self._hay.insert(0, (self.context, Haystack(view.text(self.context))))

    def find(self, text: str) -> Span | None:
        """Return where ``text`` stands."""
        found = self._find(Needle(text))
        return found[0] if found else None

    def locate(self, chunks: Iterable[Chunk]) -> tuple[list[Located], list[Chunk]]:
        """Return the chunks that stand in the prompt, and those that do not, each text once, in order.

        Of a chunk that is only similar, what stands in the prompt is taken for its text: nothing
        reaches the drafter that the prompt does not say.
        """
        located: list[Located] = []
        missing: list[Chunk] = []
        unique: dict[str, Chunk] = {}
        for chunk in list(chunks)[:MAX_CHUNKS]:
            unique.setdefault(chunk.text, chunk)
        for chunk in unique.values():
            found = self._find(Needle(chunk.text)) if chunk.text.strip() else None
            if found is None:
                missing.append(chunk)
            else:
                span, text = found
                located.append(Located(chunk if text is None else replace(chunk, text=text), span))
        return located, missing

    def _find(self, needle: Needle) -> tuple[Span, str | None] | None:
        """Return the span, and its own text where it is not the chunk's."""
        for look in (Haystack.exact, Haystack.loose, Haystack.similar):
            for place, hay in self._hay:
                if found := look(hay, needle):
                    start, end = found
                    span = Span(place.message, place.start + start, place.start + end)
                    return span, hay.text[start:end] if look is Haystack.similar else None
        return None


def _shingles(words: Sequence[str]) -> list[str]:
    return [" ".join(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1)]


def _plain(word: str) -> str:
    if word.isascii():
        return word
    return unicodedata.normalize("NFKC", word).replace(" ", "")
