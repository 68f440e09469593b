"""Neighbours of the LangChain edge: an engine that answers from a script, one that records, embeddings."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

from langchain_core.embeddings import Embeddings

from rasd_integrations.config import SamplingParams
from rasd_integrations.runtime import RASD
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import TextChunk

ANSWER = "Ada wrote it."


@dataclass
class Call:
    """What the engine was asked once."""

    prompt: Any
    params: SamplingParams
    hints: Any


class FakeRASD:
    """RASD's face. Answers word by word with what `answer(prompt)` says, and records every call."""

    window = 2048

    def __init__(self, model, **options):
        self.model_name = str(model)
        self.options = options
        self.calls = []
        self.steps = 0
        self.open_streams = 0
        self.thread = None
        self.loaded = self.closed = False
        self.warmed = []
        self.sources = []
        self.stats = DecodingStats()
        self.answer = lambda prompt: ANSWER
        self.fail_after = None

    @classmethod
    def from_model(cls, model, tokenizer, drafter_model=None, **options):
        return cls(f"loaded {model}", tokenizer=tokenizer, drafter_model=drafter_model, **options)

    @property
    def identity(self):
        return {"model": self.model_name, "context": self.options["context"]}

    def ensure_loaded(self):
        self.loaded = True

    def _pieces(self, prompt, params, hints):
        self.ensure_loaded()
        self.calls.append(Call(prompt, params, hints))
        self.open_streams += 1
        try:
            words = self.answer(prompt).split(" ")[: params.max_tokens]
            for place, word in enumerate(words):
                if self.fail_after == place:
                    msg = "the fake engine fails here"
                    raise RuntimeError(msg)
                self.steps += 1
                yield TextChunk("", (place,))  # bytes held back
                yield TextChunk(word if place == 0 else f" {word}", ())
            stats = DecodingStats(
                prompt_tokens=self.count_tokens(prompt),
                cached_prompt_tokens=2,
                generated_tokens=len(words),
                target_steps=len(words),
            )
            stats.count("suffix", 4, 3)
            self.stats.add(stats)
            yield TextChunk("", (), "stop", stats)
        finally:
            self.open_streams -= 1

    def stream(self, prompt, params=None, *, hints=None):
        return self._pieces(prompt, params, hints)

    async def astream(self, prompt, params=None, *, hints=None):
        pieces = self._pieces(prompt, params, hints)
        try:
            for piece in pieces:
                await asyncio.sleep(0)
                yield piece
        finally:
            pieces.close()

    def count_tokens(self, prompt):
        self.thread = threading.current_thread()
        text = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in prompt)
        return len(text.split())

    def encode(self, text):
        return list(range(len(text.split())))

    def warm(self, documents):
        self.warmed.extend(documents)

    def attach(self, store):
        self.sources.append(store)

    def close(self):
        self.closed = True


class RecordingRASD(RASD):
    """The real engine, which also records every call; `answer(prompt)` scripts what it says."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.calls = []
        self.answer = None

    def stream(self, prompt, params=None, *, hints=None):
        self.calls.append(Call(prompt, params, hints))
        if self.answer is None:
            return super().stream(prompt, params, hints=hints)
        return (piece for piece in [TextChunk(self.answer(prompt), (), "stop", DecodingStats())])


class WordEmbeddings(Embeddings):
    """Embeds a text as its counts of hashed words: enough for a store to find the right fact."""

    size = 256

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text):
        vector = [0.0] * self.size
        for word in text.lower().replace("?", " ").replace(".", " ").split():
            vector[hash_of(word) % self.size] += 1.0
        norm = sum(x * x for x in vector) ** 0.5 or 1.0
        return [x / norm for x in vector]


def hash_of(word):
    """Return a number that, unlike `hash`, is the same in every process."""
    value = 0
    for letter in word:
        value = (value * 31 + ord(letter)) % 1_000_003
    return value
