"""A store of token sequences that grows, shrinks and is read at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from rasd_integrations.datastores.tokens import file
from rasd_integrations.datastores.tokens.encoding import (
    Encoder,
    Ids,
    as_ids,
    batches,
    chunk_key,
    ids_key,
    keys_of,
    texts_of,
)
from rasd_integrations.datastores.tokens.segment import Segment
from rasd_integrations.errors import ConfigurationError

_BATCH = 256  # texts encoded at once
_MOST_SORTED = 1 << 24  # tokens of a segment: 64 MB of English, sorted in about 600 MB of memory
_LEAST_KEPT = 1 << 15  # tokens of a segment that is not sorted anew with the next ones
_RATIO = 4  # a larger segment is at least that many times the size of the next
_MOST_DEAD = 0.25  # share of removed tokens from which on a segment is written anew


class TokenStore:
    """Texts as token ids, in which the continuations of a context are looked up.

    Texts are known by their content: one that is there already is not stored again, one that is removed
    is found by its text or its key. A few sorted segments hold them; new ones are sorted by themselves,
    and with older ones when they come near to them in size: 100 texts at a time, a store grows at about a
    microsecond a token, encoding apart, however large it is. No match crosses the border of two texts.

    Safe under threads: readers take the segments of the moment, which never change. A change works in
    the caller's thread, under a lock that readers do not take.

    Attributes:
        tokenizer: Fingerprint of the tokenizer that the ids belong to.
        max_tokens: Most tokens kept; the oldest texts go first. ``None`` is no limit.
    """

    def __init__(self, encode: Any, *, max_tokens: int | None = None) -> None:
        """Start with no text.

        Args:
            encode: The target's tokenizer, or a function from a text to its ids, such as ``RASD.encode``.
            max_tokens: Most tokens kept.

        Raises:
            ConfigurationError: ``encode`` is neither, or ``max_tokens`` is not positive.
        """
        if max_tokens is not None and max_tokens < 1:
            msg = f"max_tokens is {max_tokens!r}, but must be at least 1, or None for no limit."
            raise ConfigurationError(msg)
        self._encode = Encoder(encode)
        self._lock = threading.Lock()
        self._segments: tuple[Segment, ...] = ()
        self.tokenizer = self._encode.fingerprint
        self.max_tokens = max_tokens

    @classmethod
    def build(
        cls,
        texts: Any,
        encode: Any,
        *,
        max_tokens: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Self:
        """Return a store of ``texts``: what :meth:`add` takes.

        Args:
            texts: Texts, chunks, documents or nodes, one or many.
            encode: As in the constructor.
            max_tokens: As in the constructor.
            progress: Called with the number of texts done since the last call.
        """
        store = cls(encode, max_tokens=max_tokens)
        store.add(texts, progress=progress)
        return store

    @classmethod
    def open(
        cls, path: str | Path, encode: Any, *, max_tokens: int | None = None, verify: bool = True
    ) -> Self:
        """Map a saved store into memory. Changes are kept in memory until they are saved.

        Args:
            path: Where it was saved.
            encode: As in the constructor; must be the tokenizer that the store was built with.
            max_tokens: As in the constructor.
            verify: Compare the file's checksum, which reads all of it once.

        Raises:
            RetrievalError: There is no such file, it is damaged, or of another tokenizer.
        """
        store = cls(encode, max_tokens=max_tokens)
        segments = file.read(Path(path), store.tokenizer, verify=verify)
        store._segments = store._bounded(segments)
        return store

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What the store holds now; it never changes.

        Raises:
            RetrievalError: The file that it is mapped from was changed in place.
        """
        segments = self._segments
        for segment in segments:
            if segment.origin is not None:
                segment.origin.check()
        return segments

    @property
    def num_tokens(self) -> int:
        """Tokens that can be found."""
        return sum(segment.num_tokens for segment in self.segments)

    def __len__(self) -> int:
        """Return the number of texts."""
        return sum(int(segment.alive.sum()) for segment in self.segments)

    def __contains__(self, text: object) -> bool:
        """Whether a text, chunk or key is there."""
        return bool(_held(self.segments, keys_of(text)))

    def add(self, texts: Any, *, progress: Callable[[int], object] | None = None) -> int:
        """Add texts that are not there yet.

        Args:
            texts: Texts, chunks, documents or nodes, one or many.
            progress: Called with the number of texts done since the last call.

        Returns:
            How many were new.

        Raises:
            ConfigurationError: What cannot be walked through, or an item without a text.
        """
        return self._add(texts, progress, set())

    def add_ids(self, rows: Iterable[Sequence[int]]) -> int:
        """Add token sequences that came without a text, such as answers; return how many were new."""
        ids = [as_ids(row) for row in rows]
        return self._commit({ids_key(row): row for row in ids})

    def remove(self, items: Any) -> int:
        """Remove texts, chunks or keys (:func:`chunk_key`); return how many were there."""
        wanted = keys_of(items)
        with self._lock:
            segments = self.segments
            self._segments = _without(segments, lambda s: np.isin(s.keys, wanted))
            return len(_held(segments, wanted))

    def sync(
        self, texts: Any, *, progress: Callable[[int], object] | None = None
    ) -> tuple[int, int]:
        """Add what is new in ``texts`` and remove what is not among them.

        Returns:
            How many texts were added, and how many removed.
        """
        seen: set[int] = set()
        added = self._add(texts, progress, seen)
        held = {key for s in self.segments for key in s.keys[s.alive].tolist()}
        return added, self.remove(held - seen)

    def save(self, path: str | Path) -> None:
        """Write the store to ``path`` in one move; removed texts are not in the file.

        Raises:
            StorageError: The folder cannot be written to, or the disk is full.
        """
        file.write(Path(path), self.segments, self.tokenizer)

    def _add(self, texts: Any, progress: Callable[[int], object] | None, seen: set[int]) -> int:
        added, waiting = 0, 0
        pending: dict[int, Ids] = {}
        for batch in batches(texts_of(texts), _BATCH):
            keyed = {chunk_key(text): text for text in batch}
            seen.update(keyed)
            known = _held(self.segments, list(keyed)) | pending.keys()
            fresh = {key: text for key, text in keyed.items() if key not in known}
            ids = self._encode([*fresh.values()])
            pending.update(zip(fresh, ids, strict=True))
            waiting += sum(map(len, ids))
            if waiting >= _MOST_SORTED:
                added += self._commit(pending)
                pending, waiting = {}, 0
            if progress is not None:
                progress(len(batch))
        return added + self._commit(pending)

    def _commit(self, rows: dict[int, Ids]) -> int:
        """Sort ``rows`` into the store, those of one token or none left out."""
        with self._lock:
            segments = self.segments
            known = _held(segments, list(rows))
            fresh = {key: ids for key, ids in rows.items() if len(ids) > 1 and key not in known}
            for part in _portions(fresh):
                segments = _merged((*segments, Segment.build([*part.values()], [*part])))
            self._segments = self._bounded(segments)
            return len(fresh)

    def _bounded(self, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """Remove the oldest texts over the limit."""
        excess = sum(s.num_tokens for s in segments) - (self.max_tokens or 0)
        if self.max_tokens is None or excess <= 0:
            return segments

        def oldest(segment: Segment) -> Any:
            nonlocal excess
            lengths = np.where(segment.alive, segment.lengths, 0)
            dead = np.cumsum(lengths) - lengths < excess
            excess -= int(lengths[dead].sum())
            return dead

        return _without(segments, oldest)


def _held(segments: Iterable[Segment], keys: Sequence[int] | NDArray[np.uint64]) -> set[int]:
    """Return those of ``keys`` whose texts are there."""
    wanted = np.asarray(keys, np.uint64)
    return {key for s in segments for key in s.keys[s.alive & np.isin(s.keys, wanted)].tolist()}


def _portions(rows: dict[int, Ids]) -> Iterator[dict[int, Ids]]:
    """Cut ``rows`` into parts that are sorted by themselves."""
    part: dict[int, Ids] = {}
    size = 0
    for key, ids in rows.items():
        if part and size + len(ids) > _MOST_SORTED:
            yield part
            part, size = {}, 0
        part[key] = ids
        size += len(ids)
    if part:
        yield part


def _without(segments: Iterable[Segment], dead: Callable[[Segment], Any]) -> tuple[Segment, ...]:
    """Remove the chunks that ``dead`` marks; segments with many removed ones are written anew."""
    kept = []
    for segment in segments:
        left = segment.without(dead(segment))
        living = left.num_tokens
        if living:
            dense = living >= (1 - _MOST_DEAD) * int(left.lengths.sum())
            kept.append(left if dense else left.compact())
    return tuple(kept)


def _merged(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Sort the last segment together with those before it that are not much larger."""
    tail = len(segments) - 1
    size = segments[tail].num_tokens
    while tail:
        before = segments[tail - 1].num_tokens
        if before >= max(_LEAST_KEPT, _RATIO * size) or before + size > _MOST_SORTED:
            break
        size += before
        tail -= 1
    if tail == len(segments) - 1:
        return segments
    return (*segments[:tail], Segment.merge(segments[tail:]))
