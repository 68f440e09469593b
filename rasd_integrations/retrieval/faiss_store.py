"""A raw faiss index: vectors only, so the texts and the embedding come from the caller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval.embedding import Embedder
from rasd_integrations.retrieval.items import digest, metadata_predicate, to_chunk
from rasd_integrations.retrieval.memory import MemoryDocuments
from rasd_integrations.types import Chunk


class FaissSource:
    """A faiss index beside its texts (or chunks, documents, nodes) and the function that embeds."""

    def __init__(
        self, index: Any, texts: Sequence[Any] | Mapping[int, Any] | None, embed: Any
    ) -> None:
        """Hold them. ``texts[i]`` belongs to vector ``i``; for an id map, a mapping from its ids.

        Raises:
            RetrievalError: Texts or embedding are missing, or the numbers of texts and vectors differ.
        """
        if texts is None or embed is None:
            missing = "texts" if texts is None else "embed"
            msg = (
                f"A faiss index holds vectors only, and {missing} was not given. Call "
                "as_chunk_source(index, texts=[...], embed=function)."
            )
            raise RetrievalError(msg)
        if len(texts) != index.ntotal:
            msg = (
                f"The faiss index has {index.ntotal} vectors, but texts has {len(texts)} entries. Give "
                "one text a vector, in the order they were added."
            )
            raise RetrievalError(msg)
        self._index = index
        self._texts = texts
        self._embedder = Embedder(embed)
        self._documents = MemoryDocuments(
            self._load, lambda: (self._index.ntotal, len(self._texts))
        )

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks, nearest first.

        Raises:
            RetrievalError: The embedding's dimension is not the index's.
        """
        total = int(self._index.ntotal)
        allowed = metadata_predicate(filter)
        vector = self._embedder.query(query)
        if vector.shape[0] != self._index.d:
            msg = (
                f"embed gives {vector.shape[0]} dimensions, but the faiss index has {self._index.d}. "
                "Give the embedding that the index was built with."
            )
            raise RetrievalError(msg)
        if not total:
            return []
        # faiss knows no metadata: with a filter all are ranked, then filtered.
        _, found = self._index.search(vector[None], total if filter else min(k, total))
        chunks = (self._at(int(i)) for i in found[0])
        kept = (c for c in chunks if c is not None and allowed(c.metadata))
        return [to_chunk(chunk, rank) for rank, chunk in zip(range(k), kept, strict=False)]

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the chunks with the same source; empty for bare texts, which name none."""
        allowed = metadata_predicate(filter)
        return self._documents.document(chunk, lambda c: allowed(c.metadata))

    def fingerprint(self) -> str:
        """Return the number of vectors and a hash of the texts."""
        return f"faiss-{self._index.ntotal}-{digest(*(c.text for c in self._load())).hex()}"

    def _load(self) -> Iterable[Chunk]:
        ids = self._texts if isinstance(self._texts, Mapping) else range(len(self._texts))
        return [c for i in ids if (c := self._at(i)) is not None]

    def _at(self, i: int) -> Chunk | None:
        try:
            item = self._texts[i] if i >= 0 else None  # faiss says -1 for "no more"
        except LookupError:
            return None  # removed from the texts, still in the index
        chunk = to_chunk(item)
        return chunk if isinstance(chunk, Chunk) else None
