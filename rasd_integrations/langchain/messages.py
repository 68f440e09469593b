"""LangChain messages to the dicts that chat templates read. Knows no model and no tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from rasd_integrations.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rasd_integrations.types import Message

_ROLES: dict[type[BaseMessage], str] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
    FunctionMessage: "tool",
}
# An assistant's own blocks that repeat what `tool_calls` says, or that no template reads back.
_ASSISTANT_BLOCKS = frozenset(
    {"tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "reasoning", "thinking"}
)


def template_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """Return ``messages`` as ``role``/``content`` dicts, in order.

    Raises:
        PromptError: A content block that is not text, or a message class without a role.
    """
    return [_template_message(message, place) for place, message in enumerate(messages)]


def _template_message(message: BaseMessage, place: int) -> Message:
    out: dict[str, Any] = {"role": _role(message, place), "content": _text(message, place)}
    if isinstance(message, AIMessage) and message.tool_calls:
        out["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if isinstance(message, ToolMessage):
        out["tool_call_id"] = message.tool_call_id
    if message.name and out["role"] == "tool":
        out["name"] = message.name
    return out


def _role(message: BaseMessage, place: int) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    msg = (
        f"Message {place} is a {type(message).__name__}, which has no role in a chat template. "
        f"Send System, Human, AI, Tool or Chat messages."
    )
    raise PromptError(msg)


def _text(message: BaseMessage, place: int) -> str:
    passed = _ASSISTANT_BLOCKS if isinstance(message, AIMessage) else frozenset()
    blocks = [] if isinstance(message.content, str) else message.content
    for block in blocks:
        kind = "text" if isinstance(block, str) else block.get("type")
        if kind != "text" and kind not in passed:
            msg = (
                f"Message {place} ({message.type}) has a content block of type {kind!r}, but this "
                f"model reads text only. Send its text as a 'text' block."
            )
            raise PromptError(msg)
    return str(message.text)


def _tool_call(call: Any) -> dict[str, Any]:
    # Chat templates run `tojson` on the arguments themselves, so these stay a dict.
    function = {"name": call["name"], "arguments": call["args"]}
    return {"id": call["id"], "type": "function", "function": function}
