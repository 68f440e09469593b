"""Keys and values kept between answers, found again by their longest common token prefix.

A second question on the same documents reuses their keys and values instead of prefilling them. Entries
are buffers: a stream takes an idle one over in place, and copies from one that another stream works on.
What files hold of earlier processes is read where it is longer than what memory holds.

An entry at work is known by its lease, weakly: where an interrupt comes before the release, it goes with the
answer's frames instead of staying for ever.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_files import LEAST_REUSE, PrefixFiles, common_prefix
from rasd_integrations.engine.kv.prefix_format import Ids
from rasd_integrations.process import locked


@dataclass(eq=False, slots=True)
class _Entry:
    namespace: str
    ids: Ids
    buffer: KVBuffer
    state: Hashable  # of the weights that computed the rows
    lease: weakref.ref[Lease] | None = None

    @property
    def in_use(self) -> bool:
        return self.lease is not None

    @property
    def is_lost(self) -> bool:
        """Whether its stream has ended without a release."""
        return self.lease is not None and self.lease() is None


class Lease:
    """A buffer at work in one stream, and its place in the cache.

    Attributes:
        buffer: The stream's own; its first :attr:`reused` rows were found in the cache.
        reused: Tokens that need no prefill.
    """

    def __init__(self, cache: PrefixCache, entry: _Entry) -> None:
        """Made by :meth:`PrefixCache.lease`."""
        self._cache = cache
        self._entry = entry
        self.buffer = entry.buffer
        self.reused = entry.buffer.length

    def record(self, ids: Sequence[int]) -> None:
        """Tell the cache what the buffer holds by now, so that other streams may copy it."""
        self._entry.ids = np.asarray(ids[: self.buffer.length], dtype=np.int64)

    def cut(self, rows: int) -> None:
        """Forget what the buffer holds behind the first ``rows``."""
        self.buffer.truncate(rows)
        self.reused = min(self.reused, self.buffer.length)
        self._entry.ids = self._entry.ids[: self.buffer.length]

    def save(self, ids: Sequence[int]) -> None:
        """Write the rows of ``ids`` to the cache's folder, if it has one; returns once they are there."""
        self._cache._save(self._entry, np.asarray(ids[: self.buffer.length], dtype=np.int64))

    def release(self, ids: Sequence[int]) -> None:
        """Give the buffer back with the ids of its rows; the stream must not use it any more."""
        self.record(ids)
        self._cache._release(self._entry)


class PrefixCache:
    """Buffers by token prefix, least recently used first out; safe under threads."""

    def __init__(
        self,
        max_bytes: int,
        files: PrefixFiles | None = None,
        weights_state: Callable[[], Hashable] = lambda: None,
    ) -> None:
        """Keep nothing yet.

        Args:
            max_bytes: Most bytes of idle buffers; 0 keeps none.
            files: Looked through, too.
            weights_state: Asked once an answer; rows that were computed in another state are forgotten.
        """
        self._max_bytes = max_bytes
        self._files = files
        self._weights_state = weights_state
        self._entries: list[_Entry] = []  # least recently used first
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, idle and at work."""
        return sum(e.buffer.nbytes for e in tuple(self._entries))

    def __len__(self) -> int:
        """Return the number of buffers, idle and at work."""
        return len(self._entries)

    def lease(
        self,
        ids: Sequence[int],
        capacity: int,
        namespace: str = "",
        *,
        keeps_hidden: bool = False,
    ) -> Lease:
        """Return a buffer that already holds the longest known prefix of ``ids``.

        At least one token is left to run, whose logits start the answer.

        Args:
            ids: The prompt.
            capacity: Tokens that the stream may come to hold.
            namespace: Only entries of the same namespace are seen.
            keeps_hidden: Keep the final hidden states of what is run from now on.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        state = self._weights_state()
        self._forget_others(state)
        buffer = self._from_files(wanted[:-1], namespace, capacity, keeps_hidden=keeps_hidden)
        return self._leased(wanted, capacity, namespace, state, buffer, keeps_hidden=keeps_hidden)

    @locked
    def _forget_others(self, state: Hashable) -> None:
        """Forget what weights in another state computed, and what was never released."""
        self._entries = [e for e in self._entries if e.state == state and not e.is_lost]

    @locked
    def _leased(
        self,
        wanted: Ids,
        capacity: int,
        namespace: str,
        state: Hashable,
        buffer: KVBuffer | None,
        *,
        keeps_hidden: bool,
    ) -> Lease:
        """Return a lease of ``buffer``, or of what memory holds."""
        if buffer is None:
            buffer = self._from_memory(wanted[:-1], namespace, capacity)
        buffer.keeps_hidden |= keeps_hidden
        mine = _Entry(namespace, wanted[: buffer.length], buffer, state)
        lease = Lease(self, mine)
        mine.lease = weakref.ref(lease)
        self._entries.append(mine)
        return lease

    @locked
    def clear(self) -> None:
        """Forget every buffer; streams go on with theirs, which are not kept afterwards."""
        self._entries = []

    def _from_files(
        self, ids: Ids, namespace: str, capacity: int, *, keeps_hidden: bool
    ) -> KVBuffer | None:
        """Return what a file holds beyond memory; others lease and release meanwhile."""
        if self._files is None:
            return None
        entry, common = self._nearest(ids, namespace)
        here = 0 if entry is None else common
        return self._files.load(ids, namespace, capacity, beyond=here, keeps_hidden=keeps_hidden)

    def _from_memory(self, ids: Ids, namespace: str, capacity: int) -> KVBuffer:
        entry, common = self._nearest(ids, namespace)
        if entry is None:
            return KVBuffer(capacity)
        if entry.in_use or 2 * common < len(entry.ids):
            return entry.buffer.copy(common, capacity)
        self._entries.remove(entry)
        entry.buffer.truncate(common)
        return entry.buffer

    def _save(self, entry: _Entry, ids: Ids) -> None:
        if self._files is not None and entry.state == self._weights_state():
            self._files.save(ids, entry.namespace, entry.buffer)

    def _nearest(self, ids: Ids, namespace: str) -> tuple[_Entry | None, int]:
        best: _Entry | None = None
        length = LEAST_REUSE - 1
        for entry in tuple(self._entries):
            if entry.namespace != namespace:
                continue
            common = common_prefix(entry.ids, ids)
            # Of equal matches an idle entry is better: it needs no copy.
            if common > length or (common == length and best is not None and best.in_use):
                best, length = entry, common
        return best, length

    @locked
    def _release(self, entry: _Entry) -> None:
        if entry not in self._entries:
            return
        self._entries.remove(entry)
        entry.lease = None
        self._entries = [e for e in self._entries if e.in_use or not _covers(entry, e)]
        if len(entry.ids) >= LEAST_REUSE:
            self._entries.append(entry)
        idle = [e for e in self._entries if not e.in_use]
        size = sum(e.buffer.nbytes for e in idle)
        for old in idle:
            if size <= self._max_bytes:
                break
            self._entries.remove(old)
            size -= old.buffer.nbytes


def _covers(entry: _Entry, other: _Entry) -> bool:
    """Whether ``entry`` holds all that ``other`` holds."""
    return entry.namespace == other.namespace and common_prefix(entry.ids, other.ids) == len(
        other.ids
    )
