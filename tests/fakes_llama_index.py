"""Stand-ins for the LlamaIndex tests: an engine with RASD's face that only writes down, and embeddings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from llama_index.core.embeddings import BaseEmbedding

from rasd_integrations.config import SamplingParams
from rasd_integrations.errors import PromptError
from rasd_integrations.prompting import PromptHints
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Generation, TextChunk

ANSWER = ("The ", "lighthouse ", "", "was built in 1887.")


@dataclass(frozen=True)
class Call:
    """What one call handed to the engine."""

    method: str
    prompt: Any
    params: SamplingParams
    hints: PromptHints | None

    @property
    def text(self) -> str:
        """All text of the prompt."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(message["content"] for message in self.prompt)


class FakeRASD:
    """RASD's face over a scripted answer; every call is kept in ``calls``."""

    window = 8192
    has_chat_template = True
    loaded_objects: tuple[Any, ...] = ()

    def __init__(self, model: str, **options: Any) -> None:
        self.model_name = model
        self.options = options
        self.stats = DecodingStats()
        self.calls: list[Call] = []
        self.attached: list[Any] = []
        self.warmed: list[str] = []
        self.loads = 0
        self.is_closed = False

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, drafter_model: Any = None, **options: Any):
        fake = cls(getattr(model, "name_or_path", "loaded"), **options)
        fake.loaded_objects = (model, tokenizer, drafter_model)
        return fake

    def ensure_loaded(self) -> None:
        self.loads += 1

    def attach(self, store: Any) -> None:
        self.attached.append(store)

    def warm(self, documents: list[str]) -> None:
        self.warmed += documents

    def close(self) -> None:
        self.is_closed = True

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in re.findall(r"\w+|[^\w\s]", text)]

    def count_tokens(self, prompt: Any) -> int:
        if isinstance(prompt, str):
            return len(self.encode(prompt)) + 1
        return sum(len(self.encode(message["content"])) + 5 for message in prompt) + 3

    def stream(self, prompt, params=None, *, hints=None) -> Iterator[TextChunk]:
        self._record("stream", prompt, params, hints)
        return self._chunks(prompt)

    def generate(self, prompt, params=None, *, hints=None) -> Generation:
        self._record("generate", prompt, params, hints)
        return self._join(self._chunks(prompt))

    async def agenerate(self, prompt, params=None, *, hints=None) -> Generation:
        self._record("agenerate", prompt, params, hints)
        return self._join(self._chunks(prompt))

    def astream(self, prompt, params=None, *, hints=None) -> AsyncIterator[TextChunk]:
        self._record("astream", prompt, params, hints)
        return self._achunks(prompt)

    def _record(self, method, prompt, params, hints) -> None:
        if not prompt:
            msg = "The prompt is empty."
            raise PromptError(msg)
        self.calls.append(Call(method, prompt, params, hints))

    def _chunks(self, prompt) -> Iterator[TextChunk]:
        for piece in ANSWER:
            yield TextChunk(text=piece)
        stats = DecodingStats(prompt_tokens=self.count_tokens(prompt), generated_tokens=7)
        yield TextChunk(text="", finish_reason="stop", stats=stats)

    async def _achunks(self, prompt) -> AsyncIterator[TextChunk]:
        for chunk in self._chunks(prompt):
            yield chunk

    @staticmethod
    def _join(chunks: Iterator[TextChunk]) -> Generation:
        parts = list(chunks)
        text = "".join(part.text for part in parts)
        return Generation(text, (), "stop", parts[-1].stats)


class WordEmbedding(BaseEmbedding):
    """A bag of hashed words: texts that share words are near, on every machine."""

    def _embed(self, text: str) -> list[float]:
        vector = [0.0] * 512
        for word in re.findall(r"\w+", text.lower()):
            digest = hashlib.blake2b(word.encode(), digest_size=4).digest()
            vector[int.from_bytes(digest, "little") % 512] += 1.0
        norm = sum(value * value for value in vector) ** 0.5 or 1.0
        return [value / norm for value in vector]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed(text)
