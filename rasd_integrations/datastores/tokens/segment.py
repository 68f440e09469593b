"""Texts sorted by the contexts in them: a suffix array of the texts read backwards.

Read backwards, the tokens before a place are a suffix of the text that starts there. Sorted, all places
with the same last tokens stand side by side, those that agree longest nearest: one binary search finds
the longest match, and shorter ones are wider ranges around it. The sort stops at ``MAX_MATCH`` tokens.

numpy sorts 0.23 microseconds a token at 10 MB of English and 0.41 at 64 MB, where encoding takes 1.7.
Of the libraries, pydivsufsort 0.0.20 was compared: 0.15 and 0.26 with a fifth more memory, a compiled
dependency for a twelfth of the build; it searches arrays in memory only, so look-ups would stay as here.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.datastores.tokens.encoding import SEPARATOR, Ids

MAX_MATCH = 16  # tokens, as in REST (arXiv 2311.08252); a power of two
_BYTES = 4
_TEXT = np.dtype(">u4")  # big-endian, so that bytes compare as the tokens do

Places = NDArray[np.int64]


class Origin(Protocol):
    """The file that a segment is mapped from."""

    def check(self) -> None:
        """Raise if the file has changed since it was opened."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """An immutable part of a store.

    Attributes:
        text: ``[tokens]`` big-endian ids: each chunk read backwards, a separator before each and at the end.
        order: ``[entries]`` uint32, the places in ``text`` that something follows, sorted by the
            ``MAX_MATCH`` tokens that start there; ties in the order of the places.
        starts: ``[chunks]`` uint32, where each chunk starts in ``text``.
        keys: ``[chunks]`` uint64, the keys of the chunks.
        alive: ``[chunks]`` bool, false for removed chunks.
        raw: The bytes of ``text``, from ``base`` on.
        base: An offset in ``raw``.
        origin: The file that it is mapped from, where there is one; to be checked before anything is read.
    """

    text: NDArray[np.uint32]
    order: NDArray[np.uint32]
    starts: NDArray[np.uint32]
    keys: NDArray[np.uint64]
    alive: NDArray[np.bool_]
    raw: bytes | mmap.mmap
    base: int = 0
    origin: Origin | None = None
    _view: memoryview = field(init=False, repr=False)
    _whole: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Prepare the look-up."""
        object.__setattr__(self, "_view", self.order.data)
        object.__setattr__(self, "_whole", bool(self.alive.all()))

    @classmethod
    def build(cls, chunks: Sequence[Ids], keys: Sequence[int]) -> Segment:
        """Sort ``chunks``; a chunk has one token or more."""
        ends = np.cumsum([0, *(len(c) + 1 for c in chunks)])
        text = np.full(ends[-1] + 1, SEPARATOR, np.uint32)
        for end, chunk in zip(ends, chunks, strict=False):
            text[end + 1 : end + 1 + len(chunk)] = chunk[::-1]
        return cls._sorted(text, np.asarray(keys, np.uint64))

    @classmethod
    def merge(cls, segments: Sequence[Segment]) -> Segment:
        """Sort the living chunks of ``segments`` anew, in their order."""
        kept = [segment.compact() for segment in segments]
        parts = [part.text[: -1 if part is not kept[-1] else None] for part in kept]
        text = np.concatenate(parts).astype(np.uint32)
        return cls._sorted(text, np.concatenate([part.keys for part in kept]))

    @classmethod
    def _sorted(cls, text: NDArray[np.uint32], keys: NDArray[np.uint64]) -> Segment:
        starts = np.flatnonzero(text == SEPARATOR)[:-1] + 1
        order = _sorted_places(text)
        followed = text != SEPARATOR
        followed[starts] = False  # the last token of a chunk, which nothing follows
        return cls._of(text, order[followed[order]], starts.astype(np.uint32), keys)

    @classmethod
    def _of(
        cls,
        text: NDArray[np.uint32],
        order: NDArray[np.uint32],
        starts: NDArray[np.uint32],
        keys: NDArray[np.uint64],
    ) -> Segment:
        raw = text.astype(_TEXT).tobytes()
        alive = np.ones(len(keys), bool)
        return cls(np.frombuffer(raw, _TEXT), order, starts, keys, alive, raw)

    @property
    def lengths(self) -> Places:
        """Tokens of each chunk, removed ones included."""
        following = np.append(self.starts[1:], len(self.text)).astype(np.int64)
        return following - self.starts - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the living chunks."""
        return int(self.lengths[self.alive].sum())

    def without(self, dead: NDArray[np.bool_]) -> Segment:
        """Return the segment with ``dead`` chunks removed; the arrays are shared."""
        return replace(self, alive=self.alive & ~dead)

    def compact(self) -> Segment:
        """Return the segment without the text of its removed chunks. What is left stays sorted."""
        if self._whole:
            return self
        kept = np.append(np.repeat(self.alive, self.lengths + 1), True)
        moved = np.cumsum(~kept)
        order = self.order[kept[self.order]]
        starts = self.starts[self.alive]
        return self._of(
            self.text[kept].astype(np.uint32),
            (order - moved[order]).astype(np.uint32),
            (starts - moved[starts]).astype(np.uint32),
            self.keys[self.alive],
        )

    def longest(self, query: bytes) -> int:
        """Return the length of the longest match of ``query``, removed chunks included.

        Args:
            query: From :func:`backwards`.
        """
        at = self._reader(len(query))
        place = bisect_left(self._view, query, key=at)
        near = (i for i in (place - 1, place) if 0 <= i < len(self._view))
        return max((_common(query, at(self._view[i])) for i in near), default=0)

    def matches(self, query: bytes) -> tuple[int, int]:
        """Return the range of :attr:`order` whose places match the whole of ``query``."""
        at = self._reader(len(query))
        first = bisect_left(self._view, query, key=at)
        return first, bisect_right(self._view, query, lo=first, key=at)

    def continuations(self, picks: Places, depth: int) -> list[list[int]]:
        """Return what followed at entries of :attr:`order`, ``depth`` ids each; removed chunks give none.

        Ids from a separator on belong to another chunk.
        """
        places = self.order[picks].astype(np.int64)
        if not self._whole:
            chunks = np.searchsorted(self.starts, places, side="right") - 1
            places = places[self.alive[chunks]]
        ahead = places[:, None] - np.arange(1, depth + 1)
        rows: list[list[int]] = self.text[ahead.clip(0)].tolist()
        return rows

    def _reader(self, size: int) -> Callable[[int], bytes]:
        """Return what gives the ``size`` bytes of text at a place."""
        raw, base = self.raw, self.base

        def at(place: int) -> bytes:
            start = base + _BYTES * place
            return raw[start : start + size]

        return at


def backwards(context: Sequence[int]) -> bytes:
    """Return the last ``MAX_MATCH`` tokens of ``context`` as what :meth:`Segment.longest` looks for."""
    return np.array(context[: -MAX_MATCH - 1 : -1], _TEXT).tobytes()


def continuations(
    segments: Iterable[Segment],
    context: Sequence[int],
    *,
    min_match: int,
    most_rows: int,
    depth: int,
) -> tuple[int, list[list[int]]]:
    """Return the longest match of a context's end and what followed it, over all segments.

    Args:
        segments: Searched as one.
        context: Token ids; the last ``MAX_MATCH`` of them are looked up.
        min_match: Shortest match of interest, at least 1.
        most_rows: Where there are more occurrences, that many of them, evenly spread.
        depth: Tokens of each continuation.

    Returns:
        Length of the match, 0 for none, and rows of ``depth`` ids; a row ends at ``SEPARATOR``.
    """
    query = backwards(context)
    searched = tuple(segments)
    length = max((segment.longest(query) for segment in searched), default=0)
    while length >= min_match:
        ranges = [segment.matches(query[: _BYTES * length]) for segment in searched]
        total = sum(end - first for first, end in ranges)
        picks = np.arange(min(total, most_rows)) * total // max(min(total, most_rows), 1)
        rows: list[list[int]] = []
        for segment, (first, end) in zip(searched, ranges, strict=True):
            count = int(np.searchsorted(picks, end - first))
            if count:
                rows += segment.continuations(picks[:count] + first, depth)
            picks = picks[count:] - (end - first)
        if rows:
            return length, rows
        length -= 1  # all of it is removed
    return 0, []


def _sorted_places(text: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return all places sorted by their next ``MAX_MATCH`` tokens, the rest of a chunk where it is shorter.

    Prefix doubling (Manber and Myers 1993): the rank by 2w tokens comes from two ranks by w.
    """
    size = len(text)
    ends = np.flatnonzero(text == SEPARATOR)
    left = np.repeat(ends, np.diff(ends, prepend=-1)) - np.arange(size)
    left = np.minimum(left, MAX_MATCH).astype(np.int8)  # tokens before the next separator
    ranks = text
    width = 1
    while True:
        pairs = ranks.astype(np.uint64) << np.uint64(32)
        pairs[:-width] |= np.where(left[:-width] >= width, ranks[width:], np.uint32(0))
        width *= 2
        # Equal pairs get one rank, so only the last round must be stable; the others are vectorised.
        order = np.argsort(pairs, kind="stable" if width >= MAX_MATCH else "quicksort")
        if width >= MAX_MATCH:
            return order.astype(np.uint32)
        pairs = pairs[order]
        ranks = np.empty(size, np.uint32)
        ranks[order] = np.cumsum(np.append(False, pairs[1:] != pairs[:-1]), dtype=np.uint32)


def _common(one: bytes, other: bytes) -> int:
    """Return how many leading tokens are the same."""
    for i in range(0, min(len(one), len(other)), _BYTES):
        if one[i : i + _BYTES] != other[i : i + _BYTES]:
            return i // _BYTES
    return min(len(one), len(other)) // _BYTES
