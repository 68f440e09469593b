"""Guards a store, so that it never fails an answer."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar, copy_context
from dataclasses import replace
from typing import Any, TypeVar

from rasd_integrations.process import at_work
from rasd_integrations.retrieval.base import ChunkSource
from rasd_integrations.types import Chunk

logger = logging.getLogger(__name__)

MAX_K = 1000
"""Limit of ``k``."""

_HELD_S = 1.0  # a call that takes longer does not hold up the end of the process
_MAX_FAULTS = 16  # lines kept for a caller that never takes them
_SEARCHING: ContextVar[bool] = ContextVar("rasd_searching", default=False)
_NONE: list[Chunk] = []
_T = TypeVar("_T")


class GuardedSource:
    """A chunk source with a time limit, whose failures are empty results, logged and reported.

    Calls run in daemon threads, so a store that hangs blocks neither an answer nor the end of the process; it is
    skipped until that call returns, so threads do not pile up. A search that leads to another one of this kind (the
    store calls a model that searches) gets nothing.
    """

    def __init__(self, source: ChunkSource, timeout_s: float) -> None:
        """Guard ``source``; each call may take ``timeout_s`` seconds."""
        self.source = source
        self.timeout_s = timeout_s
        self._late: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks, best first, ranks 0, 1, ...; empty on any fault."""
        k = min(k, MAX_K)
        if k < 1 or not query.strip():
            return []
        found: object = self._call(
            "search", lambda: self.source.search(query, k, filter=filter), _NONE
        )
        return self._checked("search", found)[:k]

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks of ``chunk``'s document in reading order; empty if unknown or on a fault."""
        found: object = self._call(
            "document", lambda: self.source.document(chunk, filter=filter), _NONE
        )
        return self._checked("document", found)

    def fingerprint(self) -> str:
        """Return the store's identity for cache keys; a new one at each call if it has none."""
        found: object = self._call("fingerprint", self.source.fingerprint, None)
        return found if isinstance(found, str) else f"unknown-{uuid.uuid4().hex}"

    def take_faults(self) -> tuple[str, ...]:
        """Return and clear the faults in this thread since the last call, one line each."""
        faults = tuple(self._faults)
        self._faults.clear()
        return faults

    @property
    def _faults(self) -> deque[str]:
        if not hasattr(self._local, "faults"):
            self._local.faults = deque(maxlen=_MAX_FAULTS)
        faults: deque[str] = self._local.faults
        return faults

    def _report(self, what: str, fault: str) -> None:
        line = f"{type(self.source).__name__}.{what}: {' '.join(fault.split())[:300]}"
        self._faults.append(line)
        logger.warning("Retrieval is left out. %s", line)

    def _call(self, what: str, function: Callable[[], _T], empty: _T) -> _T:
        """Call ``function`` in a worker thread; return ``empty`` on any fault."""
        if _SEARCHING.get():
            self._report(what, "the store's own call led back to this model; not searched again")
            return empty
        with self._lock:
            self._late = [t for t in self._late if t.is_alive()]
            late = bool(self._late)
        if late:
            self._report(what, "skipped, an earlier call has not come back yet")
            return empty
        results: list[_T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                with at_work(_HELD_S):
                    results.append(function())
            except BaseException as error:  # noqa: BLE001 - a store may raise anything, Rust panics too
                errors.append(error)

        context = copy_context()
        context.run(_SEARCHING.set, True)
        worker = threading.Thread(target=context.run, args=(work,), name="rasd-store", daemon=True)
        try:
            worker.start()
        except RuntimeError as error:  # no thread: the process ends, or has too many
            self._report(what, str(error))
            return empty
        worker.join(self.timeout_s)
        if results:
            return results[0]
        if errors:
            self._report(what, f"{type(errors[0]).__name__}: {errors[0]}")
        else:
            with self._lock:
                self._late.append(worker)
            self._report(what, f"no answer within {self.timeout_s:g} s")
        return empty

    def _checked(self, what: str, found: object) -> list[Chunk]:
        """Return the usable chunks of ``found``, ranked; report what is dropped."""
        if not isinstance(found, list | tuple):
            self._report(what, f"a {type(found).__name__} instead of a list of chunks")
            return []
        chunks: list[Chunk] = []
        texts: set[str] = set()
        ids: set[str] = set()
        nonsense: list[str] = []
        for item in found:
            text = item.text if isinstance(item, Chunk) else item
            if not isinstance(item, Chunk) or not isinstance(text, str):
                nonsense.append(type(text).__name__)
                continue
            # A document may repeat a text; in a search result a repetition is useless.
            if not text.strip() or (what == "search" and text in texts):
                continue
            texts.add(text)
            chunk_id = item.id if item.id is None else str(item.id)
            if chunk_id in ids:  # one id for two chunks names neither
                chunk_id = None
            elif chunk_id is not None:
                ids.add(chunk_id)
            metadata: object = item.metadata
            metadata = metadata if isinstance(metadata, Mapping) else {}
            chunks.append(replace(item, id=chunk_id, rank=len(chunks), metadata=metadata))
        if nonsense:
            kinds = ", ".join(sorted(set(nonsense)))
            self._report(
                what, f"dropped {len(nonsense)} of {len(found)} results: no text in {kinds}"
            )
        return chunks
