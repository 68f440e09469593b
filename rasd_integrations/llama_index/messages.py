"""LlamaIndex's messages and responses, to and from the plain records of the core."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from rasd_integrations.errors import PromptError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import FinishReason, Generation, Message, TextChunk

_Response_co = TypeVar("_Response_co", bound=ChatResponse | CompletionResponse, covariant=True)
_Response = TypeVar("_Response", bound=ChatResponse | CompletionResponse)


class Respond(Protocol[_Response_co]):
    """Makes a response of the answer so far."""

    def __call__(
        self, text: str, *, delta: str | None = None, raw: dict[str, Any] | None = None
    ) -> _Response_co:
        """Return the response."""
        ...


_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.FUNCTION: "tool",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_message(message: ChatMessage) -> Message:
    """Return a message as chat templates read it.

    Earlier reasoning is left out, as chat templates ask for; cache points say nothing to a local model.

    Raises:
        PromptError: A block that is not text, named by its type.
    """
    texts: list[str] = []
    tool_calls: list[dict[str, Any]] = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolCallBlock):
            function = {"name": block.tool_name, "arguments": block.tool_kwargs}
            tool_calls.append({"id": block.tool_call_id, "type": "function", "function": function})
        elif not isinstance(block, ThinkingBlock | CachePoint):
            msg = (
                f"A {message.role.value} message holds a block of type {block.block_type!r}, but "
                f"this model reads text only. Send the text of it instead."
            )
            raise PromptError(msg)
    role = _ROLES.get(message.role, message.role.value)
    plain: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if tool_calls:
        plain["tool_calls"] = tool_calls
    if call_id := message.additional_kwargs.get("tool_call_id"):
        plain["tool_call_id"] = call_id
    return plain


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return ``messages`` as chat templates read them.

    Raises:
        PromptError: A block that is not text.
    """
    return [to_message(message) for message in messages]


def raw_response(stats: DecodingStats, finish_reason: FinishReason | None) -> dict[str, Any]:
    """Return what an answer carries as ``raw``: ``usage`` as token counters read it, and ``rasd``."""
    usage = {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
    }
    return {"usage": usage, "rasd": stats.as_dict(), "finish_reason": finish_reason}


def chat_response(
    text: str, *, delta: str | None = None, raw: dict[str, Any] | None = None
) -> ChatResponse:
    """Return the answer so far as a chat response."""
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, raw=raw)


def completion_response(
    text: str, *, delta: str | None = None, raw: dict[str, Any] | None = None
) -> CompletionResponse:
    """Return the answer so far as a completion response."""
    return CompletionResponse(text=text, delta=delta, raw=raw)


def whole_response(respond: Respond[_Response], answer: Generation) -> _Response:
    """Return a whole answer."""
    return respond(answer.text, raw=raw_response(answer.stats, answer.finish_reason))


def _next_response(respond: Respond[_Response], text: str, chunk: TextChunk) -> _Response | None:
    if chunk.stats is None:
        return respond(text, delta=chunk.text) if chunk.text else None
    raw = raw_response(chunk.stats, chunk.finish_reason)
    return respond(text, delta=chunk.text, raw=raw)


def stream_responses(
    respond: Respond[_Response], chunks: Iterator[TextChunk]
) -> Generator[_Response, None, None]:
    """Yield an answer as it grows, the new text as ``delta``; ``raw`` stands on the last response.

    Closing it stops the decoding.
    """
    text = ""
    try:
        for chunk in chunks:
            text += chunk.text
            if (response := _next_response(respond, text, chunk)) is not None:
                yield response
    finally:
        if isinstance(chunks, Generator):
            chunks.close()


async def astream_responses(
    respond: Respond[_Response], chunks: AsyncIterator[TextChunk]
) -> AsyncGenerator[_Response, None]:
    """Yield an answer as it grows, as :func:`stream_responses` does."""
    text = ""
    try:
        async for chunk in chunks:
            text += chunk.text
            if (response := _next_response(respond, text, chunk)) is not None:
                yield response
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
