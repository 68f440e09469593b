"""Converts LlamaIndex's messages to the dicts that chat templates read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from rasd_integrations.errors import PromptError
from rasd_integrations.llama_index.tools import calls_in
from rasd_integrations.text.prompt.blocks import log_passed_over
from rasd_integrations.types import Message

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.FUNCTION: "tool",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_message(message: ChatMessage) -> Message:
    """Return a message as chat templates read it.

    Tool calls are read in both of the framework's forms. Cache points mean nothing to a local model, and citations
    repeat the text. Other blocks of an assistant or a tool are skipped, with one line in the log.

    Raises:
        PromptError: A block that is not text in what a user or system message says, named by its type.
    """
    role = _ROLES.get(message.role, message.role.value)
    texts: list[str] = []
    thoughts: list[str] = []
    left_out: list[str] = []
    for block in _flat(message.blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.content or "")
        elif isinstance(block, ToolCallBlock | CachePoint | CitationBlock):
            continue
        elif role in ("assistant", "tool"):
            left_out.append(block.block_type)
        else:
            msg = (
                f"A {message.role.value} message holds a block of type {block.block_type!r}, but "
                f"this model reads text only. Send the text of it instead."
            )
            raise PromptError(msg)
    if left_out:
        log_passed_over(role, left_out)
    plain: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if role == "assistant":
        if thought := "\n".join(thoughts):
            plain["reasoning_content"] = thought
        if calls := calls_in(message):
            plain["tool_calls"] = [_call(call) for call in calls]
    if role == "tool":
        given = message.additional_kwargs
        plain |= {name: given[name] for name in ("tool_call_id", "name") if given.get(name)}
    return plain


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return ``messages`` as chat templates read them.

    Raises:
        PromptError: A block that is not text.
    """
    return [to_message(message) for message in messages]


def _flat(blocks: Sequence[Any]) -> Iterator[Any]:
    """Yield blocks, and in place of one that can be cited what it holds."""
    for block in blocks:
        yield from block.content if isinstance(block, CitableBlock) else (block,)


def _call(call: ToolCallBlock) -> dict[str, Any]:
    function = {"name": call.tool_name, "arguments": call.tool_kwargs}
    return {"id": call.tool_call_id, "type": "function", "function": function}
