"""A concurrent store of token sequences, searched by context."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from rasd_integrations.config import check_value
from rasd_integrations.datastores.tokens import file
from rasd_integrations.datastores.tokens.encoding import (
    Encoder,
    Ids,
    as_ids,
    chunk_key,
    ids_key,
    keys_of,
    portions,
    texts_of,
)
from rasd_integrations.datastores.tokens.shard import Shard

_BATCH = 256  # texts encoded at once
_MOST_SORTED = 1 << 24  # tokens of a shard: 64 MB of English, sorted in about 600 MB of memory
_LEAST_KEPT = 1 << 13  # a smaller shard is always merged with the next one
_RATIO = 4  # a larger shard is at least this many times the size of the next
_MOST_DEAD = 0.25  # a shard with a larger share of removed tokens is compacted


class TokenStore:
    """Texts as token ids, searched for the continuations of a context.

    Texts are identified by content: one that is present is not stored again, and is removed by its text or key.
    New texts form a sorted shard, which is merged with older ones of similar size: added 100 at a time, texts
    take about a microsecond a token besides encoding, at any size of the store. No match spans two texts.

    Thread-safe: readers take the current shards, which are immutable. Changes run in the caller's thread, under
    a lock that readers do not take.

    Attributes:
        tokenizer: Fingerprint of the tokenizer that the ids belong to.
        max_tokens: Most tokens kept; the oldest texts are evicted first. ``None`` is no limit.
    """

    def __init__(self, encode: Any, *, max_tokens: int | None = None) -> None:
        """Create an empty store.

        Args:
            encode: The target's tokenizer, or a function from a text to its ids, such as ``RASD.encode``.
            max_tokens: See :attr:`max_tokens`.

        Raises:
            ConfigurationError: ``encode`` is neither, or ``max_tokens`` is not positive.
        """
        limit = "at least 1, or None for no limit"
        check_value(max_tokens is None or max_tokens >= 1, "max_tokens", max_tokens, limit)
        self._encode = Encoder(encode)
        self._lock = threading.Lock()
        self._shards: tuple[Shard, ...] = ()
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
        """Create a store of ``texts``, as the constructor and :meth:`add` do."""
        store = cls(encode, max_tokens=max_tokens)
        store.add(texts, progress=progress)
        return store

    @classmethod
    def open(
        cls, path: str | Path, encode: Any, *, max_tokens: int | None = None, verify: bool = True
    ) -> Self:
        """Map a saved store into memory; changes stay in memory until :meth:`save`.

        Args:
            path: Where it was saved.
            encode: The tokenizer that the store was built with.
            max_tokens: As in the constructor.
            verify: Read the whole file once and compare its checksums.

        Raises:
            RetrievalError: There is no such file, it is damaged, or of another tokenizer.
        """
        store = cls(encode, max_tokens=max_tokens)
        shards = file.read(Path(path), store.tokenizer, verify=verify)
        store._shards = store._bounded(shards)
        return store

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The current, immutable shards.

        Raises:
            RetrievalError: The mapped file was changed in place.
        """
        shards = self._shards
        for shard in shards:
            if shard.origin is not None:
                shard.origin.check()
        return shards

    @property
    def num_tokens(self) -> int:
        """Tokens that can be found."""
        return sum(shard.num_tokens for shard in self.shards)

    def __len__(self) -> int:
        """Return the number of texts."""
        return sum(int(shard.alive.sum()) for shard in self.shards)

    def __contains__(self, text: object) -> bool:
        """Return True if a text, chunk or key is present."""
        return bool(_held(self.shards, keys_of(text)))

    def rows(self) -> Iterator[tuple[int, Ids]]:
        """Yield key and ids of each text, the oldest first."""
        for shard in self.shards:
            yield from shard.rows()

    def add(self, texts: Any, *, progress: Callable[[int], object] | None = None) -> int:
        """Add texts that are not present yet; return the number of new ones.

        Args:
            texts: Texts, chunks, documents or nodes, one or many.
            progress: Called with the number of texts done since the last call.

        Raises:
            ConfigurationError: ``texts`` is not iterable, or an item has no text.
        """
        return self._add(texts, progress, set())

    def add_encoded(self, rows: Mapping[int, Ids]) -> int:
        """Add texts whose ids are known, by key (:func:`chunk_key`); return the number of new ones."""
        return self._commit(rows)

    def add_ids(self, rows: Iterable[Sequence[int] | Ids]) -> int:
        """Add token sequences without a text, such as answers; return the number of new ones."""
        ids = [as_ids(row) for row in rows]
        return self._commit({ids_key(row): row for row in ids})

    def remove(self, items: Any) -> int:
        """Remove texts, chunks or keys (:func:`chunk_key`); return the number removed."""
        wanted = keys_of(items)
        with self._lock:
            shards = self.shards
            self._shards = _without(shards, lambda s: np.isin(s.keys, wanted))
            return len(_held(shards, wanted))

    def sync(
        self, texts: Any, *, progress: Callable[[int], object] | None = None
    ) -> tuple[int, int]:
        """Make the store hold exactly ``texts``; return how many were added, and how many removed."""
        seen: set[int] = set()
        added = self._add(texts, progress, seen)
        held = {key for s in self.shards for key in s.keys[s.alive].tolist()}
        return added, self.remove(held - seen)

    def save(self, path: str | Path) -> None:
        """Write the store to ``path`` atomically; removed texts are not in the file.

        Raises:
            StorageError: The folder cannot be written to, or the disk is full.
        """
        file.write(Path(path), self.shards, self.tokenizer)

    def _add(self, texts: Any, progress: Callable[[int], object] | None, seen: set[int]) -> int:
        added, waiting = 0, 0
        pending: dict[int, Ids] = {}
        for batch in portions(texts_of(texts), _BATCH):
            keyed = {chunk_key(text): text for text in batch}
            seen.update(keyed)
            known = _held(self.shards, list(keyed)) | pending.keys()
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

    def _commit(self, rows: Mapping[int, Ids]) -> int:
        """Add ``rows`` (ids by key) of two tokens or more that are not present."""
        with self._lock:
            shards = self.shards
            known = _held(shards, list(rows))
            fresh = {key: ids for key, ids in rows.items() if len(ids) > 1 and key not in known}
            for part in portions(fresh.items(), _MOST_SORTED, lambda item: len(item[1])):
                keys, ids = zip(*part, strict=True)
                shards = _merged((*shards, Shard.build(ids, keys)))
            self._shards = self._bounded(shards)
            return len(fresh)

    def _bounded(self, shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
        """Remove the oldest texts until the rest fits ``max_tokens``."""
        excess = sum(s.num_tokens for s in shards) - (self.max_tokens or 0)
        if self.max_tokens is None or excess <= 0:
            return shards

        def oldest(shard: Shard) -> Any:
            nonlocal excess
            lengths = np.where(shard.alive, shard.lengths, 0)
            dead = np.cumsum(lengths) - lengths < excess
            excess -= int(lengths[dead].sum())
            return dead

        return _without(shards, oldest)


def _held(shards: Iterable[Shard], keys: Sequence[int] | NDArray[np.uint64]) -> set[int]:
    """Return those of ``keys`` whose texts are present."""
    wanted = np.asarray(keys, np.uint64)
    return {key for s in shards for key in s.keys[s.alive & np.isin(s.keys, wanted)].tolist()}


def _without(shards: Iterable[Shard], dead: Callable[[Shard], Any]) -> tuple[Shard, ...]:
    """Remove the chunks that ``dead`` marks; shards with many removed ones are compacted."""
    kept = []
    for shard in shards:
        left = shard.without(dead(shard))
        living = left.num_tokens
        if living:
            dense = living >= (1 - _MOST_DEAD) * int(left.lengths.sum())
            kept.append(left if dense else left.compact())
    return tuple(kept)


def _merged(shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
    """Merge the last shard with those before it that are not much larger."""
    tail = len(shards) - 1
    size = shards[tail].num_tokens
    while tail:
        before = shards[tail - 1].num_tokens
        if before >= max(_LEAST_KEPT, _RATIO * size) or before + size > _MOST_SORTED:
            break
        size += before
        tail -= 1
    if tail == len(shards) - 1:
        return shards
    return (*shards[:tail], Shard.merge(shards[tail:]))
