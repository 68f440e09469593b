"""Converts an answer's deltas to LangChain's message chunks, joins these, and shows quotes as citations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, InvalidToolCall
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.block_translators import register_translator
from langchain_core.messages.content import Citation, ContentBlock, TextContentBlock
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
_PROVIDER = "rasd"
_TITLES = ("title", "source", "file_path", "file_name", "url")  # names in stores' metadata
_URLS = ("url", "source")


class MessageChunks:
    """Makes the message chunks of one answer; a chunk carries text, reasoning or calls, never two of them."""

    def __init__(
        self,
        model_name: Callable[[], str],
        info_of: Callable[[TextDelta], dict[str, Any] | None],
        output_version: str | None = None,
    ) -> None:
        """Start an answer.

        Args:
            model_name: Returns who answers; asked at the end.
            info_of: Returns the ``generation_info`` of a delta, if it has any.
            output_version: LangChain's, to be streamed in.
        """
        self._model_name, self._info_of = model_name, info_of
        self._is_v1 = output_version == "v1"
        self._kinds: list[str] = []  # of v1's blocks so far, in order
        self._calls: dict[int, InvalidToolCall] = {}

    def push(self, delta: TextDelta) -> Iterator[ChatGenerationChunk]:
        """Yield the chunks of ``delta``; while text is held back none, but for log-probabilities."""
        info = self._info_of(delta)
        for chunk in self._chunks(delta):
            chunk.generation_info, info = info, None
            yield chunk
        if info is not None:
            yield ChatGenerationChunk(message=AIMessageChunk(content=""), generation_info=info)

    def _chunks(self, delta: TextDelta) -> Iterator[ChatGenerationChunk]:
        if delta.reasoning:
            self._note("reasoning")
            yield _chunk(additional_kwargs={REASONING: delta.reasoning})
        if delta.text:
            self._note("text")
            yield _chunk(content=delta.text)
        # One delta a chunk: LangChain adds up deltas of one call over chunks, not within one.
        for call in delta.tool_calls:
            self._note("call")
            yield _chunk(tool_call_chunks=[self._call(call)])
        if delta.finish_reason is not None and delta.stats is not None:
            yield self._last(delta.finish_reason, delta.stats)

    def _note(self, kind: str) -> None:
        if self._kinds[-1:] != [kind]:
            self._kinds.append(kind)

    def _call(self, delta: ToolCallDelta) -> Any:
        call = self._calls.setdefault(
            delta.index, invalid_tool_call(name=delta.name, args="", id=delta.id)
        )
        call["args"] = f"{call['args']}{delta.arguments}"
        index = delta.index + (_AFTER_TEXT if self._is_v1 else 0)
        return tool_call_chunk(name=delta.name, args=delta.arguments, id=delta.id, index=index)

    def _last(self, finish_reason: FinishReason, stats: DecodingStats) -> ChatGenerationChunk:
        # All of it on the last chunk only: LangChain adds numbers and joins strings over chunks.
        metadata = {
            "model_name": self._model_name(),
            "model_provider": _PROVIDER,
            "finish_reason": finish_reason,
            "rasd": stats.as_dict(),
        }
        broken = [
            {**call, "error": f"{fault} ({_END[finish_reason]})"}
            for call in self._calls.values()
            if (fault := _fault(call["args"] or ""))
        ]
        return _chunk(
            content=self._last_content(metadata),
            additional_kwargs={INVALID_CALLS: broken} if broken else {},
            chunk_position="last",
            usage_metadata=usage_metadata(stats),
            response_metadata=metadata,
        )

    def _last_content(self, metadata: Mapping[str, Any]) -> str | list[TextContentBlock]:
        """Return an empty text, or for v1 a block with the citations of an earlier block.

        LangChain numbers v1's blocks by changes of their type, and would put late citations in a block of their own.
        """
        texts = [i for i, kind in enumerate(self._kinds) if kind == "text"]
        if not self._is_v1 or not _quotes(metadata) or texts == [len(self._kinds) - 1]:
            return ""
        if len(texts) > 1:  # positions in the whole text are none in its parts
            return []
        return [{**_cited("", metadata), "index": texts[0]}]


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


def _content_blocks(message: AIMessage) -> list[ContentBlock]:
    """Return LangChain's standard blocks of a message, its text with the quotes as citations."""
    metadata = message.response_metadata
    others = {name: value for name, value in metadata.items() if name != "model_provider"}
    blocks = message.model_copy(update={"response_metadata": others}).content_blocks
    if not isinstance(message.content, str) or not _quotes(metadata):
        return blocks
    if not message.content and isinstance(message, AIMessageChunk):  # a stream's last chunk
        return [_cited("", metadata), *blocks]
    return [_cited(b["text"], metadata) if b["type"] == "text" else b for b in blocks]


def _quotes(metadata: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = metadata.get("rasd", {}).get("quotes", ())
    return found


def _cited(text: str, metadata: Mapping[str, Any]) -> TextContentBlock:
    """Return a text block with the quotes that are still in ``text``; without a text, with all."""
    annotations = [
        _citation(q)
        for q in _quotes(metadata)
        if not text or text[q["start"] : q["end"]] == q["text"]
    ]
    return {"type": "text", "text": text, "annotations": [*annotations]}


def _citation(quote: Mapping[str, Any]) -> Citation:
    found = Citation(
        type="citation",
        start_index=quote["start"],
        end_index=quote["end"],
        cited_text=quote["text"],
        extras={name: quote[name] for name in ("chunk_id", "chunk_start", "metadata")},
    )
    texts = {k: v for k, v in quote["metadata"].items() if isinstance(v, str) and v}
    if title := next((texts[name] for name in _TITLES if name in texts), None):
        found["title"] = title
    if url := next((texts[name] for name in _URLS if "://" in texts.get(name, "")), None):
        found["url"] = url
    return found


register_translator(_PROVIDER, _content_blocks, _content_blocks)


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
