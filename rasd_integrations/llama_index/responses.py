"""Converts answers to LlamaIndex's responses, whole or streamed."""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Protocol, TypeAlias, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from rasd_integrations.llama_index.errors import pipeline_errors
from rasd_integrations.llama_index.tools import arguments_of
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import (
    FinishReason,
    Generation,
    TextDelta,
    TokenLogprob,
    ToolCall,
    WrittenLogprob,
)

_Response_co = TypeVar("_Response_co", bound=ChatResponse | CompletionResponse, covariant=True)
_Response = TypeVar("_Response", bound=ChatResponse | CompletionResponse)

Entries: TypeAlias = Callable[[Sequence[TokenLogprob | WrittenLogprob]], list[dict[str, Any]]]
"""Returns tokens' log-probabilities in OpenAI's form."""


class Respond(Protocol[_Response_co]):
    """Makes a response of an answer, whole or so far."""

    def __call__(self, answer: Answer, **fields: Any) -> _Response_co:
        """Return the response; ``fields`` are its ``delta``, ``raw``, ``logprobs`` and ``additional_kwargs``."""
        ...


class Answer:
    """An answer as it grows.

    Attributes:
        text: What it says so far.
        reasoning: The model's thoughts so far.
        calls: The tools that it calls so far; the last one's arguments may be incomplete.
        logprobs: Log-probabilities of its tokens so far, if they are asked for.
    """

    def __init__(
        self,
        text: str = "",
        reasoning: str = "",
        calls: Sequence[ToolCall] = (),
        logprobs: Sequence[TokenLogprob | WrittenLogprob] = (),
    ) -> None:
        """Start with what is known."""
        self.text, self.reasoning = text, reasoning
        self.calls, self.logprobs = list(calls), list(logprobs)

    def add(self, chunk: TextDelta) -> None:
        """Append the next piece."""
        self.text += chunk.text
        self.reasoning += chunk.reasoning
        self.logprobs += chunk.logprobs
        for delta in chunk.tool_calls:
            if delta.index == len(self.calls):
                self.calls.append(ToolCall(delta.id or "", delta.name or "", delta.arguments))
            else:
                call = self.calls[delta.index]
                self.calls[delta.index] = ToolCall(
                    call.id, call.name, call.arguments + delta.arguments
                )

    def message(self) -> ChatMessage:
        """Return it as a message: thoughts, text, tool calls; arguments that are no JSON yet are text."""
        blocks: list[ContentBlock] = []
        if self.reasoning:
            blocks.append(ThinkingBlock(content=self.reasoning))
        if self.text or not self.calls:
            blocks.append(TextBlock(text=self.text))
        blocks += [
            ToolCallBlock(
                tool_call_id=call.id,
                tool_name=call.name,
                tool_kwargs=arguments_of(call.arguments),
            )
            for call in self.calls
        ]
        return ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks)


def chat_response(answer: Answer, **fields: Any) -> ChatResponse:
    """Return an answer as a chat response."""
    return ChatResponse(message=answer.message(), **fields)


def completion_response(answer: Answer, **fields: Any) -> CompletionResponse:
    """Return an answer as a completion response, which has no place for thoughts."""
    return CompletionResponse(text=answer.text, **fields)


def raw_response(stats: DecodingStats, finish_reason: FinishReason | None) -> dict[str, Any]:
    """Return what an answer carries as ``raw``: ``usage`` as token counters read it, and ``rasd``."""
    usage = {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
    }
    return {"usage": usage, "rasd": stats.as_dict(), "finish_reason": finish_reason}


def _last_fields(
    answer: Answer, entries: Entries, stats: DecodingStats, finish_reason: FinishReason | None
) -> dict[str, Any]:
    """Return ``raw``, and ``logprobs`` if there are any."""
    raw = raw_response(stats, finish_reason)
    if not answer.logprobs:
        return {"raw": raw}
    content = entries(answer.logprobs)
    raw["logprobs"] = {"content": content}
    return {"raw": raw, "logprobs": [_alternatives(entry) for entry in content]}


def _alternatives(entry: Mapping[str, Any]) -> list[LogProb]:
    """Return the most likely tokens of a position, as LlamaIndex's OpenAI class does; else the token that was taken."""
    return [
        LogProb(token=one["token"], logprob=one["logprob"], bytes=one["bytes"])
        for one in entry["top_logprobs"] or [entry]
    ]


def whole_response(respond: Respond[_Response], given: Generation, entries: Entries) -> _Response:
    """Return a whole answer."""
    answer = Answer(given.text, given.reasoning, given.tool_calls, given.logprobs)
    return respond(answer, **_last_fields(answer, entries, given.stats, given.finish_reason))


def _next_response(
    respond: Respond[_Response], answer: Answer, chunk: TextDelta, entries: Entries
) -> _Response | None:
    answer.add(chunk)
    fields: dict[str, Any] = {"delta": chunk.text}
    if chunk.reasoning:
        fields["additional_kwargs"] = {"thinking_delta": chunk.reasoning}
    if chunk.stats is not None:
        fields |= _last_fields(answer, entries, chunk.stats, chunk.finish_reason)
    elif not (chunk.text or chunk.reasoning or chunk.tool_calls):
        return None
    return respond(answer, **fields)


def stream_responses(
    respond: Respond[_Response],
    chunks: Iterator[TextDelta],
    in_pipeline: bool,
    entries: Entries,
) -> Generator[_Response, None, None]:
    """Yield an answer as it grows, the new text as ``delta``; ``raw`` and ``logprobs`` are on the last response.

    Closing it stops the decoding.
    """
    answer = Answer()
    try:
        with pipeline_errors(in_pipeline):
            for chunk in chunks:
                if (response := _next_response(respond, answer, chunk, entries)) is not None:
                    yield response
    finally:
        if isinstance(chunks, Generator):
            chunks.close()


async def astream_responses(
    respond: Respond[_Response],
    chunks: AsyncIterator[TextDelta],
    in_pipeline: bool,
    entries: Entries,
) -> AsyncGenerator[_Response, None]:
    """Yield an answer as it grows, as :func:`stream_responses` does."""
    answer = Answer()
    try:
        with pipeline_errors(in_pipeline):
            async for chunk in chunks:
                if (response := _next_response(respond, answer, chunk, entries)) is not None:
                    yield response
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
