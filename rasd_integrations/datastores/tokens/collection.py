"""The texts that a store returns under one filter, read in the background."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Hashable, Iterable
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from rasd_integrations.datastores.tokens.encoding import Ids, chunk_key
from rasd_integrations.datastores.tokens.quiet import Quiet
from rasd_integrations.datastores.tokens.shard import Shard
from rasd_integrations.datastores.tokens.store import TokenStore
from rasd_integrations.errors import RetrievalError, StorageError
from rasd_integrations.process import at_work, check_not_ending, locked
from rasd_integrations.retrieval.base import ReadableSource
from rasd_integrations.storage.marked import adding_to

logger = logging.getLogger(__name__)

MOST_TOKENS = 5_000_000
_MOST_CHUNKS = 50_000
_ROOM = 0.9  # of the tokens, after making room
_PIECE, _SMALL_PIECE = 64, 16  # chunks that are read at once; while answers run
FILES = threading.Lock()  # held while a file of token ids is written
_HELD_S = 1.0  # a call of the store that takes longer does not hold up the end of the process


class Collection:
    """The texts of a store as token ids, drafted from only while the store is known to hold them.

    Each answer asks for a check. A thread of the collection's own compares the keys of the store's chunks with what was
    read, removes what is gone, and then reads what is new, the newest first. An answer drafts from the texts once a
    check that began after it is done. A store that fails or hangs costs drafts only.
    """

    def __init__(
        self,
        source: ReadableSource,
        filter: Any,
        encode: Any,
        quiet: Quiet,
        keep: tuple[Path, str] | None = None,
    ) -> None:
        """Read nothing before the first check.

        Args:
            source: The store.
            filter: Of its searches.
            encode: As for :class:`TokenStore`.
            quiet: Counts the running answers.
            keep: A file for the token ids, so that a later process need not encode the texts again, and the name of
                the tokenizer's model.
        """
        self.source = source
        self.store = TokenStore(encode)
        self._encode = encode
        self._keep = keep
        self._known: dict[int, Ids] = {}  # ids that an earlier process kept, by key of the text
        self._filter = filter
        self._quiet = quiet
        self._lock = threading.Lock()
        self._texts: dict[Hashable, int] = {}  # key of the store: key of its text
        self._held: Counter[int] = Counter()  # chunks with a text
        self._forgotten: set[int] = set()  # keys of texts that may not be read again
        self._asked = self._checked = 0
        self._is_working = self._is_full = self._said = False
        self._opened = self._unsaved = False

    @locked
    def check(self) -> int:
        """Ask for a check; return its number."""
        self._asked += 1
        if not self._is_working:
            thread = threading.Thread(target=self._work, name="rasd-collection", daemon=True)
            self._is_working = True
            try:
                thread.start()
            except RuntimeError:  # no thread: the process ends, or has too many
                self._is_working = False
            except BaseException:  # Ctrl-C, before or after it started
                self._is_working = thread.is_alive()
                raise
        return self._asked

    def shards(self, number: int) -> tuple[Shard, ...]:
        """Return the texts, once the check of that number is done; until then none."""
        return self.store.shards if self._checked >= number else ()

    def forget(self, text: str | None = None) -> None:
        """Remove a text and do not read it again, or keep nothing any more; called under :data:`FILES`."""
        if text is None:
            self._keep = None
        else:
            key = chunk_key(text)
            self._forgotten.add(key)
            self.store.remove([key])

    def _work(self) -> None:
        try:
            self._open()
            while self._goes_on():
                with at_work(_HELD_S):
                    asked = self._asked
                    unread = self._compare()
                    self._checked = asked
                self._read(unread)
        except Exception as error:  # noqa: BLE001 - a store may raise anything
            self._report(f"{type(error).__name__}: {error}")
            # Only here: after a normal end another thread may be at work already.
            self._is_working = False

    @locked
    def _goes_on(self) -> bool:
        """Return if a check was asked for since the last one; the thread ends otherwise."""
        self._is_working = self._asked > self._checked
        return self._is_working

    def _compare(self) -> list[Hashable]:
        """Remove what the store does not hold any more; return the keys that are new, the newest first."""
        keys = dict.fromkeys(self.source.keys(_MOST_CHUNKS, filter=self._filter))
        self._drop([key for key in self._texts if key not in keys])
        if len(keys) >= _MOST_CHUNKS:
            self._report(f"only its newest {_MOST_CHUNKS:,} chunks are drafted from")
        if not self._is_full:
            return [key for key in reversed(keys) if key not in self._texts]
        # Older ones do not fit; for newer ones the oldest make room.
        held = [key for key in keys if key in self._texts]
        newer = [*takewhile(lambda key: key != held[0], reversed(keys))] if held else [*keys]
        unread = [key for key in newer if key not in self._texts]
        for key in held if unread else ():
            if self.store.num_tokens <= _ROOM * MOST_TOKENS:
                break
            self._drop([key])
        return unread

    def _drop(self, keys: Iterable[Hashable]) -> None:
        gone = []
        for key in keys:
            text = self._texts.pop(key)
            self._held[text] -= 1
            if not self._held[text]:
                del self._held[text]
                gone.append(text)
        if gone:
            self.store.remove(gone)

    def _read(self, unread: Iterable[Hashable]) -> None:
        """Read texts until the store is full or another check was asked for."""
        left = iter(unread)
        while self._asked == self._checked:
            self._is_full = self.store.num_tokens >= MOST_TOKENS
            if not self._is_full:
                self._quiet.wait()
            size = _PIECE if self._quiet.is_quiet else _SMALL_PIECE
            part = [] if self._is_full else [*islice(left, size)]
            if not part:
                self._known = {}  # what is left of it is not in the store any more
                self._save()
                return
            check_not_ending()
            with at_work(_HELD_S):
                found = self.source.read(part, filter=self._filter)
                known = {key: chunk_key(text) for key, text in found.items()}
                wanted = {known[k]: t for k, t in found.items() if known[k] not in self._forgotten}
                self.store.add_encoded({k: self._known.pop(k) for k in wanted if k in self._known})
                self.store.add([t for k, t in wanted.items() if k not in self.store])
                if forgotten := self._forgotten & wanted.keys():  # meanwhile
                    self.store.remove(forgotten)
                self._unsaved = True
                for key in part:  # also of what was gone meanwhile or holds no text, so that it is not asked for again
                    text = known.get(key, 0)
                    self._texts[key] = text
                    self._held[text] += 1

    def _open(self) -> None:
        if self._keep is None or self._opened:
            return
        self._opened = True
        path, _ = self._keep
        with contextlib.suppress(RetrievalError):  # none yet, damaged, or of another tokenizer
            self._known = dict(TokenStore.open(path, self._encode).rows())

    def _save(self) -> None:
        with FILES:
            if self._keep is None or not self._unsaved:
                return
            self._unsaved = False
            path, model = self._keep
            try:
                with adding_to(path.parent, "memory", model):
                    self.store.save(path)
            except StorageError as error:
                self._report(f"not kept for later processes: {error}")

    def _report(self, what: str) -> None:
        if not self._said:
            self._said = True
            name = type(self.source).__name__
            logger.warning(
                "Drafts from the collection of %s: %s", name, " ".join(what.split())[:300]
            )
