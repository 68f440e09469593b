"""Chunks held in memory: a list as a store, and whole documents from in-memory stores."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np

from rasd_integrations.retrieval.documents import DOCUMENT_KEYS, document_of
from rasd_integrations.retrieval.embedding import Embedder
from rasd_integrations.retrieval.items import digest, metadata_predicate, ranked, to_chunk
from rasd_integrations.types import Chunk

_T = TypeVar("_T")

# Scripts written without spaces are split into characters, all others into words.
_TOKEN = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W_]+")
_K1 = 1.5  # BM25 k1: term-frequency saturation
_B = 0.75  # BM25 b: length normalisation


class Cached(Generic[_T]):
    """A value that is computed again when its version changes; thread-safe."""

    def __init__(self, compute: Callable[[], _T], version: Callable[[], object]) -> None:
        """Compute nothing yet. Versions are compared with ``==``; ``None`` is never up to date."""
        self._compute = compute
        self._version = version
        self._lock = threading.Lock()
        self._seen: object = None
        self._values: list[_T] = []

    def get(self) -> _T:
        """Return the current value."""
        with self._lock:
            version = self._version()
            if version is None or version != self._seen:
                self._values, self._seen = [self._compute()], version
            return self._values[0]


class MemoryDocuments:
    """Whole documents out of chunks in memory.

    A chunk that does not name its document is looked up by its id, then by its text.
    """

    def __init__(
        self,
        load: Callable[[], Iterable[Chunk]],
        version: Callable[[], object],
        predicate: Callable[[Any], Callable[[Chunk], bool]] = metadata_predicate,
    ) -> None:
        """Keep how to list all chunks, and how to tell that they changed (see :class:`Cached`).

        Args:
            load: Lists all chunks in store order.
            version: Of the chunks.
            predicate: Turns the store's filter into a function of a chunk.
        """
        self._chunks = Cached(lambda: list(load()), version)
        self._index = Cached(lambda: _grouped(self._chunks.get()), version)
        self._predicate = predicate

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks of ``chunk``'s document that pass ``filter``, in reading order."""
        allowed = self._predicate(filter)
        groups, named = self._index.get()

        def find(chunk: Chunk) -> Chunk | None:
            return named.get(("id", chunk.id)) or named.get(("text", chunk.text))

        def fetch(key: str, value: Any) -> list[Chunk]:
            return [c for c in groups.get((key, value), ()) if allowed(c)]

        return document_of(chunk, fetch, find)

    def keys(self, most: int, *, filter: Any = None) -> Sequence[Hashable]:
        """Return the texts of the chunks that pass ``filter``: they are in memory, and so their own keys."""
        return [chunk.text for chunk in self.chunks(filter=filter)][-most:]

    def chunks(self, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks that pass ``filter``, in store order."""
        allowed = self._predicate(filter)
        return [chunk for chunk in self._chunks.get() if allowed(chunk)]

    @staticmethod
    def read(keys: Sequence[Hashable], *, filter: Any = None) -> Mapping[Hashable, str]:
        """Return the keys, which are the texts."""
        del filter
        return {key: key for key in keys if isinstance(key, str)}


class ListSource:
    """Texts, chunks, documents or nodes in a list, ranked by their words, or by ``embed`` if given.

    The list may change between questions; it is indexed again when its texts have changed.
    """

    def __init__(self, items: Sequence[Any], embed: Any = None) -> None:
        """Hold ``items``; nothing is indexed before the first question."""
        self._items = items
        self._embedder = None if embed is None else Embedder(embed)
        self._ranking = Cached(self._ranked, self._version)
        self._documents = MemoryDocuments(self._load, self._version)

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks, best first; by words, only chunks that share one with the question."""
        allowed = metadata_predicate(filter)
        nearest = self._nearest(query, None if filter else k)
        return ranked(islice((c for c in nearest if allowed(c)), k))

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks with the same source; empty for bare texts, which name none."""
        return self._documents.document(chunk, filter=filter)

    def origin(self) -> Hashable:
        """Return the identity of the list."""
        return "list", id(self._items) if self._items else id(self)

    def keys(self, most: int, *, filter: Any = None) -> Sequence[Hashable]:
        """Return the texts of the chunks that pass ``filter``."""
        return self._documents.keys(most, filter=filter)

    def read(self, keys: Sequence[Hashable], *, filter: Any = None) -> Mapping[Hashable, str]:
        """Return the keys, which are the texts."""
        return self._documents.read(keys, filter=filter)

    def fingerprint(self) -> str:
        """Return a hash of the texts."""
        return f"list-{digest(*(c.text for c in self._load())).hex()}"

    def _nearest(self, query: str, most: int | None) -> Iterable[Chunk]:
        """Yield at least the ``most`` nearest chunks, best first; ``None`` for all."""
        chunks, rank = self._ranking.get()
        return (chunks[i] for i in rank(query))

    def _load(self) -> list[Chunk]:
        chunks = (to_chunk(item) for item in list(self._items))
        return [c for c in chunks if isinstance(c, Chunk) and isinstance(c.text, str)]

    def _version(self) -> object:
        # Python keeps a string's hash, so this costs a pass over pointers.
        return hash(tuple(i if isinstance(i, str) else _text(i) for i in list(self._items)))

    def _ranked(self) -> tuple[list[Chunk], Callable[[str], list[int]]]:
        chunks = self._load()
        texts = [chunk.text for chunk in chunks]
        if self._embedder is None or not texts:
            return chunks, LexicalIndex(texts).rank
        embedder = self._embedder
        matrix = embedder.texts(texts)
        lengths = np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
        matrix = (matrix / lengths).astype(np.float32, copy=False)
        return chunks, lambda query: np.argsort(
            -(matrix @ embedder.query(query)), kind="stable"
        ).tolist()


_Groups = dict[tuple[str, Any], list[Chunk]]
_Named = dict[tuple[str, str | None], Chunk | None]


def _grouped(chunks: Iterable[Chunk]) -> tuple[_Groups, _Named]:
    """Return chunks by document key and value, and by id or text."""
    groups: _Groups = defaultdict(list)
    named: _Named = {}
    for chunk in chunks:
        # A text that occurs twice (a licence header) does not tell its document.
        named["text", chunk.text] = None if ("text", chunk.text) in named else chunk
        if chunk.id is not None:
            named["id", chunk.id] = chunk
        for key in DOCUMENT_KEYS:
            value = chunk.metadata.get(key)
            if isinstance(value, str | int):
                groups[key, value].append(chunk)
    return dict(groups), named


def _text(item: Any) -> object:
    text = getattr(to_chunk(item), "text", None)
    return text if isinstance(text, str) else None


def words(text: str) -> list[str]:
    """Return the case-folded words of ``text``."""
    return _TOKEN.findall(text.casefold())


class LexicalIndex:
    """BM25 over a few texts (Robertson and Zaragoza 2009), for stores without an embedding."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Index ``texts``."""
        counts = [Counter(words(text)) for text in texts]
        lengths = [sum(c.values()) for c in counts]
        mean = sum(lengths) / max(len(lengths), 1) or 1.0
        self._weights: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            for word, n in count.items():
                damped = n * (_K1 + 1) / (n + _K1 * (1 - _B + _B * length / mean))
                self._weights[word].append((i, damped))
        self._size = len(texts)

    def rank(self, query: str) -> list[int]:
        """Return the indices of the texts that share a word with ``query``, best first."""
        scores: defaultdict[int, float] = defaultdict(float)
        for word in set(words(query)):
            holders = self._weights.get(word, ())
            rarity = math.log(1 + (self._size - len(holders) + 0.5) / (len(holders) + 0.5))
            for i, weight in holders:
                scores[i] += rarity * weight
        return sorted(scores, key=lambda i: (-scores[i], i))
