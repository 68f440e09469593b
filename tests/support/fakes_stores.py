"""Small embeddings that need no weights, and documents that were cut with overlap."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

from chromadb.api.types import EmbeddingFunction
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from llama_index.core.base.embeddings.base import BaseEmbedding

DIMENSION = 256

TEXTS = {
    "tides.txt": (
        "The harbour of Odal keeps a tide table cut in slate. "
        "Every spring the pilots copy it by candle light. "
        "A copy that is wrong by one finger strands a ship. "
        "The slate itself was carved by a widow named Brenna. "
        "She measured the water for nineteen years. "
        "Her last mark stands below the others, unexplained."
    ),
    "bees.txt": (
        "Bees of the northern valley sleep beneath the snow. "
        "Their keepers sing to the hives on the first of March. "
        "A hive that does not answer is opened with a wooden knife. "
        "The honey tastes of heather and a little of smoke. "
        "Merchants from the coast pay for it in copper. "
        "No keeper has ever sold a queen."
    ),
}


def embed_text(text: str, dimension: int = DIMENSION) -> list[float]:
    """Return a bag of hashed words as a vector of length 1."""
    vector = [0.0] * dimension
    for word in re.findall(r"\w+", text.lower()):
        vector[int(hashlib.md5(word.encode()).hexdigest(), 16) % dimension] += 1.0
    norm = math.sqrt(sum(x * x for x in vector)) or 1.0
    return [x / norm for x in vector]


def embed_texts(texts: Sequence[str]) -> list[list[float]]:
    """Return one vector a text: a plain embedding function."""
    return [embed_text(t) for t in texts]


class WordEmbeddings(Embeddings):
    """The same for LangChain."""

    def __init__(self, dimension: int = DIMENSION) -> None:
        self.dimension = dimension

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [embed_text(t, self.dimension) for t in texts]

    def embed_query(self, text: str) -> list[float]:
        return embed_text(text, self.dimension)


class WordFunction(EmbeddingFunction):
    """The same for Chroma, under a name that a collection remembers."""

    def __init__(self) -> None:
        pass

    def __call__(self, input: Sequence[str]) -> Any:
        return embed_texts(input)

    @staticmethod
    def name() -> str:
        return "rasd-words"

    def get_config(self) -> dict[str, Any]:
        return {}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> WordFunction:
        return WordFunction()


class WordModel(BaseEmbedding):
    """The same for LlamaIndex."""

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed_text(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed_text(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return embed_text(text)


def cut(name: str, text: str, size: int = 120, overlap: int = 40) -> list[Document]:
    """Cut a text into overlapping pieces that know their place, as LangChain's splitters do."""
    step = size - overlap
    starts = range(0, max(len(text) - overlap, 1), step)
    return [
        Document(text[i : i + size], metadata={"source": name, "start_index": i}) for i in starts
    ]


def documents() -> list[Document]:
    """Return both texts in pieces."""
    return [piece for name, text in TEXTS.items() for piece in cut(name, text)]
