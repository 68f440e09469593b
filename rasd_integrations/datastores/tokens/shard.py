"""Texts sorted by context: a suffix array of the reversed texts.

In a reversed text the tokens before a position are a suffix that starts there. Sorted, all positions with the same
last tokens are adjacent, those that agree longest nearest: one binary search finds the longest match, and shorter
ones are wider ranges around it. Sorting compares ``MAX_MATCH`` tokens.

numpy sorts 0.23 microseconds a token at 10 MB of English and 0.41 at 64 MB, where encoding takes 1.7. pydivsufsort
0.0.20 takes 0.15 and 0.26 with a fifth more memory: a compiled dependency for a twelfth of the build.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.datastores.tokens.encoding import SEPARATOR, Ids

MAX_MATCH = 16  # tokens, as in REST (arXiv 2311.08252); a power of two
_BYTES = 4
_TEXT = np.dtype(">u4")  # big-endian, so that bytes compare as the tokens do

Positions = NDArray[np.int64]
Keys = NDArray[np.uint64]
May = Callable[[int, Keys], NDArray[np.bool_]]
"""Says which chunks that match so many tokens may be drafted from."""


class Origin(Protocol):
    """The file that a shard is mapped from."""

    def check(self) -> None:
        """Raise if it has changed since it was opened."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """An immutable part of a store.

    Attributes:
        text: ``[tokens]`` big-endian ids: each chunk reversed, a separator before each and at the end.
        order: ``[entries]`` uint32, positions in ``text`` of all but the last tokens of chunks, sorted by the
            ``MAX_MATCH`` tokens that start there; ties by position.
        starts: ``[chunks]`` uint32, first position of each chunk in ``text``.
        keys: ``[chunks]`` uint64.
        alive: ``[chunks]`` bool, False for removed chunks.
        raw: The bytes of ``text``, from ``base`` on.
        base: An offset in ``raw``.
        origin: The file that it is mapped from, if any; to be checked before anything is read.
    """

    text: Ids
    order: Ids
    starts: Ids
    keys: Keys
    alive: NDArray[np.bool_]
    raw: bytes | mmap.mmap
    base: int = 0
    origin: Origin | None = None
    _view: memoryview = field(init=False, repr=False)
    _whole: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Cache what look-ups read."""
        object.__setattr__(self, "_view", self.order.data)
        object.__setattr__(self, "_whole", bool(self.alive.all()))

    @classmethod
    def build(cls, chunks: Sequence[Ids], keys: Sequence[int]) -> Shard:
        """Sort ``chunks`` of one token or more."""
        ends = np.cumsum([0, *(len(c) + 1 for c in chunks)])
        text = np.full(ends[-1] + 1, SEPARATOR, np.uint32)
        for end, chunk in zip(ends, chunks, strict=False):
            text[end + 1 : end + 1 + len(chunk)] = chunk[::-1]
        return cls._sorted(text, np.asarray(keys, np.uint64))

    @classmethod
    def merge(cls, shards: Sequence[Shard]) -> Shard:
        """Sort the chunks of ``shards`` that were not removed together, in their order."""
        kept = [shard.compact() for shard in shards]
        parts = [part.text[: -1 if part is not kept[-1] else None] for part in kept]
        text = np.concatenate(parts).astype(np.uint32)
        return cls._sorted(text, np.concatenate([part.keys for part in kept]))

    @classmethod
    def _sorted(cls, text: Ids, keys: Keys) -> Shard:
        starts = np.flatnonzero(text == SEPARATOR)[:-1] + 1
        order = _sorted_positions(text)
        followed = text != SEPARATOR
        followed[starts] = False  # the last token of a chunk, which nothing follows
        return cls._of(text, order[followed[order]], starts, keys)

    @classmethod
    def _of(cls, text: Ids, order: NDArray[Any], starts: NDArray[Any], keys: Keys) -> Shard:
        raw = text.astype(_TEXT).tobytes()
        order, starts = (a.astype(np.uint32, copy=False) for a in (order, starts))
        return cls(np.frombuffer(raw, _TEXT), order, starts, keys, np.ones(len(keys), bool), raw)

    @property
    def lengths(self) -> Positions:
        """Tokens of each chunk, including removed ones."""
        following = np.append(self.starts[1:], len(self.text)).astype(np.int64)
        return following - self.starts - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunks that were not removed."""
        return int(self.lengths[self.alive].sum())

    def rows(self) -> Iterator[tuple[int, Ids]]:
        """Yield key and ids of each chunk that was not removed."""
        text = self.text.astype(np.uint32)
        ends = self.starts.astype(np.int64) + self.lengths
        for key, start, end in zip(
            self.keys[self.alive].tolist(),
            self.starts[self.alive].tolist(),
            ends[self.alive].tolist(),
            strict=True,
        ):
            yield key, text[start:end][::-1]

    def without(self, dead: NDArray[np.bool_]) -> Shard:
        """Return the shard with ``dead`` chunks marked as removed; the arrays are shared."""
        return replace(self, alive=self.alive & ~dead)

    def compact(self) -> Shard:
        """Return the shard without the text of its removed chunks; the order is kept, not sorted again."""
        if self._whole:
            return self
        kept = np.append(np.repeat(self.alive, self.lengths + 1), True)
        moved = np.cumsum(~kept)
        order = self.order[kept[self.order]]
        starts = self.starts[self.alive]
        return self._of(
            self.text[kept], order - moved[order], starts - moved[starts], self.keys[self.alive]
        )

    def longest(self, query: bytes) -> int:
        """Return the longest match of ``query`` (from :func:`reversed_context`) in tokens, including removed chunks."""
        at = self._reader(len(query))
        found = bisect_left(self._view, query, key=at)
        near = (i for i in (found - 1, found) if 0 <= i < len(self._view))
        return max((_common(query, at(self._view[i])) for i in near), default=0)

    def matches(self, query: bytes) -> tuple[int, int]:
        """Return the range of :attr:`order` whose positions match the whole of ``query``."""
        at = self._reader(len(query))
        first = bisect_left(self._view, query, key=at)
        return first, bisect_right(self._view, query, lo=first, key=at)

    def continuations(
        self, picks: Positions, depth: int, may: Callable[[Keys], NDArray[np.bool_]] | None = None
    ) -> list[list[int]]:
        """Return the ``depth`` ids that followed at each of some entries of :attr:`order`.

        Those of removed chunks are left out, and those of keys that ``may`` denies.
        """
        positions = self.order[picks].astype(np.int64)
        if may is not None or not self._whole:
            chunks = np.searchsorted(self.starts, positions, side="right") - 1
            kept = self.alive[chunks]
            if may is not None:
                kept = kept & may(self.keys[chunks])
            positions = positions[kept]
        ahead = positions[:, None] - np.arange(1, depth + 1)
        rows: list[list[int]] = self.text[ahead.clip(0)].tolist()
        return rows

    def _reader(self, size: int) -> Callable[[int], bytes]:
        """Return a function from a position to the ``size`` bytes of text there."""
        raw, base = self.raw, self.base

        def at(position: int) -> bytes:
            start = base + _BYTES * position
            return raw[start : start + size]

        return at


def reversed_context(context: Sequence[int]) -> bytes:
    """Return the last ``MAX_MATCH`` tokens of ``context``, reversed, as the bytes of a text."""
    return np.array(context[: -MAX_MATCH - 1 : -1], _TEXT).tobytes()


def continuations(
    shards: Iterable[Shard],
    context: Sequence[int],
    *,
    min_match: int,
    most_rows: int,
    depth: int,
    may: May | None = None,
) -> tuple[int, list[list[int]]]:
    """Return the longest match of a context's last ``MAX_MATCH`` tokens in all ``shards``, and what followed it.

    Args:
        shards: Searched as one.
        context: Token ids.
        min_match: Shortest match of interest, at least 1.
        most_rows: Most occurrences to read; of more, that many, evenly spaced.
        depth: Tokens of each continuation.
        may: Asked for the chunks of the occurrences; ``None`` allows all.

    Returns:
        Length of the match (0 for none) and lists of ``depth`` ids; a list ends at ``SEPARATOR``.
    """
    query = reversed_context(context)
    searched = tuple(shards)
    length = max((shard.longest(query) for shard in searched), default=0)
    while length >= min_match:
        ranges = [shard.matches(query[: _BYTES * length]) for shard in searched]
        total = sum(end - first for first, end in ranges)
        picks = np.arange(min(total, most_rows)) * total // max(min(total, most_rows), 1)
        rows: list[list[int]] = []
        allowed = None if may is None else partial(may, length)
        for shard, (first, end) in zip(searched, ranges, strict=True):
            count = int(np.searchsorted(picks, end - first))
            if count:
                rows += shard.continuations(picks[:count] + first, depth, allowed)
            picks = picks[count:] - (end - first)
        if rows:
            return length, rows
        length -= 1  # all of these chunks are removed or denied
    return 0, []


def found_in(shards: Iterable[Shard], context: Sequence[int], length: int) -> int | None:
    """Return the key of a chunk that holds the last ``length`` tokens of ``context``; ``None`` if none does."""
    query = reversed_context(context[-length:])
    for shard in shards:
        first, end = shard.matches(query)
        for position in shard.order[first:end].tolist():
            chunk = int(np.searchsorted(shard.starts, position, side="right")) - 1
            if shard.alive[chunk]:
                return int(shard.keys[chunk])
    return None


def _sorted_positions(text: Ids) -> Ids:
    """Return all positions sorted by their next ``MAX_MATCH`` tokens, or those up to the chunk's end.

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
    """Return the number of leading tokens that are the same."""
    for i in range(0, min(len(one), len(other)), _BYTES):
        if one[i : i + _BYTES] != other[i : i + _BYTES]:
            return i // _BYTES
    return min(len(one), len(other)) // _BYTES
