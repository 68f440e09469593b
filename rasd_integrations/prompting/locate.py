"""Finds retrieved chunks in a prompt: verbatim, then up to white space and escapes, then similar.

Uses `str.find` and one pass over words: linear in the prompt's length for each chunk.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rasd_integrations.prompting.hints import Prompt, PromptHints
from rasd_integrations.prompting.prompt_view import PromptView, Span, clean
from rasd_integrations.types import Chunk

MAX_CHUNKS = 512
"""At most so many captured chunks are searched for."""

# `repr` and `str(list)` write newlines as two characters.
_SEPARATOR = re.compile(r"(?:\s|\\[nrt])+")
_SHORT = 24  # characters; a shorter chunk must fill its lines, or "Yes" would be found everywhere
_ANCHOR = 8  # words
_SHINGLE = 4  # words
_OVERLAP = 0.6  # share of a chunk's shingles that must be in the prompt
_TRIES = 4  # occurrences of an anchor to check; repeats are many and alike


@dataclass(frozen=True, slots=True)
class Located:
    """A chunk found in the prompt, and its span."""

    chunk: Chunk
    span: Span


class Needle:
    """A text to search for: as it is, and as `repr` and JSON write it."""

    def __init__(self, text: str) -> None:
        """Search for ``text`` without surrounding white space."""
        self.text = text.strip()
        escaped = (repr(self.text)[1:-1], json.dumps(self.text, ensure_ascii=False)[1:-1])
        self.forms = tuple(dict.fromkeys((self.text, *escaped)))

    @cached_property
    def words(self) -> list[str]:
        """The normalised words, as in :class:`Haystack`."""
        return Haystack(self.text).words

    @cached_property
    def shingles(self) -> frozenset[str]:
        """All runs of a few words."""
        return frozenset(_shingles(self.words))


class Haystack:
    """A text to search in. It is split into words only when a chunk is not found verbatim."""

    def __init__(self, text: str) -> None:
        """Search in ``text``."""
        self.text = text

    def find(self, needle: Needle) -> tuple[int, int] | None:
        """Return the range of the needle: verbatim, or up to white space, or similar."""
        return self.exact(needle) or self.loose(needle) or self.similar(needle)

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
        """The words in Unicode form NFKC."""
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
        """Return the range of the text verbatim, or as `repr` or JSON writes it."""
        for form in needle.forms:
            at = self.text.find(form)
            while at >= 0 and len(form) < _SHORT and not self._fills_lines(at, at + len(form)):
                at = self.text.find(form, at + len(form))
            if at >= 0:
                return at, at + len(form)
        return None

    def loose(self, needle: Needle) -> tuple[int, int] | None:
        """Return the range of the text up to white space."""
        joined = " ".join(needle.words)
        at = self._joined.find(joined) if len(joined) >= _SHORT else -1
        return None if at < 0 else (self._position(at), self._position(at + len(joined), end=True))

    def similar(self, needle: Needle) -> tuple[int, int] | None:
        """Return the range of most of the text, anchored by a run of its words."""
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
        """Return the smallest range of the words from ``first`` on with enough of the text."""
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

    def _position(self, at: int, *, end: bool = False) -> int:
        """Return the position in the text of one in the joined words."""
        word = bisect_right(self._starts, at - end) - 1
        bounds = self._bounds[word]
        if bounds[1] - bounds[0] == len(self.words[word]):
            return bounds[0] + at - self._starts[word]
        return bounds[end]  # normalising changed its length


class PromptIndex:
    """One prompt with its hints and size, and an index to find chunks in it.

    Attributes:
        view: The prompt.
        hints: What the edge knows about it.
        context: Span of the rendered context, if it is known and found.
        tokens: About how many tokens the prompt has.
        chars_per_token: Mean characters of a token.
        chunk_chars: Characters of a piece of ``chunk_tokens``.
    """

    def __init__(
        self, view: PromptView, hints: PromptHints, tokens: int = 0, chunk_tokens: int = 1
    ) -> None:
        """Search the known context first, then messages from the last one back.

        Assistant messages are left out: an earlier answer may quote a chunk, but is not context.
        """
        self.view, self.hints, self.tokens = view, hints, tokens
        self.chars_per_token = view.chars / max(tokens, 1) or 1.0
        # Rounded, so that the next question on the same documents cuts the same pieces.
        self.chunk_chars = max(round(chunk_tokens * self.chars_per_token / 32), 1) * 32
        last = len(view.texts) - 1
        messages = [i for i in range(last, -1, -1) if view.roles[i] != "assistant"]
        self._hay = [(Span(i, 0, len(view.texts[i])), Haystack(view.texts[i])) for i in messages]
        context = hints.context or ""
        found = self._find(Needle(context)) if context.strip() else None
        self.context = found[0] if found else None
        if self.context is not None:
            self._hay.insert(0, (self.context, Haystack(view.text(self.context))))

    def locate(self, chunks: Iterable[Chunk]) -> tuple[list[Located], list[Chunk]]:
        """Return the chunks that are in the prompt and those that are not, each text once, in order.

        The text of a chunk that is only similar is replaced by the prompt's: nothing reaches the
        drafter that the prompt does not say.
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
                shown = chunk if text is None else replace(chunk, text=text, stored=chunk.original)
                located.append(Located(shown, span))
        return located, missing

    def refill(
        self, regions: Sequence[Span], contents: Sequence[str]
    ) -> tuple[Prompt, tuple[str, ...]]:
        """Return the prompt with other text in ``regions``, and what went wrong.

        If the only region is the template's context, the template is filled again.
        """
        faults: tuple[str, ...] = ()
        view, rerender = self.view, self.hints.rerender
        if rerender and self.context and clean(view, [self.context]) == list(regions):
            try:
                return rerender(contents[0]), ()
            except Exception as error:  # noqa: BLE001 - a user's template; what it raises is reported
                faults = (f"The prompt's template could not be filled again: {error!r}"[:300],)
        texts: dict[int, str] = {}
        for region, content in sorted(
            zip(regions, contents, strict=True), key=lambda p: -p[0].start
        ):
            text = texts.get(region.message, view.texts[region.message])
            texts[region.message] = text[: region.start] + content + text[region.end :]
        return view.edited(texts), faults

    def _find(self, needle: Needle) -> tuple[Span, str | None] | None:
        """Return the span, and its text if it is only similar to the needle's."""
        for search in (Haystack.exact, Haystack.loose, Haystack.similar):
            for place, hay in self._hay:
                if found := search(hay, needle):
                    start, end = found
                    span = Span(place.message, place.start + start, place.start + end)
                    return span, hay.text[start:end] if search is Haystack.similar else None
        return None


def _shingles(words: Sequence[str]) -> list[str]:
    return [" ".join(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1)]


def _plain(word: str) -> str:
    if word.isascii():
        return word
    return unicodedata.normalize("NFKC", word).replace(" ", "")
