"""One interface to the embedding objects of all frameworks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval.items import is_a

Vectors = npt.NDArray[np.float32]


class Embedder:
    """LangChain's ``Embeddings``, LlamaIndex's ``BaseEmbedding``, Chroma's functions, or a callable.

    Questions and texts have methods of their own, since some models embed them differently.
    """

    def __init__(self, embed: Any) -> None:
        """Wrap ``embed``.

        Raises:
            RetrievalError: It is none of these.
        """
        known = ("embed_documents", "get_text_embedding_batch")
        if not callable(embed) and not any(hasattr(embed, name) for name in known):
            msg = (
                f"embed is a {type(embed).__name__}, but must be an embedding object of LangChain, "
                "LlamaIndex or Chroma, or a function from a list of texts to their vectors."
            )
            raise RetrievalError(msg)
        self._embed = embed

    def query(self, text: str) -> Vectors:
        """Return the vector of a question: ``[dimension]`` float32."""
        if hasattr(self._embed, "embed_documents"):
            vectors = [self._embed.embed_query(text)]
        elif hasattr(self._embed, "get_query_embedding"):
            vectors = [self._embed.get_query_embedding(text)]
        elif is_a(self._embed, "chromadb", "EmbeddingFunction"):
            vectors = self._embed.embed_query(input=[text])
        else:
            vectors = self._embed([text])
        vector: Vectors = _checked(vectors, 1)[0]
        return vector

    def texts(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of texts: ``[texts, dimension]`` float32."""
        if hasattr(self._embed, "embed_documents"):
            vectors = self._embed.embed_documents(list(texts))
        elif hasattr(self._embed, "get_text_embedding_batch"):
            vectors = self._embed.get_text_embedding_batch(list(texts))
        else:
            vectors = self._embed(list(texts))
        return _checked(vectors, len(texts))


def _checked(vectors: Any, count: int) -> Vectors:
    array = np.asarray(vectors, dtype=np.float32)
    if array.ndim != 2 or array.shape[0] != count:
        msg = (
            f"embed gave an array of shape {array.shape} for {count} texts, but must give one vector "
            "a text: it is called with a list of texts."
        )
        raise RetrievalError(msg)
    return array
