"""Stand-ins for the LlamaIndex tests: an engine with RASD's face that writes down and says, and embeddings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from fakes_rasd import FakeEngine
from llama_index.core import __version__ as llama_index_version
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.llms import LLM
from packaging.version import Version

from rasd_integrations.errors import PromptError
from rasd_integrations.runtime.pipeline import Request, joined
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import FinishReason, Generation, TextDelta, ToolCallDelta

ANSWER = ("The ", "lighthouse ", "", "was built in 1887.")


def since(version: str) -> None:
    """Skip the test of something that LlamaIndex itself can from ``version`` on."""
    if Version(llama_index_version) < Version(version):
        pytest.skip(f"LlamaIndex can do this from {version} on; this is {llama_index_version}")


def shown(llm: LLM) -> dict[str, Any]:
    """Return what LlamaIndex tells observers of ``llm``: before 0.14.23 all that is serialised."""
    told: dict[str, Any] = llm.to_payload() if hasattr(llm, "to_payload") else llm.to_dict()
    return told


def thought(text: str) -> TextDelta:
    """Return a piece of a thought."""
    return TextDelta(text="", reasoning=text)


def called(name: str, *arguments: str, index: int = 0) -> tuple[TextDelta, ...]:
    """Return the pieces of a tool call: its name, then its arguments."""
    first = ToolCallDelta(index, f"call_{index}", name)
    deltas = [first, *(ToolCallDelta(index, arguments=text) for text in arguments)]
    return tuple(TextDelta(text="", tool_calls=(delta,)) for delta in deltas)


@dataclass(frozen=True)
class Call(Request):
    """What one call handed to the engine, and by which method."""

    method: str = ""

    @property
    def text(self) -> str:
        """All text of the prompt."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(message["content"] for message in self.prompt)


class FakeRASD(FakeEngine):
    """Says scripted answers.

    Attributes:
        answers: What the calls say, in order: texts, or pieces of text, thoughts and calls. The calls after
            these say ``ANSWER``.
        ends: How answers end that do not end by themselves.
    """

    window = 8192

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        self.answers: Sequence[str | Sequence[str | TextDelta]] = ()
        self.ends: FinishReason | None = None

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in re.findall(r"\w+|[^\w\s]", text)]

    def count_tokens(self, prompt: Any) -> int:
        if isinstance(prompt, str):
            return len(self.encode(prompt)) + 1
        return sum(len(self.encode(message["content"])) + 5 for message in prompt) + 3

    def stream(self, prompt, params=None, **known) -> Iterator[TextDelta]:
        return _now(self._say("stream", Request.of(prompt, params, **known)))

    def generate(self, prompt, params=None, **known) -> Generation:
        return joined(self._say("generate", Request.of(prompt, params, **known)))

    async def agenerate(self, prompt, params=None, **known) -> Generation:
        return joined(self._say("agenerate", Request.of(prompt, params, **known)))

    def astream(self, prompt, params=None, **known) -> AsyncIterator[TextDelta]:
        return _later(self._say("astream", Request.of(prompt, params, **known)))

    def _say(self, method: str, request: Request) -> list[TextDelta]:
        prompt = request.prompt
        if not prompt:
            msg = "The prompt is empty."
            raise PromptError(msg)
        place = len(self.calls)
        self.calls.append(Call(prompt, request.params, request.hints, request.tools, method=method))
        answer = self.answers[place] if place < len(self.answers) else ANSWER
        given = (answer,) if isinstance(answer, str) else answer
        pieces = [TextDelta(text=piece) if isinstance(piece, str) else piece for piece in given]
        by_itself = "tool_calls" if any(piece.tool_calls for piece in pieces) else "stop"
        stats = DecodingStats(prompt_tokens=self.count_tokens(prompt), generated_tokens=7)
        return [*pieces, TextDelta(text="", finish_reason=self.ends or by_itself, stats=stats)]


def _now(chunks: Iterable[TextDelta]) -> Iterator[TextDelta]:
    yield from chunks


async def _later(chunks: Iterable[TextDelta]) -> AsyncIterator[TextDelta]:
    for chunk in chunks:
        yield chunk


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
