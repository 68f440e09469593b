"""A chromadb collection, bare or inside a framework's class."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval.documents import MAX_DOCUMENT_CHUNKS, document_of
from rasd_integrations.retrieval.embedding import Embedder
from rasd_integrations.retrieval.items import digest, is_a
from rasd_integrations.types import Chunk

_MOST_IDS = 2000  # ids that a fingerprint hashes; a larger collection is told by its size
_INCLUDE = ["documents", "metadatas"]


class ChromaDocuments:
    """The chunks of a collection, read by its own ``where`` filter.

    A text that is replaced under its id keeps its key.
    """

    def __init__(self, collection: Callable[[], Any]) -> None:
        """Read from what ``collection()`` returns: a framework may exchange it (a reset)."""
        self._collection = collection

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks of ``chunk``'s document that pass ``filter``, in reading order."""
        collection = self._collection()

        def find(chunk: Chunk) -> Chunk | None:
            found = collection.get(ids=[chunk.id], include=_INCLUDE) if chunk.id else None
            return next(iter(_chunks(found)), None) if found else None

        def fetch(key: str, value: Any) -> list[Chunk]:
            where = {key: value}
            where = {"$and": [where, filter]} if filter else where
            # One more than a document may have shows that the group is none.
            return _chunks(
                collection.get(where=where, limit=MAX_DOCUMENT_CHUNKS + 1, include=_INCLUDE)
            )

        return document_of(chunk, fetch, find)

    def origin(self) -> Hashable:
        """Return the collection's id."""
        return "chroma", str(self._collection().id)

    def keys(self, most: int, *, filter: Any = None) -> Sequence[Hashable]:
        """Return the ids of the newest chunks; of those that pass a filter the oldest, if there are more."""
        collection = self._collection()
        start = 0 if filter else max(collection.count() - most, 0)
        found = collection.get(where=filter or None, limit=most, offset=start, include=[])
        ids: list[str] = found["ids"]
        return ids

    def read(self, keys: Sequence[Hashable], *, filter: Any = None) -> Mapping[Hashable, str]:
        """Return the texts of these ids."""
        found = self._collection().get(ids=list(keys), where=filter or None, include=["documents"])
        pairs = zip(found["ids"], found["documents"], strict=True)
        return {name: text for name, text in pairs if isinstance(text, str)}

    def fingerprint(self) -> str:
        """Return the collection's id and size, and a hash of the ids if there are not too many."""
        collection = self._collection()
        count = collection.count()
        name = f"chroma-{collection.id}-{count}"
        if count > _MOST_IDS:
            return name
        return f"{name}-{digest(*sorted(collection.get(include=[])['ids'])).hex()}"


class ChromaSource(ChromaDocuments):
    """A raw collection, searched with its own embedding function or with ``embed``."""

    def __init__(self, collection: Any, embed: Any = None) -> None:
        """Hold ``collection``.

        Raises:
            RetrievalError: No ``embed`` is given, and the collection would embed with Chroma's default
                model although it was not filled with that.
        """
        super().__init__(lambda: collection)
        if embed is None:
            require_embedding(collection)
        self._embedder = None if embed is None else Embedder(embed)

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks, nearest first; ``filter`` is Chroma's ``where``."""
        if self._embedder is None:
            question: dict[str, Any] = {"query_texts": [query]}
        else:
            question = {"query_embeddings": [self._embedder.query(query).tolist()]}
        found = self._collection().query(
            **question, n_results=k, where=filter or None, include=_INCLUDE
        )
        return _chunks({key: found[key][0] for key in ("ids", *_INCLUDE)})


def require_embedding(collection: Any) -> None:
    """Raise unless a collection says how it was embedded.

    A collection whose embedding Chroma was not told of (LangChain and LlamaIndex embed themselves)
    silently gets Chroma's default model when it is opened again.

    Raises:
        RetrievalError: Questions would be embedded with the default model, the texts were with another.
    """
    function = getattr(collection, "_embedding_function", None)
    if function is not None and not is_a(function, "chromadb", "DefaultEmbeddingFunction"):
        return
    named = collection.configuration_json.get("embedding_function")
    if isinstance(named, Mapping) and named.get("type") == "known":
        return
    msg = (
        f"The Chroma collection {collection.name!r} does not say how it was embedded, so Chroma would "
        "embed questions with its default model, which is another one. Give the right one: "
        "as_chunk_source(collection, embed=...), or open the store with embedding_function=..."
    )
    raise RetrievalError(msg)


def _chunks(found: Mapping[str, Any]) -> list[Chunk]:
    """Return the rows of a result that hold text; a collection may hold vectors without any."""
    rows = zip(found["ids"], found["documents"], found["metadatas"], strict=True)
    kept = [row for row in rows if isinstance(row[1], str)]
    return [
        Chunk(text, name, rank, _with_node(metadata or {}))
        for rank, (name, text, metadata) in enumerate(kept)
    ]


def _with_node(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata with the offset that LlamaIndex keeps in a node's JSON beside them."""
    plain = {k: v for k, v in metadata.items() if not k.startswith("_node_")}
    try:
        start = json.loads(metadata.get("_node_content", "{}")).get("start_char_idx")
    except (ValueError, TypeError, AttributeError):
        start = None
    return plain if start is None else plain | {"start_char_idx": start}
