"""The texts that a store returns under one filter, read in the background."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Hashable, Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.datastores.tokens.encoding import Ids, chunk_key
from rasd_integrations.datastores.tokens.quiet import Quiet
from rasd_integrations.datastores.tokens.shard import Keys, Shard
from rasd_integrations.datastores.tokens.store import TokenStore
from rasd_integrations.errors import RetrievalError, StorageError
from rasd_integrations.process import Bell, at_work, check_not_ending, locked
from rasd_integrations.retrieval.base import ReadableSource
from rasd_integrations.storage.marked import adding_to

logger = logging.getLogger(__name__)

MOST_TOKENS = 5_000_000
_MOST_CHUNKS = 50_000
_ROOM = 0.9  # of the tokens, after making room
_PIECE, _SMALL_PIECE = 64, 16  # chunks that are read at once; while answers run
FILES = threading.Lock()  # held while a file of token ids is written
_CHEAP_S = 0.003  # of listing the keys: beside answers too
_LATE_S = 10.0  # a check waits so long at most for a time without answers
_REST_S = 1.0  # between two pieces of reading beside answers
_LOOK_S = 0.03  # shorter than what a chain does between two answers
_PAUSE_S = 0.1  # an answer's first pause before it has more texts read again
_LONG = 4  # tokens of a match that is worth reading a text again
_HELD_S = 1.0  # a call of the store that takes longer does not hold up the end of the process


class Collection:
    """The texts of a store as token ids, drafted from only while the store is known to hold them.

    Each answer asks for a check. A thread of the collection's own compares the keys of the store's chunks with what was
    read, removes what is gone, and then reads what is new, the newest first. An answer drafts from the texts once a
    check that began after it is done. Where listing the keys would hold up answers it waits until none runs; an answer
    then drafts from the texts that it wanted and that were read again since it began. A store that fails or hangs
    costs drafts only.
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
        self._held: dict[int, set[Hashable]] = {}  # keys of the store, by key of the text
        self._forgotten: set[int] = set()  # keys of texts that may not be read again
        self._asked = self._checked = 0
        self._wanted: list[int] = []  # keys of texts that a running answer would draft from
        # By key of a text, the last check that had been asked for when it was read.
        self._sure: dict[int, int] = {}
        self._bell = Bell()
        self._unread: Iterator[Hashable] = iter(())
        self._is_unread = False
        self._rest = 0.0  # when more is read beside answers
        self._list_s = math.inf  # what listing the keys took
        self._late = 0.0  # when a check is done beside answers
        self._is_working = self._is_full = self._said = False
        self._opened = self._unsaved = False

    def view(self) -> View:
        """Ask for a check; return what one answer may draft from."""
        return View(self, self._ask())

    @locked
    def _ask(self) -> int:
        if self._asked == self._checked:
            self._late = time.monotonic() + _LATE_S
        self._asked += 1
        self._start()
        return self._asked

    def _start(self) -> None:
        if self._is_working:
            self._bell.ring()
            return
        thread = threading.Thread(target=self._work, name="rasd-collection", daemon=True)
        self._is_working = True
        try:
            thread.start()
        except RuntimeError:  # no thread: the process ends, or has too many
            self._is_working = False
        except BaseException:  # Ctrl-C, before or after it started
            self._is_working = thread.is_alive()
            raise

    @locked
    def want(self, texts: list[int]) -> None:
        """Have the texts of these keys read again, unless others are already wanted."""
        if not self._wanted:
            self._wanted = texts
            self._start()

    def is_checked(self, number: int) -> bool:
        """Return True if the check of that number is done."""
        return self._checked >= number

    def is_sure(self, text: int, number: int) -> bool:
        """Return True if a text was read again since the check of that number was asked for."""
        return self._sure.get(text, 0) >= number

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
                if self._wanted:
                    self._read_wanted()
                elif self._asked > self._checked and self._may_check():
                    self._check()
                elif self._is_unread and (self._quiet.is_quiet or time.monotonic() > self._rest):
                    self._read()
                else:
                    self._bell.wait(_LOOK_S)
        except Exception as error:  # noqa: BLE001 - a store may raise anything
            self._report(f"{type(error).__name__}: {error}")
            # Only here: after a normal end another thread may be at work already.
            self._is_working = False

    @locked
    def _goes_on(self) -> bool:
        """Return if there is work; the thread ends otherwise."""
        self._is_working = bool(self._wanted) or self._is_unread or self._asked > self._checked
        return self._is_working

    def _may_check(self) -> bool:
        """Return True if listing the keys would hold up no answer, or has waited long enough."""
        is_late = time.monotonic() > self._late
        return self._list_s <= _CHEAP_S or self._quiet.is_quiet or is_late

    def _check(self) -> None:
        with at_work(_HELD_S):
            asked, start = self._asked, time.monotonic()
            self._unread = iter(self._compare())
            self._list_s = time.monotonic() - start
            if not self._is_unread:
                self._rest = time.monotonic() + _REST_S
            self._is_unread, self._checked = True, asked
            self._sure.clear()

    def _read_wanted(self) -> None:
        """Read texts again that an answer would draft from; remove those that changed."""
        asked, wanted, self._wanted = self._asked, self._wanted, []
        check_not_ending()
        with at_work(_HELD_S):
            keys = [key for text in wanted for key in self._held.get(text, ())]
            found = self.source.read(keys, filter=self._filter)
            same = [key for key in keys if chunk_key(found.get(key, "")) == self._texts[key]]
            self._drop({*keys} - {*same})
            self._sure |= {self._texts[key]: asked for key in same}

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
            self._held[text].remove(key)
            if not self._held[text]:
                del self._held[text]
                gone.append(text)
        if gone:
            self.store.remove(gone)

    def _read(self) -> None:
        """Read a few texts; keep what was read once there are no more, or no room."""
        size = _PIECE if self._quiet.is_quiet else _SMALL_PIECE
        self._rest = time.monotonic() + _REST_S
        self._is_full = self.store.num_tokens >= MOST_TOKENS
        part = [] if self._is_full else [*islice(self._unread, size)]
        if not part:
            self._known = {}  # what is left of it is not in the store any more
            self._is_unread = False
            self._save()
            return
        check_not_ending()
        with at_work(_HELD_S):
            asked = self._asked
            found = self.source.read(part, filter=self._filter)
            known = {key: chunk_key(text) for key, text in found.items()}
            wanted = {known[k]: t for k, t in found.items() if known[k] not in self._forgotten}
            self.store.add_encoded({k: self._known.pop(k) for k in wanted if k in self._known})
            self.store.add([t for k, t in wanted.items() if k not in self.store])
            if forgotten := self._forgotten & wanted.keys():  # meanwhile
                self.store.remove(forgotten)
            self._sure |= dict.fromkeys(wanted, asked)
            self._unsaved = True
            for key in part:  # also of what was gone meanwhile or holds no text, so that it is not asked for again
                text = known.get(key, 0)
                self._texts[key] = text
                self._held.setdefault(text, set()).add(key)

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


class View:
    """What one answer may draft from."""

    def __init__(self, collection: Collection, number: int) -> None:
        """Made by :meth:`Collection.view` with the number of the answer's check."""
        self._collection, self._number = collection, number
        self._is_checked = False
        self._next, self._pause = 0.0, _PAUSE_S

    def shards(self) -> tuple[Shard, ...]:
        """Return the texts; :meth:`may` says which of them may be drafted from."""
        # In this order: texts that were there before the check are not all known to be held.
        self._is_checked = self._collection.is_checked(self._number)
        return self._collection.store.shards

    def may(self, length: int, texts: Keys) -> NDArray[np.bool_]:
        """Return which texts the store is known to hold; have some others that match ``length`` tokens read again."""
        collection, number = self._collection, self._number
        if self._is_checked:
            return np.ones(len(texts), np.bool_)
        sure = [collection.is_sure(text, number) for text in texts.tolist()]
        if length >= _LONG and not all(sure) and (now := time.monotonic()) >= self._next:
            # Fewer and fewer, so that a long answer is not held up more than a short one.
            self._next, self._pause = now + self._pause, 2 * self._pause
            unsure = [text for text, known in zip(texts.tolist(), sure, strict=True) if not known]
            collection.want([*dict.fromkeys(unsure)][:_SMALL_PIECE])
        return np.array(sure, np.bool_)
