"""LangChain's vector stores: any ``VectorStore``; whole documents from Chroma, FAISS and the in-memory one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rasd_integrations.retrieval.chroma_store import ChromaDocuments, require_embedding
from rasd_integrations.retrieval.items import digest, is_a, metadata_predicate, ranked, to_chunk
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
        self._documents, self._state = _documents_of(store)

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks in the store's order."""
        options = dict(self._options)
        if filter or self._filter:
            options["filter"] = filter or self._filter
            if _is_faiss(self._store):
                options["fetch_k"] = max(k, min(self._store.index.ntotal, _MOST_CANDIDATES))
        return ranked(self._store.similarity_search(query, k=k, **options))

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks of ``chunk``'s document that pass the filter; empty for unknown stores."""
        if self._documents is None:
            return []
        return self._documents.document(chunk, filter=filter or self._filter)

    def origin(self) -> Hashable:
        """Return the identity of the store, and how the retriever narrows its searches."""
        return "langchain", id(self._store), repr(self._filter), repr(self._options)

    def keys(self, most: int, *, filter: Any = None) -> Sequence[Hashable]:
        """Return the keys of a store that is known; none if an option narrows its searches by more than a filter."""
        if self._documents is None or self._options:
            return ()
        return self._documents.keys(most, filter=filter or self._filter)

    def read(self, keys: Sequence[Hashable], *, filter: Any = None) -> Mapping[Hashable, str]:
        """Return the texts of these chunks."""
        if self._documents is None:
            return {}
        return self._documents.read(keys, filter=filter or self._filter)

    def fingerprint(self) -> str:
        """Return the store's class with its size and a hash of its ids, if it tells them."""
        name, state = type(self._store).__name__, self._state()
        return f"{name}-{state}" if state else name


def _documents_of(store: Any) -> tuple[ChromaDocuments | MemoryDocuments | None, Callable[[], str]]:
    """Return whole documents of a store that is known, and a function that hashes its state."""
    if is_a(store, "langchain_chroma", "Chroma") or is_a(store, "langchain_community", "Chroma"):
        chroma = ChromaDocuments(lambda: store._collection)  # noqa: SLF001 - has no public name
        return chroma, chroma.fingerprint
    if _is_faiss(store):
        return (
            MemoryDocuments(
                lambda: _faiss_chunks(store),
                lambda: _faiss_version(store),
                lambda f: _faiss_predicate(store, f),
            ),
            lambda: digest(*store.index_to_docstore_id.values()).hex(),
        )
    if is_a(store, "langchain_core", "InMemoryVectorStore"):
        # A text replaced under its id leaves no trace to compare, so it is read at each call.
        held = MemoryDocuments(lambda: _held(store), lambda: None, _document_predicate)
        return held, lambda: digest(*store.store).hex()
    return None, str


def _is_faiss(store: Any) -> bool:
    return all(hasattr(store, name) for name in ("index", "docstore", "index_to_docstore_id"))


def _faiss_chunks(store: Any) -> list[Chunk]:
    names = list(store.index_to_docstore_id.values())
    found = [(name, store.docstore.search(name)) for name in names]
    # For an id that is gone the docstore answers with a sentence.
    return [replace(to_chunk(d), id=name) for name, d in found if hasattr(d, "page_content")]


def _faiss_version(store: Any) -> object:
    """Return what differs after a change: adding makes a new dict of documents, deleting a new map of ids."""
    names = store.index_to_docstore_id
    return getattr(store.docstore, "_dict", None), names, store.index.ntotal, len(names)


def _faiss_predicate(store: Any, filter: Any) -> Callable[[Chunk], bool]:
    # The store's own reading of a filter knows its operators ($in, $and, ...).
    own = getattr(store, "_create_filter_func", None)
    if not filter or own is None:
        return metadata_predicate(filter)
    allowed = own(filter)
    return lambda chunk: bool(allowed(dict(chunk.metadata)))


def _held(store: Any) -> list[Chunk]:
    held = list(store.store.items())
    return [Chunk(entry["text"], name, metadata=entry["metadata"]) for name, entry in held]


def _document_predicate(filter: Any) -> Callable[[Chunk], bool]:
    if not filter:
        return lambda _: True
    from langchain_core.documents import Document

    # The in-memory store hands its filter whole documents.
    return lambda c: bool(filter(Document(c.text, id=c.id, metadata=dict(c.metadata))))
