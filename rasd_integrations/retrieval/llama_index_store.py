"""LlamaIndex's vector indices, over any of its vector stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval.documents import document_of, has_document_key
from rasd_integrations.retrieval.embedding import Embedder
from rasd_integrations.retrieval.items import digest, is_a, metadata_predicate, node_to_chunk
from rasd_integrations.retrieval.memory import MemoryDocuments
from rasd_integrations.types import Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What a retriever passes to each search of its vector store."""

    filters: Any = None
    node_ids: Sequence[str] | None = None
    doc_ids: Sequence[str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def allows(self, chunk: Chunk) -> bool:
        """Return whether the retriever's lists of nodes and documents, where it has any, hold it."""
        in_nodes = not self.node_ids or chunk.id in self.node_ids
        return in_nodes and (not self.doc_ids or chunk.metadata.get("ref_doc_id") in self.doc_ids)


class LlamaIndexSource:
    """A LlamaIndex vector store, and the index whose document store holds what it does not.

    Searches go to the vector store; the retriever is not called, so nothing that hangs on its events
    sees them.
    """

    def __init__(
        self, vector_store: Any, embed: Any, *, index: Any = None, carried: Carried | None = None
    ) -> None:
        """Hold the store, its embedding and what a retriever carries.

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
        self._carried = carried or Carried()
        self._memory = MemoryDocuments(self._nodes, self._version)

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks in the store's order; ``filter`` is a ``MetadataFilters``."""
        from llama_index.core.vector_stores.types import VectorStoreQuery

        question = VectorStoreQuery(
            query_embedding=self._embedder.query(query).tolist(),
            query_str=query,
            similarity_top_k=k,
            filters=filter or self._carried.filters,
            node_ids=_list_or_none(self._carried.node_ids),
            doc_ids=_list_or_none(self._carried.doc_ids),
        )
        result = self._store.query(question, **self._carried.options)
        nodes = result.nodes or self._held(result.ids or ())
        return [node_to_chunk(node, rank) for rank, node in enumerate(nodes)]

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks of ``chunk``'s document that pass the filter, in reading order."""
        filters = filter or self._carried.filters
        if self._holds_text:
            found = self._stored_document(chunk, filters)
        else:
            found = self._held_document(chunk, _predicate(filters))
        return [c for c in found if self._carried.allows(c)]

    def fingerprint(self) -> str:
        """Return the store's class with a hash of its nodes' ids, or with the collection's size."""
        name = type(self._store).__name__
        if self._index is not None and not self._holds_text:
            return f"{name}-{digest(*self._index.index_struct.nodes_dict.values()).hex()}"
        client = self._store.client
        if hasattr(client, "count") and hasattr(client, "id"):
            from rasd_integrations.retrieval.chroma_store import ChromaDocuments

            return f"{name}-{ChromaDocuments(lambda: client).fingerprint()}"
        return name

    def _held_document(self, chunk: Chunk, allowed: Callable[[Chunk], bool]) -> list[Chunk]:
        """Return the document out of the document store, which lists the nodes of each source.

        Nodes made by hand have no source; they are grouped by their metadata, at more cost.
        """
        docstore = self._index.docstore
        if not has_document_key(chunk.metadata) and chunk.id and docstore.document_exists(chunk.id):
            chunk = node_to_chunk(docstore.get_node(chunk.id))

        def fetch(key: str, value: Any) -> list[Chunk]:
            if key == "ref_doc_id":
                infos = [docstore.get_ref_doc_info(value)]
            else:
                every = docstore.get_all_ref_doc_info() or {}
                infos = [i for i in every.values() if i.metadata.get(key) == value]
            indexed = set(self._index.index_struct.nodes_dict.values())
            ids = [n for info in infos if info is not None for n in info.node_ids if n in indexed]
            nodes = docstore.get_nodes(ids, raise_error=False)
            return [c for n in nodes if n is not None and allowed(c := node_to_chunk(n))]

        return document_of(chunk, fetch) or self._memory.document(chunk, allowed)

    def _held(self, positions: Iterable[str]) -> list[Any]:
        """Return the document store's nodes at the vector store's ids; some may be deleted there."""
        names = self._index.index_struct.nodes_dict if self._index is not None else {}
        ids = [names[p] for p in positions if p in names]
        nodes = self._index.docstore.get_nodes(ids, raise_error=False) if ids else []
        return [node for node in nodes if node is not None]

    def _nodes(self) -> list[Chunk]:
        ids = dict.fromkeys(self._index.index_struct.nodes_dict.values())
        nodes = self._index.docstore.get_nodes(list(ids), raise_error=False)
        return [node_to_chunk(node) for node in nodes if node is not None]

    def _version(self) -> int:
        # The hashes of all nodes: a node replaced under its id is seen too.
        hashes = self._index.docstore.get_all_document_hashes()
        return hash((tuple(self._index.index_struct.nodes_dict), frozenset(hashes.items())))

    def _stored_document(self, chunk: Chunk, filters: Any) -> list[Chunk]:
        from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

        if not has_document_key(chunk.metadata) and chunk.id:
            found = self._store.get_nodes([chunk.id])
            chunk = node_to_chunk(found[0]) if found else chunk

        def fetch(key: str, value: Any) -> list[Chunk]:
            parts: list[Any] = [MetadataFilter(key=key, value=value)]
            where = MetadataFilters(filters=[*parts, filters] if filters else parts)
            return [node_to_chunk(node) for node in self._store.get_nodes(None, filters=where)]

        return document_of(chunk, fetch)


def from_index(obj: Any) -> LlamaIndexSource:
    """Return the source of a ``VectorStoreIndex``, or of a ``VectorIndexRetriever`` with its filters."""
    held = vars(obj)  # the retriever publishes none of these
    index = held.get("_index", obj)
    carried = Carried(
        filters=held.get("_filters"),
        node_ids=held.get("_node_ids"),
        doc_ids=held.get("_doc_ids"),
        options=held.get("_kwargs") or {},
    )
    embed = held.get("_embed_model")
    return LlamaIndexSource(index.vector_store, embed, index=index, carried=carried)


def _predicate(filters: Any) -> Callable[[Chunk], bool]:
    if not is_a(filters, "llama_index", "MetadataFilters"):
        plain = metadata_predicate(filters)
        return lambda chunk: plain(chunk.metadata)
    from llama_index.core.vector_stores.utils import build_metadata_filter_fn

    def allowed(chunk: Chunk) -> bool:
        return bool(build_metadata_filter_fn(lambda _: dict(chunk.metadata), filters)(""))

    return allowed


def _list_or_none(values: Sequence[str] | None) -> list[str] | None:
    return None if values is None else list(values)
