"""Chunks held in memory: a list as a store, and documents out of in-memory docstores."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from rasd_integrations.retrieval.documents import DOCUMENT_KEYS, document_of, has_document_key
from rasd_integrations.retrieval.embedding import Embedder
from rasd_integrations.retrieval.items import digest, metadata_predicate, to_chunk
from rasd_integrations.retrieval.lexical import LexicalIndex
from rasd_integrations.types import Chunk


class MemoryDocuments:
    """Groups in-memory chunks by document; the groups are kept for as long as the version stands.

    A chunk that does not name its document is known again by its id, then by its text.
    """

    def __init__(
        self, load: Callable[[], Iterable[Chunk]], version: Callable[[], Hashable | None]
    ) -> None:
        """Remember how to list all chunks in store order, and what changes when they change.

        ``version`` is compared with ``==``; ``None`` groups anew at each call.
        """
        self._load = load
        self._version = version
        self._lock = threading.Lock()
        self._seen: Hashable | None = None
        self._groups: dict[tuple[str, Any], list[Chunk]] = {}
        self._named: dict[tuple[str, str], Chunk | None] = {}

    def document(self, chunk: Chunk, allowed: Callable[[Chunk], bool]) -> list[Chunk]:
        """Return the chunks of ``chunk``'s document that are ``allowed``, in reading order."""
        with self._lock:
            version = self._version()
            if version is None or version != self._seen:
                self._group()
                self._seen = version
            groups, named = self._groups, self._named
        if not has_document_key(chunk.metadata):
            by_id = named.get(("id", chunk.id)) if chunk.id is not None else None
            chunk = by_id or named.get(("text", chunk.text)) or chunk

        def fetch(key: str, value: Any) -> list[Chunk]:
            return [c for c in groups.get((key, value), ()) if allowed(c)]

        return document_of(chunk, fetch)

    def _group(self) -> None:
        groups: defaultdict[tuple[str, Any], list[Chunk]] = defaultdict(list)
        named: dict[tuple[str, str], Chunk | None] = {}
        for chunk in self._load():
            # A text that stands twice (a licence header) does not tell its document.
            named["text", chunk.text] = None if ("text", chunk.text) in named else chunk
            if chunk.id is not None:
                named["id", chunk.id] = chunk
            for key in DOCUMENT_KEYS:
                value = chunk.metadata.get(key)
                if isinstance(value, str | int):
                    groups[key, value].append(chunk)
        self._groups, self._named = dict(groups), named


class ListSource:
    """Texts, chunks, documents or nodes in a list, ranked by their words, or by ``embed`` if given.

    The list may change between questions; it is indexed again when its texts have changed.
    """

    def __init__(self, items: Sequence[Any], embed: Any = None) -> None:
        """Hold ``items``; nothing is indexed before the first question."""
        self._items = items
        self._embedder = None if embed is None else Embedder(embed)
        self._lock = threading.Lock()
        self._seen: Hashable | None = None
        self._chunks: list[Chunk] = []
        self._rank: Callable[[str], list[int]] = lambda _: []
        self._documents = MemoryDocuments(self._load, self._version)

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks, best first; none that shares no word with the question."""
        with self._lock:
            version = self._version()
            if version != self._seen:
                self._chunks = self._load()
                self._rank = self._ranker([c.text for c in self._chunks])
                self._seen = version
            chunks, rank = self._chunks, self._rank
        allowed = metadata_predicate(filter)
        found = (chunks[i] for i in rank(query) if allowed(chunks[i].metadata))
        return [to_chunk(chunk, rank) for rank, chunk in zip(range(k), found, strict=False)]

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks with the same source; empty for bare texts, which name none."""
        allowed = metadata_predicate(filter)
        return self._documents.document(chunk, lambda c: allowed(c.metadata))

    def fingerprint(self) -> str:
        """Return a hash of the texts."""
        return f"list-{digest(*(c.text for c in self._load())).hex()}"

    def _load(self) -> list[Chunk]:
        chunks = (to_chunk(item) for item in list(self._items))
        return [c for c in chunks if isinstance(c, Chunk) and isinstance(c.text, str)]

    def _version(self) -> Hashable:
        # Python keeps a string's hash, so this costs a pass over pointers.
        return hash(tuple(i if isinstance(i, str) else _text(i) for i in list(self._items)))

    def _ranker(self, texts: list[str]) -> Callable[[str], list[int]]:
        if self._embedder is None:
            return LexicalIndex(texts).rank
        embedder = self._embedder
        if not texts:
            return lambda _: []
        matrix = embedder.texts(texts)
        matrix = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
        return lambda query: np.argsort(-(matrix @ embedder.query(query)), kind="stable").tolist()


def _text(item: Any) -> Hashable:
    text = getattr(item if isinstance(item, Chunk) else to_chunk(item), "text", None)
    return text if isinstance(text, str) else None
