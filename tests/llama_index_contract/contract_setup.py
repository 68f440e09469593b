"""What every group of the LlamaIndex contract is told about the LLM under test, and what they share."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
from fakes_llama_index import WordEmbedding
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms import LLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import TextNode

QUESTION = "Who built the lighthouse at Cape Wrath?"
FACT = "The lighthouse at Cape Wrath was built by Robert Stevenson in 1828."
KEY = "Stevenson"
FACTS = [
    FACT,
    "Sourdough needs flour, water, salt and patience.",
    "The printing press spread through Europe in fifty years.",
]
WAYS = pytest.mark.parametrize("way", ["whole", "async", "stream", "astream"])
STREAMS = pytest.mark.parametrize("way", ["stream", "astream"])


def said(text: str, role: str = "user") -> list[ChatMessage]:
    """Return a conversation of one message."""
    return [ChatMessage(role=role, content=text)]


async def chat(llm: LLM, messages: Sequence[ChatMessage], way: str, **options: Any) -> list[Any]:
    """Return the responses of a chat endpoint, one where the answer is whole."""
    if way == "whole":
        return [llm.chat(messages, **options)]
    if way == "async":
        return [await llm.achat(messages, **options)]
    if way == "stream":
        return list(llm.stream_chat(messages, **options))
    return [r async for r in await llm.astream_chat(messages, **options)]


async def complete(llm: LLM, text: str, way: str, **options: Any) -> list[Any]:
    """Return the responses of a completion endpoint, one where the answer is whole."""
    if way == "whole":
        return [llm.complete(text, **options)]
    if way == "async":
        return [await llm.acomplete(text, **options)]
    if way == "stream":
        return list(llm.stream_complete(text, **options))
    return [r async for r in await llm.astream_complete(text, **options)]


def index_of(*nodes: TextNode) -> VectorStoreIndex:
    """Return nodes in an index."""
    return VectorStoreIndex(list(nodes), embed_model=WordEmbedding())


def text_of(responses: Sequence[Any]) -> str:
    """Return the answer that the last response holds."""
    last = responses[-1]
    return (last.message.content if hasattr(last, "message") else last.text) or ""


class ContractSetup:
    """What a subclass says of its LLM; see :class:`llama_index_contract.LLMContract`."""

    max_tokens_option = "max_tokens"
    stop_option = "stop"
    context_window: int | None = None
    bos: str | None = None
    query_step = 0.0  # seconds that a step takes longer under a query whose event loop may wait for less than it
    secret_options: Mapping[str, Any] = MappingProxyType({})

    def make_llm(self, **options: Any) -> LLM:
        """Return a new LLM; ``options`` are the framework's own, ``system_prompt`` and the like."""
        raise NotImplementedError

    def prompts_read(self) -> list[str]:
        """Return the prompts that the model read so far, special tokens included."""
        pytest.skip("the prompts that the model reads cannot be seen")

    def steps(self) -> int:
        """Return how many forward passes the model did so far."""
        pytest.skip("the model's steps cannot be counted")

    def slow_down(self, seconds: float) -> None:
        """Have each forward pass take that much longer."""
        pytest.skip("the model cannot be slowed down")

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text as the model reads it."""
        pytest.skip("the model's tokens cannot be counted")

    def configure(self, llm: LLM) -> None:
        """Set LlamaIndex's global settings to the LLM, as its users are told to; put back after each test."""
        Settings.llm = llm

    @pytest.fixture
    def llm(self) -> LLM:
        """Return the LLM under test."""
        return self.make_llm()

    @pytest.fixture
    def caller(self, llm: LLM) -> FunctionCallingLLM:
        """Return the LLM under test as one that calls functions, or skip."""
        if not isinstance(llm, FunctionCallingLLM):
            pytest.skip("it is no FunctionCallingLLM")
        return llm

    @pytest.fixture
    def configured(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
        """Return the LLM under test, made the framework's default."""
        monkeypatch.setattr("llama_index.core.global_tokenizer", None)
        for name in ("_llm", "_prompt_helper"):
            monkeypatch.setattr(Settings, name, None)
        self.configure(llm)
        return llm

    @pytest.fixture
    def index(self) -> VectorStoreIndex:
        """Return a few facts in an index."""
        return index_of(*(TextNode(text=text) for text in FACTS))

    @pytest.fixture
    def memory(self) -> ChatMemoryBuffer:
        """Return a memory of one turn, without the database that the default one leaves open."""
        turn = [*said("Let us talk of lighthouses."), *said("Gladly.", "assistant")]
        return ChatMemoryBuffer.from_defaults(turn, token_limit=4000)

    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fail whatever opens a connection; the model is here."""

        def refuse(_self: socket.socket, address: Any, *_: Any) -> None:
            pytest.fail(f"a connection to {address} was opened")

        for name in ("connect", "connect_ex"):
            monkeypatch.setattr(socket.socket, name, refuse)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **_: refuse(None, a))
