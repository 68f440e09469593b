"""A raw faiss index: vectors only, so texts and embedding come from the caller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval.embedding import Embedder
from rasd_integrations.retrieval.items import to_chunk
from rasd_integrations.retrieval.memory import ListSource
from rasd_integrations.types import Chunk


class FaissSource(ListSource):
    """A faiss index with its texts (or chunks, documents, nodes) and embedding."""

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
        super().__init__(())
        self._vectors = index
        self._texts = texts
        self._embed_query = Embedder(embed).query

    def fingerprint(self) -> str:
        """Return the number of vectors and a hash of the texts."""
        return f"faiss-{self._vectors.ntotal}-{super().fingerprint()}"

    def _nearest(self, query: str, most: int | None) -> Iterable[Chunk]:
        total = int(self._vectors.ntotal)
        vector = self._embed_query(query)
        if vector.shape[0] != self._vectors.d:
            msg = (
                f"embed gives {vector.shape[0]} dimensions, but the faiss index has {self._vectors.d}. "
                "Give the embedding that the index was built with."
            )
            raise RetrievalError(msg)
        if not total:
            return []
        # faiss knows no metadata: with a filter all are ranked, then filtered.
        _, found = self._vectors.search(vector[None], total if most is None else min(most, total))
        return [c for i in found[0] if (c := self._at(int(i))) is not None]

    def _load(self) -> list[Chunk]:
        ids = self._texts if isinstance(self._texts, Mapping) else range(len(self._texts))
        return [c for i in ids if (c := self._at(i)) is not None]

    def _version(self) -> object:
        return self._vectors.ntotal, len(self._texts)

    def _at(self, i: int) -> Chunk | None:
        try:
            item = self._texts[i] if i >= 0 else None  # faiss says -1 for "no more"
        except LookupError:
            return None  # removed from the texts, still in the index
        chunk = to_chunk(item)
        return chunk if isinstance(chunk, Chunk) else None
