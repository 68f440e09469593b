"""Neighbours of the LangChain edge: an engine that answers from a script, one that records, embeddings."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

from fakes_rasd import FakeEngine
from langchain_core.embeddings import Embeddings

from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import TextDelta, ToolCallDelta

ANSWER = "Ada wrote it."


@dataclass
class Answer:
    """What the fake engine says: thoughts, text, then calls as (name, JSON text)."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish_reason: str | None = None

    def pieces(self):
        for place, word in enumerate(words(self.reasoning)):
            yield TextDelta("", (place,), reasoning=word)
        for place, word in enumerate(words(self.text)):
            yield TextDelta("", (place,))  # bytes held back
            yield TextDelta(word)
        for index, (name, arguments) in enumerate(self.calls):
            yield TextDelta("", tool_calls=(ToolCallDelta(index, f"call_{index}", name),))
            for at in range(0, len(arguments), 5):
                delta = ToolCallDelta(index, arguments=arguments[at : at + 5])
                yield TextDelta("", (at,), tool_calls=(delta,))

    @property
    def end(self):
        return self.finish_reason or ("tool_calls" if self.calls else "stop")


def words(text):
    """Return the words of a text, each but the first with the space before it."""
    return [word if place == 0 else f" {word}" for place, word in enumerate(text.split(" "))] * bool(text)  # fmt: skip


class FakeRASD(FakeEngine):
    """Answers piece by piece with what `answer(prompt)` says."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.steps = 0
        self.open_streams = self.most_open_streams = 0
        self._lock = threading.Lock()
        self.answer = lambda prompt: ANSWER
        self.fail_after = None

    def _pieces(self, call):
        self.ensure_loaded()
        self.calls.append(call)
        with self._lock:
            self.open_streams += 1
            self.most_open_streams = max(self.most_open_streams, self.open_streams)
        try:
            answer = self.answer(call.prompt)
            answer = Answer(answer) if isinstance(answer, str) else answer
            stats = DecodingStats(
                prompt_tokens=self.count_tokens(call.prompt), cached_prompt_tokens=2
            )
            stats.reasoning_tokens = len(words(answer.reasoning))
            for piece in answer.pieces():
                if self.fail_after == self.steps:
                    msg = "the fake engine fails here"
                    raise RuntimeError(msg)
                if piece.text:
                    self.steps += 1
                    stats.generated_tokens += 1
                    stats.target_steps += 1
                yield piece
            stats.count("suffix", 4, 3)
            self.stats.add(stats)
            yield TextDelta("", (), answer.end, stats)
        finally:
            with self._lock:
                self.open_streams -= 1

    def stream(self, request):
        return self._pieces(request)

    def stream_to_end(self, request):
        return self.stream(request)

    async def astream(self, request):
        pieces = self._pieces(request)
        try:
            for piece in pieces:
                await asyncio.sleep(0)
                yield piece
        finally:
            pieces.close()

    def count_tokens(self, prompt, tools=None):
        text = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in prompt)
        return len(text.split()) + (len(tools.names) if tools else 0)

    def encode(self, text):
        return list(range(len(text.split())))


class RecordingRASD(RASD):
    """The real engine, which also records every call; `answer(prompt)` scripts what it says."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.calls = []
        self.answer = None

    def _answer(self, request, gate=None):
        self.calls.append(request)
        if self.answer is None:
            return super()._answer(request, gate)
        text = self.answer(request.prompt)
        return (piece for piece in [TextDelta(text, (), "stop", DecodingStats())])


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
