"""What the answers of one model are drafted from, by namespace."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from rasd_integrations.datastores.tokens.answer_log import AnswerLog
from rasd_integrations.datastores.tokens.answers import Answers
from rasd_integrations.datastores.tokens.collection import FILES, Collection, View
from rasd_integrations.datastores.tokens.encoding import Ids, chunk_key, tokenizer_fingerprint
from rasd_integrations.datastores.tokens.quiet import Quiet
from rasd_integrations.datastores.tokens.store import TokenStore
from rasd_integrations.errors import RetrievalError, StorageError
from rasd_integrations.process import locked
from rasd_integrations.retrieval.base import ReadableSource
from rasd_integrations.storage.cache_folder import cache_folder, title_of

logger = logging.getLogger(__name__)

_MOST_ANSWER_TOKENS = 1_000_000
# Of a model, the last used.
_MOST_NAMESPACES = 64
_MOST_COLLECTIONS = 8
_SUFFIX = ".rasd-memory"


class Memory:
    """The collection of each store and filter, and the answers given before, of one namespace.

    Thread-safe.

    Attributes:
        answers: The answers given before.
        quiet: Counts the running answers of all namespaces.
    """

    def __init__(
        self, tokenizer: Any, quiet: Quiet, folder: Path | None = None, model: str = ""
    ) -> None:
        """Hold what ``folder`` keeps.

        Args:
            tokenizer: The target's.
            quiet: See :attr:`quiet`.
            folder: Keeps the answers and the collections' token ids for later processes, if given.
            model: The target's name, for people who list the folder.
        """
        self.quiet = quiet
        self._folder, self._model = folder, title_of(model)
        log = None if folder is None else AnswerLog(folder / f"answers{_SUFFIX}", self._model)
        self.answers = Answers(tokenizer, _MOST_ANSWER_TOKENS, log)
        self._tokenizer = tokenizer
        self._lock = threading.RLock()
        self._collections: OrderedDict[tuple[Hashable, str], Collection] = OrderedDict()

    def collection(self, source: object, filter: Any) -> View | None:
        """Return what one answer may draft from: what was read of the source, as far as it is known to hold it.

        Args:
            source: The pipeline's store, if its chunks may be drafted from; one that cannot be listed has no texts.
            filter: Of the pipeline's own search.
        """
        if not isinstance(source, ReadableSource):
            return None
        return self._collection(source, filter).view()

    @locked
    def forget(self, text: str | None = None) -> int:
        """Forget all, or a text of the collection and every answer that holds it; return how many answers.

        What the folder keeps is forgotten too, but not what another process has read of it.
        """
        with FILES:  # a file that is written meanwhile would hold the text again
            for collection in self._collections.values():
                collection.forget(text)
            self._forget_kept(text)
        if text is None:
            self._collections.clear()
        keys = [
            key
            for key, ids in self.answers.store.rows()
            if text is None or text in self._decoded(ids)
        ]
        self.answers.remove(keys)
        return len(keys)

    def _decoded(self, ids: Ids) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def _forget_kept(self, text: str | None) -> None:
        for path in [] if self._folder is None else [*self._folder.glob(f"*{_SUFFIX}")]:
            try:
                store = TokenStore.open(path, self._tokenizer)
                if text is None or text in store:
                    store.remove([key for key, _ in store.rows()] if text is None else text)
                    store.save(path)
            except RetrievalError:
                continue  # the log of answers; what is damaged is never read
            except StorageError as error:
                logger.warning("A text is still in %s: %s", path, error)

    @locked
    def _collection(self, source: ReadableSource, filter: Any) -> Collection:
        key = source.origin(), repr(filter)
        known = self._collections.get(key)
        if known is None:
            # The file only saves encoding: two stores that share one lose nothing but time.
            name = f"{chunk_key(f'{type(source).__name__} {filter!r}'):016x}{_SUFFIX}"
            keep = None if self._folder is None else (self._folder / name, self._model)
            known = Collection(source, filter, self._tokenizer, self.quiet, keep)
            self._collections[key] = known
        self._collections.move_to_end(key)
        while len(self._collections) > _MOST_COLLECTIONS:
            self._collections.popitem(last=False)
        return known


class Memories:
    """The memory of each namespace, the last used ones."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        """Hold none yet; the tokenizer is the target's, whose name is ``model``."""
        self._tokenizer, self._model = tokenizer, model
        self._quiet = Quiet()
        self._lock = threading.RLock()
        self._held: OrderedDict[tuple[str, Path | None], Memory] = OrderedDict()

    @locked
    def of(self, namespace: str, cache_dir: str | Path | None = None) -> Memory:
        """Return a namespace's memory, which is kept in ``cache_dir`` if given."""
        folder = None
        if cache_dir is not None:
            name = f"{tokenizer_fingerprint(self._tokenizer)} {namespace}"
            folder = cache_folder("memory", cache_dir) / f"{chunk_key(name):016x}"
        key = namespace, folder
        if key not in self._held:
            self._held[key] = Memory(self._tokenizer, self._quiet, folder, self._model)
        self._held.move_to_end(key)
        while len(self._held) > _MOST_NAMESPACES:
            self._held.popitem(last=False)
        return self._held[key]
