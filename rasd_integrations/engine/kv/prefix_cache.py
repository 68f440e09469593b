"""Keys and values kept between answers, found by longest common token prefix.

A second question on the same documents reuses their keys and values instead of prefilling them. A stream takes over
an idle entry's buffer in place, and copies from one that another stream uses. Files of earlier processes are read if
they hold more than memory.

An entry in use refers to its lease weakly: if an interrupt prevents the release, it goes with the answer's frames.
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
    state: Hashable  # of the weights that computed the buffer
    lease: weakref.ref[Lease] | None = None

    @property
    def in_use(self) -> bool:
        return self.lease is not None

    @property
    def is_lost(self) -> bool:
        """True if its stream ended without a release."""
        return self.lease is not None and self.lease() is None


class Lease:
    """A cache entry in use by one stream.

    Attributes:
        buffer: Its first :attr:`reused` tokens were found in the cache.
        reused: Tokens that need no prefill.
    """

    def __init__(self, cache: PrefixCache, entry: _Entry) -> None:
        """Use :meth:`PrefixCache.lease`."""
        self._cache = cache
        self._entry = entry
        self.buffer = entry.buffer
        self.reused = entry.buffer.length

    def record(self, ids: Sequence[int]) -> None:
        """Publish the tokens in the buffer, so that other streams can reuse its prefix."""
        self._entry.ids = np.asarray(ids[: self.buffer.length], dtype=np.int64)

    def cut(self, length: int) -> None:
        """Keep only the first ``length`` tokens."""
        self.buffer.truncate(length)
        self.reused = min(self.reused, self.buffer.length)
        self._entry.ids = self._entry.ids[: self.buffer.length]

    def save(self, ids: Sequence[int]) -> None:
        """Write the prefix ``ids`` to the cache's folder, if it has one."""
        self._cache._save(self._entry, np.asarray(ids[: self.buffer.length], dtype=np.int64))

    def release(self, ids: Sequence[int]) -> None:
        """Return the buffer, which holds ``ids``, to the cache; the stream must not use it any more."""
        self.record(ids)
        self._cache._release(self._entry)


class PrefixCache:
    """Buffers by token prefix, evicted least recently used first; thread-safe."""

    def __init__(
        self,
        max_bytes: int,
        files: PrefixFiles | None = None,
        weights_state: Callable[[], Hashable] = lambda: None,
    ) -> None:
        """Create an empty cache.

        Args:
            max_bytes: Limit of idle buffers.
            files: Searched, too.
            weights_state: Called once an answer; entries of another state are dropped.
        """
        self._max_bytes = max_bytes
        self._files = files
        self._weights_state = weights_state
        self._entries: list[_Entry] = []  # least recently used first
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, idle and in use."""
        return sum(e.buffer.nbytes for e in tuple(self._entries))

    def __len__(self) -> int:
        """Return the number of buffers, idle and in use."""
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

        At least one token is left to run: its logits start the answer.

        Args:
            ids: The prompt.
            capacity: Tokens to plan for.
            namespace: Only entries of the same namespace are searched.
            keeps_hidden: Keep the final hidden states of what is run from now on.
        """
        wanted = np.asarray(ids, dtype=np.int64)[:-1]
        state = self._weights_state()
        self._drop_stale(state)
        buffer = None
        if self._files is not None:  # read without the lock
            _, here = self._nearest(wanted, namespace)
            buffer = self._files.load(
                wanted, namespace, capacity, beyond=here, keeps_hidden=keeps_hidden
            )
        return self._leased(wanted, capacity, namespace, state, buffer, keeps_hidden=keeps_hidden)

    @locked
    def _drop_stale(self, state: Hashable) -> None:
        """Drop entries of weights in another state, and those never released."""
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
            buffer = self._from_memory(wanted, namespace, capacity)
        buffer.keeps_hidden |= keeps_hidden
        mine = _Entry(namespace, wanted[: buffer.length], buffer, state)
        lease = Lease(self, mine)
        mine.lease = weakref.ref(lease)
        self._entries.append(mine)
        return lease

    @locked
    def clear(self) -> None:
        """Drop all entries; streams go on with theirs, which are not kept afterwards."""
        self._entries = []

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
        """Return the entry with the longest common prefix worth reusing, and its length; else None and 0."""
        best: _Entry | None = None
        length = LEAST_REUSE - 1
        for entry in tuple(self._entries):
            if entry.namespace != namespace:
                continue
            common = entry.buffer.reusable(common_prefix(entry.ids, ids))
            # Of equal matches an idle entry is better: it needs no copy.
            if common > length or (common == length and best is not None and best.in_use):
                best, length = entry, common
        return best, 0 if best is None else length

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
    """Return True if ``entry`` holds all that ``other`` holds, and texts may go on from where ``other`` ends."""
    if entry.namespace != other.namespace:
        return False
    whole = len(other.ids)
    return common_prefix(entry.ids, other.ids) == whole == entry.buffer.reusable(whole)
