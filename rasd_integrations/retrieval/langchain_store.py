"""LangChain's vector stores: any ``VectorStore``; documents from Chroma, FAISS and the in-memory one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rasd_integrations.retrieval.chroma_store import ChromaDocuments, require_embedding
from rasd_integrations.retrieval.items import digest, is_a, metadata_predicate, to_chunk
from rasd_integrations.retrieval.memory import MemoryDocuments
from rasd_integrations.types import Chunk

_NOT_FOR_SEARCH = frozenset({"k", "score_threshold", "fetch_k", "lambda_mult", "filter"})
_MOST_CANDIDATES = 10_000  # FAISS filters what it fetched, so a filter needs many candidates


class LangChainSource:
    """A LangChain vector store, with what its retriever passes to each search."""

    def __init__(self, store: Any, search_kwargs: Mapping[str, Any] | None = None) -> None:
        """Hold ``store``; of ``search_kwargs`` the filter and the store's own options are kept.

        A filter given to a call takes the place of the retriever's.

        Raises:
            RetrievalError: A Chroma without embedding, which would fall back to Chroma's default model.
        """
        carried = dict(search_kwargs or {})
        if is_a(store, "langchain_chroma", "Chroma") and store.embeddings is None:
            require_embedding(store._collection)  # noqa: SLF001 - Chroma itself would embed
        self._store = store
        self._filter = carried.get("filter")
        self._options = {k: v for k, v in carried.items() if k not in _NOT_FOR_SEARCH}
        self._documents = _documents_of(store)

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks in the store's order."""
        options = dict(self._options)
        if filter or self._filter:
            options["filter"] = filter or self._filter
            if _is_faiss(self._store):
                options["fetch_k"] = max(k, min(self._store.index.ntotal, _MOST_CANDIDATES))
        found = self._store.similarity_search(query, k=k, **options)
        return [to_chunk(document, rank) for rank, document in enumerate(found)]

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks of ``chunk``'s document that pass the filter; empty for unknown stores."""
        if self._documents is None:
            return []
        return self._documents.document(chunk, filter=filter or self._filter)

    def fingerprint(self) -> str:
        """Return the store's class with its size and a hash of its ids, where it tells them."""
        name = type(self._store).__name__
        return name if self._documents is None else f"{name}-{self._documents.fingerprint()}"


class _HeldDocuments:
    """The documents of a LangChain store that keeps its texts in this process."""

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        load: Callable[[], Iterable[tuple[str, Any]]],
        version: Callable[[], Hashable | None],
        predicate: Callable[[Any], Callable[[Chunk], bool]],
    ) -> None:
        self._names = names
        self._load = load
        self._predicate = predicate
        self._documents = MemoryDocuments(self._chunks, version)

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        return self._documents.document(chunk, self._predicate(filter))

    def fingerprint(self) -> str:
        return digest(*self._names()).hex()

    def _chunks(self) -> Iterable[Chunk]:
        for name, document in self._load():
            yield replace(to_chunk(document), id=name)


def _documents_of(store: Any) -> ChromaDocuments | _HeldDocuments | None:
    if is_a(store, "langchain_chroma", "Chroma") or is_a(store, "langchain_community", "Chroma"):
        return ChromaDocuments(lambda: store._collection)  # noqa: SLF001 - has no public name
    if _is_faiss(store):
        return _HeldDocuments(
            lambda: list(store.index_to_docstore_id.values()),
            lambda: _faiss_documents(store),
            _FaissVersion(store),
            lambda f: _faiss_filter(store, f),
        )
    if is_a(store, "langchain_core", "InMemoryVectorStore"):
        # A text replaced under its id leaves no trace to compare, so it is grouped at each call.
        return _HeldDocuments(
            lambda: list(store.store), lambda: _held(store), lambda: None, _document_filter
        )
    return None


def _is_faiss(store: Any) -> bool:
    return all(hasattr(store, name) for name in ("index", "docstore", "index_to_docstore_id"))


def _faiss_documents(store: Any) -> list[tuple[str, Any]]:
    found = [
        (name, store.docstore.search(name)) for name in list(store.index_to_docstore_id.values())
    ]
    # For an id that is gone the docstore answers with a sentence.
    return [(name, document) for name, document in found if hasattr(document, "page_content")]


class _FaissVersion:
    """Changes with the store: adding makes a new dict of documents, deleting a new map of ids."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._parts: tuple[Any, ...] = ()
        self._number = 0

    def __call__(self) -> int:
        store = self._store
        held = getattr(store.docstore, "_dict", store.docstore)
        # The objects themselves are kept, since the id of one that is gone may be used again.
        parts = (
            held,
            store.index_to_docstore_id,
            store.index.ntotal,
            len(store.index_to_docstore_id),
        )
        same = len(self._parts) == len(parts) and all(
            a is b or (isinstance(a, int) and a == b)
            for a, b in zip(self._parts, parts, strict=True)
        )
        if not same:
            self._parts = parts
            self._number += 1
        return self._number


def _faiss_filter(store: Any, filter: Any) -> Callable[[Chunk], bool]:
    # The store's own reading of a filter knows its operators ($in, $and, ...).
    own = getattr(store, "_create_filter_func", None)
    allowed = own(filter) if filter and own is not None else metadata_predicate(filter)
    return lambda chunk: bool(allowed(dict(chunk.metadata)))


def _held(store: Any) -> list[tuple[str, Any]]:
    return [
        (name, Chunk(entry["text"], name, metadata=entry["metadata"]))
        for name, entry in list(store.store.items())
    ]


def _document_filter(filter: Any) -> Callable[[Chunk], bool]:
    if not filter:
        return lambda _: True
    from langchain_core.documents import Document

    # The in-memory store hands its filter whole documents.
    return lambda c: bool(filter(Document(c.text, id=c.id, metadata=dict(c.metadata))))
