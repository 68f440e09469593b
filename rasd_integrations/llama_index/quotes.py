"""Which of a response's source nodes its answer quotes word for word."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import GEN_CREATED, getgeneratorstate, isgenerator
from typing import Any

from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.chat_engine.types import StreamingAgentChatResponse
from llama_index.core.schema import NodeWithScore

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.retrieval.items import node_to_chunk
from rasd_integrations.stats import Quote
from rasd_integrations.text.answer.quotes import find_quotes


def quoted_nodes(response: Any, answer: str | None = None) -> list[NodeWithScore]:
    """Return the source nodes that the answer quotes, in their order; for arguments see :func:`response_quotes`."""
    quoted = {quote.chunk_id for quote in response_quotes(response, answer)}
    return [node for node in _nodes(response) if node.node.node_id in quoted]


def response_quotes(response: Any, answer: str | None = None) -> tuple[Quote, ...]:
    """Return what the answer quotes of its source nodes; positions in a node are those of its text.

    Args:
        response: A query or chat engine's response, or nodes. A streaming response is read to its end.
        answer: The text; needed with nodes, and with a stream that was read elsewhere.

    Raises:
        ConfigurationError: The answer's text is not known.
    """
    text = _answer(response) if answer is None else answer
    return find_quotes(text, [node_to_chunk(n.node, i) for i, n in enumerate(_nodes(response))])


def _nodes(response: Any) -> Sequence[NodeWithScore]:
    nodes = getattr(response, "source_nodes", response)
    if isinstance(nodes, list | tuple):
        return nodes
    msg = (
        f"A {type(response).__name__} has no source nodes. Give a query or chat engine's response, or nodes; the "
        f"quotes of an LLM's own response are its raw['rasd']['quotes']."
    )
    raise ConfigurationError(msg)


def _answer(response: Any) -> str:
    text: str | None = None
    if isinstance(response, StreamingResponse | AsyncStreamingResponse):
        stream = response.response_gen
        text = response.response_txt
        if text is None and isgenerator(stream) and getgeneratorstate(stream) == GEN_CREATED:
            text = str(response)
    elif not isinstance(response, StreamingAgentChatResponse) or response.is_done:
        text = str(response) if hasattr(response, "response") else None
    if text is None:
        msg = (
            f"The whole answer of this {type(response).__name__} is not known here. Read it to its end, and give "
            f"its text as answer=."
        )
        raise ConfigurationError(msg)
    return text
