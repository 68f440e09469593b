"""LlamaIndex's messages to the dicts that chat templates read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from rasd_integrations.errors import PromptError
from rasd_integrations.llama_index.tools import calls_in
from rasd_integrations.types import Message

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.FUNCTION: "tool",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_message(message: ChatMessage) -> Message:
    """Return a message as chat templates read it.

    Tool calls are read in both of the framework's forms. Thoughts are handed to the template, which knows
    how many turns of them its model reads; cache points say nothing to a local model.

    Raises:
        PromptError: A block that is not text, named by its type.
    """
    texts: list[str] = []
    thoughts: list[str] = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.content or "")
        elif not isinstance(block, ToolCallBlock | CachePoint):
            msg = (
                f"A {message.role.value} message holds a block of type {block.block_type!r}, but "
                f"this model reads text only. Send the text of it instead."
            )
            raise PromptError(msg)
    role = _ROLES.get(message.role, message.role.value)
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


def _call(call: ToolCallBlock) -> dict[str, Any]:
    function = {"name": call.tool_name, "arguments": call.tool_kwargs}
    return {"id": call.tool_call_id, "type": "function", "function": function}
