"""Keys and values kept between answers, found again by their longest common token prefix.

A second question on the same documents reuses their keys and values instead of prefilling them. Entries
are buffers: a stream takes an idle one over in place, and copies from one that another stream works on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rasd_integrations.engine.kv import KVBuffer

_Ids = npt.NDArray[np.int64]
# A shorter match (a system prompt) is cheaper to prefill than an entry is to give up or copy.
_LEAST_REUSE = 16


@dataclass(eq=False, slots=True)
class _Entry:
    namespace: str
    ids: _Ids
    buffer: KVBuffer
    in_use: bool


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

    def release(self, ids: Sequence[int]) -> None:
        """Give the buffer back with the ids of its rows; the stream must not use it any more."""
        self.record(ids)
        self._cache._release(self._entry)


class PrefixCache:
    """Buffers by token prefix, least recently used first out; safe under threads."""

    def __init__(self, max_bytes: int) -> None:
        """Keep at most ``max_bytes`` of idle buffers; 0 keeps none."""
        self._max_bytes = max_bytes
        self._entries: list[_Entry] = []  # least recently used first
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, idle and at work."""
        with self._lock:
            return sum(e.buffer.nbytes for e in self._entries)

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
        with self._lock:
            entry, common = self._nearest(wanted[:-1], namespace)
            if entry is None:
                buffer = KVBuffer(capacity)
            elif entry.in_use or 2 * common < len(entry.ids):
                buffer = entry.buffer.copy(common, capacity)
            else:
                self._entries.remove(entry)
                buffer = entry.buffer
                buffer.truncate(common)
            buffer.keeps_hidden |= keeps_hidden
            mine = _Entry(namespace, wanted[: buffer.length], buffer, in_use=True)
            self._entries.append(mine)
        return Lease(self, mine)

    def clear(self) -> None:
        """Forget every idle buffer."""
        with self._lock:
            self._entries = [e for e in self._entries if e.in_use]

    def _nearest(self, ids: _Ids, namespace: str) -> tuple[_Entry | None, int]:
        best: _Entry | None = None
        length = _LEAST_REUSE - 1
        for entry in self._entries:
            if entry.namespace != namespace:
                continue
            common = _common_prefix(entry.ids, ids)
            # Of equal matches an idle entry is better: it needs no copy.
            if common > length or (common == length and best is not None and best.in_use):
                best, length = entry, common
        return best, length

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            if entry not in self._entries:
                return
            entry.in_use = False
            self._entries.remove(entry)
            self._entries = [e for e in self._entries if e.in_use or not _covers(entry, e)]
            if len(entry.ids) >= _LEAST_REUSE:
                self._entries.append(entry)
            idle = [e for e in self._entries if not e.in_use]
            size = sum(e.buffer.nbytes for e in idle)
            for old in idle:
                if size <= self._max_bytes:
                    break
                self._entries.remove(old)
                size -= old.buffer.nbytes


def _common_prefix(a: _Ids, b: _Ids) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def _covers(entry: _Entry, other: _Entry) -> bool:
    """Whether ``entry`` holds all that ``other`` holds."""
    return entry.namespace == other.namespace and _common_prefix(entry.ids, other.ids) == len(
        other.ids
    )
