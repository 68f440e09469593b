"""LlamaIndex's vector indices, over any of its vector stores."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval.chroma_store import ChromaDocuments
from rasd_integrations.retrieval.documents import document_of
from rasd_integrations.retrieval.embedding import Embedder
from rasd_integrations.retrieval.items import (
    digest,
    is_a,
    metadata_predicate,
    node_to_chunk,
    ranked,
)
from rasd_integrations.retrieval.memory import MemoryDocuments
from rasd_integrations.types import Chunk


class LlamaIndexSource:
    """A LlamaIndex vector store, and the index whose document store holds what it does not.

    The vector store is searched, not the retriever: nothing that listens to its events sees the searches.
    """

    def __init__(
        self, vector_store: Any, embed: Any, *, index: Any = None, retriever: Mapping[str, Any] = {}
    ) -> None:
        """Hold the store, its embedding and what a retriever passes to each search.

        Args:
            vector_store: Searched.
            embed: What it was filled with.
            index: Holds the nodes, if the store does not.
            retriever: Attributes of a ``VectorIndexRetriever``.

        Raises:
            RetrievalError: A store without texts comes without its index, or there is no embedding.
        """
        if embed is None:
            msg = (
                f"{type(vector_store).__name__} comes without its embedding. Give its VectorStoreIndex "
                "instead, or as_chunk_source(vector_store, embed=...)."
            )
            raise RetrievalError(msg)
        self._holds_text = bool(getattr(vector_store, "stores_text", False))
        if index is None and not self._holds_text:
            msg = (
                f"{type(vector_store).__name__} holds vectors only; the texts are in its index. Give "
                "the VectorStoreIndex instead."
            )
            raise RetrievalError(msg)
        self._store = vector_store
        self._embedder = Embedder(embed)
        self._index = index
        self._filters = retriever.get("_filters")
        self._node_ids, self._doc_ids = retriever.get("_node_ids"), retriever.get("_doc_ids")
        self._options = retriever.get("_kwargs") or {}
        self._memory = MemoryDocuments(self._all_chunks, self._version, _predicate)

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks in the store's order; ``filter`` is a ``MetadataFilters``."""
        from llama_index.core.vector_stores.types import VectorStoreQuery

        question = VectorStoreQuery(
            query_embedding=self._embedder.query(query).tolist(),
            query_str=query,
            similarity_top_k=k,
            filters=filter or self._filters,
            node_ids=self._node_ids,
            doc_ids=self._doc_ids,
        )
        result = self._store.query(question, **self._options)
        if result.nodes:
            return ranked(result.nodes)
        names = self._index.index_struct.nodes_dict if self._index is not None else {}
        return ranked(self._nodes([names[i] for i in result.ids or () if i in names]))

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks of ``chunk``'s document that pass the filter, in reading order."""
        filters = filter or self._filters
        read = self._stored_document if self._holds_text else self._held_document
        return [c for c in read(chunk, filters) if self._allows(c)]

    def origin(self) -> Hashable:
        """Return the identity of the store, and how the retriever narrows its searches."""
        narrowed = repr((self._filters, self._node_ids, self._doc_ids))
        return "llama_index", id(self._store), id(self._index), narrowed

    def keys(self, most: int, *, filter: Any = None) -> Sequence[Hashable]:
        """Return ids of a Chroma collection, the texts themselves of any other store and of searches with filters."""
        filters = filter or self._filters
        if (chroma := self._whole_collection(filters)) is not None:
            return chroma.keys(most)
        if not self._holds_text:
            chunks = self._memory.chunks(filter=filters)
        else:
            chunks = ranked(self._store.get_nodes(None, filters=filters))
        return [chunk.text for chunk in chunks if self._allows(chunk)][-most:]

    def read(self, keys: Sequence[Hashable], *, filter: Any = None) -> Mapping[Hashable, str]:
        """Return the texts of these chunks."""
        if (chroma := self._whole_collection(filter or self._filters)) is not None:
            return chroma.read(keys)
        return self._memory.read(keys)

    def _whole_collection(self, filters: Any) -> ChromaDocuments | None:
        """Return the Chroma collection that is searched, unless only a part of it is."""
        if filters or self._node_ids or self._doc_ids or not self._holds_text:
            return None
        client = self._store.client
        is_chroma = hasattr(client, "count") and hasattr(client, "id")
        return ChromaDocuments(lambda: client) if is_chroma else None

    def fingerprint(self) -> str:
        """Return the store's class with a hash of its nodes' ids, or with the collection's size."""
        name = type(self._store).__name__
        if self._index is not None and not self._holds_text:
            return f"{name}-{digest(*self._indexed_ids()).hex()}"
        client = self._store.client
        if hasattr(client, "count") and hasattr(client, "id"):
            return f"{name}-{ChromaDocuments(lambda: client).fingerprint()}"
        return name

    def _allows(self, chunk: Chunk) -> bool:
        """Return True if the retriever's lists of nodes and documents, if any, hold ``chunk``."""
        in_nodes = not self._node_ids or chunk.id in self._node_ids
        return in_nodes and (not self._doc_ids or chunk.metadata.get("ref_doc_id") in self._doc_ids)

    def _held_document(self, chunk: Chunk, filters: Any) -> list[Chunk]:
        """Read a document from the document store, which lists the nodes of each source.

        Nodes made by hand have no source; they are grouped by their metadata, at more cost.
        """
        docstore, allowed = self._index.docstore, _predicate(filters)

        def find(chunk: Chunk) -> Chunk | None:
            known = chunk.id and docstore.document_exists(chunk.id)
            return node_to_chunk(docstore.get_node(chunk.id)) if known else None

        def fetch(key: str, value: Any) -> list[Chunk]:
            if key == "ref_doc_id":
                infos = [docstore.get_ref_doc_info(value)]
            else:
                every = docstore.get_all_ref_doc_info() or {}
                infos = [i for i in every.values() if i.metadata.get(key) == value]
            indexed = set(self._indexed_ids())
            ids = [n for info in infos if info is not None for n in info.node_ids if n in indexed]
            return [c for node in self._nodes(ids) if allowed(c := node_to_chunk(node))]

        found = document_of(chunk, fetch, find)
        return found or self._memory.document(chunk, filter=filters)

    def _stored_document(self, chunk: Chunk, filters: Any) -> list[Chunk]:
        """Read a document from the vector store by its own filters."""
        from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

        def find(chunk: Chunk) -> Chunk | None:
            found = self._store.get_nodes([chunk.id]) if chunk.id else None
            return node_to_chunk(found[0]) if found else None

        def fetch(key: str, value: Any) -> list[Chunk]:
            parts: list[Any] = [MetadataFilter(key=key, value=value)]
            where = MetadataFilters(filters=[*parts, filters] if filters else parts)
            return ranked(self._store.get_nodes(None, filters=where))

        return document_of(chunk, fetch, find)

    def _indexed_ids(self) -> Iterable[str]:
        ids: Iterable[str] = self._index.index_struct.nodes_dict.values()
        return ids

    def _nodes(self, ids: Sequence[str]) -> list[Any]:
        """Return the document store's nodes; some may be deleted there."""
        nodes = self._index.docstore.get_nodes(list(ids), raise_error=False) if ids else []
        return [node for node in nodes if node is not None]

    def _all_chunks(self) -> list[Chunk]:
        return ranked(self._nodes(list(dict.fromkeys(self._indexed_ids()))))

    def _version(self) -> int:
        # The hashes of all nodes: a node replaced under its id is seen too.
        hashes = self._index.docstore.get_all_document_hashes()
        return hash((tuple(self._index.index_struct.nodes_dict), frozenset(hashes.items())))


def from_index(obj: Any) -> LlamaIndexSource:
    """Return the source of a ``VectorStoreIndex``, or of a ``VectorIndexRetriever`` with its filters."""
    held = vars(obj)  # the retriever publishes none of these
    index = held.get("_index", obj)
    embed = held.get("_embed_model")
    return LlamaIndexSource(index.vector_store, embed, index=index, retriever=held)


def _predicate(filters: Any) -> Callable[[Chunk], bool]:
    if not is_a(filters, "llama_index", "MetadataFilters"):
        return metadata_predicate(filters)
    from llama_index.core.vector_stores.utils import build_metadata_filter_fn

    def allowed(chunk: Chunk) -> bool:
        return bool(build_metadata_filter_fn(lambda _: dict(chunk.metadata), filters)(""))

    return allowed
