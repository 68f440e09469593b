"""Converts an answer's deltas to LangChain's message chunks, and joins these."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, InvalidToolCall
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult

from rasd_integrations.langchain.messages import REASONING
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.answer.parser import parsed_arguments
from rasd_integrations.types import FinishReason, TextDelta, ToolCallDelta

INVALID_CALLS = "invalid_tool_calls"
"""Where a stream's last chunk lists malformed calls: LangChain repairs cut JSON when it joins chunks."""

_END: dict[FinishReason, str] = {
    "length": "the answer was cut at max_tokens",
    "stop": "the answer ended at a stop string or by itself",
    "tool_calls": "the model wrote it so",
}
# v1 output has calls in one list with text and reasoning, which LangChain numbers from 0.
_AFTER_TEXT = 1000


class MessageChunks:
    """Makes the message chunks of one answer; a chunk carries text, reasoning or calls, never two of them."""

    def __init__(self, model_name: str, output_version: str | None) -> None:
        """Start an answer of ``model_name`` in LangChain's ``output_version``."""
        self._model_name = model_name
        self._first_index = _AFTER_TEXT if output_version == "v1" else 0
        self._calls: dict[int, InvalidToolCall] = {}

    def push(self, delta: TextDelta) -> Iterator[ChatGenerationChunk]:
        """Yield the chunks of ``delta``; none while text is held back."""
        if delta.reasoning:
            yield _chunk(additional_kwargs={REASONING: delta.reasoning})
        if delta.text:
            yield _chunk(content=delta.text)
        # One delta a chunk: LangChain adds up deltas of one call over chunks, not within one.
        for call in delta.tool_calls:
            yield _chunk(tool_call_chunks=[self._call(call)])
        if delta.finish_reason is not None and delta.stats is not None:
            yield self._last(delta.finish_reason, delta.stats)

    def _call(self, delta: ToolCallDelta) -> Any:
        call = self._calls.setdefault(
            delta.index, invalid_tool_call(name=delta.name, args="", id=delta.id)
        )
        call["args"] = f"{call['args']}{delta.arguments}"
        index = self._first_index + delta.index
        return tool_call_chunk(name=delta.name, args=delta.arguments, id=delta.id, index=index)

    def _last(self, finish_reason: FinishReason, stats: DecodingStats) -> ChatGenerationChunk:
        # All of it on the last chunk only: LangChain adds numbers and joins strings over chunks.
        metadata = {
            "model_name": self._model_name,
            "model_provider": "rasd",
            "finish_reason": finish_reason,
            "rasd": stats.as_dict(),
        }
        broken = [
            {**call, "error": f"{fault} ({_END[finish_reason]})"}
            for call in self._calls.values()
            if (fault := _fault(call["args"] or ""))
        ]
        return _chunk(
            additional_kwargs={INVALID_CALLS: broken} if broken else {},
            chunk_position="last",
            usage_metadata=usage_metadata(stats),
            response_metadata=metadata,
        )


def whole_answer(chunks: Sequence[ChatGenerationChunk]) -> ChatResult:
    """Join ``chunks`` to an answer."""
    result = generate_from_stream(iter(chunks))
    for generation in result.generations:
        mark_invalid_calls(generation.message)
    return result


def mark_invalid_calls(message: BaseMessage) -> None:
    """Move malformed calls to ``invalid_tool_calls``, so that agents do not run them."""
    if not isinstance(message, AIMessage):
        return
    broken: dict[str | None, Any] = {
        call["id"]: call for call in message.additional_kwargs.pop(INVALID_CALLS, ())
    }
    # What LangChain could not read and is not broken: an object written as a JSON string.
    quoted = [
        tool_call(name=call["name"] or "", args=arguments, id=call["id"])
        for call in message.invalid_tool_calls
        if (arguments := parsed_arguments(call["args"] or "")) is not None
    ]
    if broken or quoted:
        valid = [call for call in message.tool_calls if call["id"] not in broken]
        message.tool_calls = [*valid, *quoted]
        message.invalid_tool_calls = [*broken.values()]
        if isinstance(message.content, list):  # v1 output has the calls among its blocks as well
            message.content = [
                broken.get(b.get("id"), b) if isinstance(b, dict) else b for b in message.content
            ]


def usage_metadata(stats: DecodingStats) -> UsageMetadata:
    """Return an answer's token usage."""
    return UsageMetadata(
        input_tokens=stats.prompt_tokens,
        output_tokens=stats.generated_tokens,
        total_tokens=stats.prompt_tokens + stats.generated_tokens,
        input_token_details=InputTokenDetails(cache_read=stats.cached_prompt_tokens),
        output_token_details=OutputTokenDetails(reasoning=stats.reasoning_tokens),
    )


def _chunk(**fields: Any) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(**{"content": "", **fields}))


def _fault(arguments: str) -> str | None:
    """Return the error in a call's arguments, if any."""
    if parsed_arguments(arguments) is not None:
        return None
    try:
        json.loads(arguments, strict=False)
    except (ValueError, RecursionError) as err:
        return f"The arguments are no JSON: {err}"
    return "The arguments are JSON, but no object"
