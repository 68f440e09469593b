"""The answers given before, as token ids."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from rasd_integrations.datastores.tokens.answer_log import AnswerLog
from rasd_integrations.datastores.tokens.encoding import as_ids, ids_key
from rasd_integrations.datastores.tokens.shard import MAX_MATCH, found_in
from rasd_integrations.datastores.tokens.store import TokenStore
from rasd_integrations.process import locked

_LEAST_USE = 8  # tokens in a row that a later answer shares with one that was useful to it
_KEPT = 0.9  # of the limit, after an eviction


class Answers:
    """Answers of one namespace; of more than ``max_tokens`` the least recently useful are evicted.

    An answer is useful when it is given, and when a later one repeats eight of its tokens. Each is kept with the last
    tokens of its prompt, from which its own first tokens are drafted.
    """

    def __init__(self, encode: Any, max_tokens: int, log: AnswerLog | None = None) -> None:
        """Read the log's; ``encode`` as for :class:`TokenStore`."""
        self.store = TokenStore(encode)
        self.max_tokens = max_tokens
        self._log = log
        self._lock = threading.RLock()
        # Tokens by key, the most recently useful last.
        self._sizes: OrderedDict[int, int] = OrderedDict()
        rows = [] if log is None else log.read()
        self.store.add_ids(rows)
        self._sizes.update((ids_key(row), len(row)) for row in rows)
        self._evict()

    @locked
    def add(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> None:
        """Add a finished answer."""
        self._note_use(answer_ids)
        row = as_ids([*prompt_ids[-MAX_MATCH:], *answer_ids])
        key = ids_key(row)
        if len(row) < 2:  # nothing follows a single token
            return
        if key not in self._sizes:
            self.store.add_ids([row])
            if self._log is not None:
                self._log.append(row)
        self._sizes[key] = len(row)
        self._sizes.move_to_end(key)
        self._evict()

    @locked
    def remove(self, keys: Sequence[int]) -> None:
        """Remove answers by their keys."""
        for key in keys:
            self._sizes.pop(key, None)
        self.store.remove(keys)
        if self._log is not None and keys:
            self._log.remove({*keys})

    def _note_use(self, answer_ids: Sequence[int]) -> None:
        shards = self.store.shards
        for end in range(_LEAST_USE, len(answer_ids) + 1, _LEAST_USE):
            key = found_in(shards, answer_ids[:end], _LEAST_USE)
            if key is not None and key in self._sizes:
                self._sizes.move_to_end(key)

    def _evict(self) -> None:
        total = sum(self._sizes.values())
        if total <= self.max_tokens:
            return
        gone: list[int] = []
        while total > _KEPT * self.max_tokens and len(self._sizes) > 1:
            key, size = self._sizes.popitem(last=False)
            gone.append(key)
            total -= size
        self.remove(gone)
