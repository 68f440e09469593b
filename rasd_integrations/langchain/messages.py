"""Converts LangChain messages to the dicts that chat templates read."""

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
from rasd_integrations.text.prompt.blocks import blocks_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rasd_integrations.types import Message

REASONING = "reasoning_content"
"""Where a message keeps the model's thoughts: LangChain's own name in `additional_kwargs`, and the templates'."""

_ROLES: dict[type[BaseMessage], str] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
    FunctionMessage: "tool",
}
_CALLS = {"tool_call": "args", "tool_use": "input"}  # block type: the name of its arguments
_THOUGHTS = {"reasoning": "reasoning", "thinking": "thinking"}  # block type: the name of its text
# An assistant's own blocks that are read above, or that repeat what the message's fields say.
_ASSISTANT_BLOCKS = frozenset(
    {*_CALLS, *_THOUGHTS, "tool_call_chunk", "invalid_tool_call", "function_call", "redacted_thinking"}
)  # fmt: skip


def template_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """Return ``messages`` as ``role``/``content`` dicts, in order.

    Raises:
        PromptError: A content block without text in what a user or system message says, or a message class
            without a role.
    """
    called = (call for message in messages for call in _calls(message))
    names = {call["id"]: call["name"] for call in called if isinstance(call["id"], str)}
    return [_template_message(m, place, names) for place, m in enumerate(messages)]


def _template_message(message: BaseMessage, place: int, names: Mapping[str, str]) -> Message:
    role = _role(message, place)
    passed_over = _ASSISTANT_BLOCKS if isinstance(message, AIMessage) else ()
    text = blocks_text(message.content, role, passed_over)
    out: dict[str, Any] = {"role": role, "content": text}
    if calls := [_template_call(call) for call in _calls(message)]:
        out["tool_calls"] = calls
    if thoughts := _thoughts(message):
        out[REASONING] = thoughts
    if isinstance(message, ToolMessage):
        out["tool_call_id"] = message.tool_call_id
    if out["role"] == "tool":
        name = message.name or names.get(out.get("tool_call_id", ""))
        out |= {"name": name} if name else {}
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


def _blocks(message: BaseMessage) -> list[dict[str, Any]]:
    return [] if isinstance(message.content, str) else [b for b in message.content if isinstance(b, dict)]  # fmt: skip


def _calls(message: BaseMessage) -> Iterator[dict[str, Any]]:
    """Yield an assistant's calls, broken ones too, each with its arguments as ``args``."""
    if not isinstance(message, AIMessage):
        return
    seen = []
    for call in (*message.tool_calls, *message.invalid_tool_calls):
        seen.append(call["id"])
        yield {**call}
    for block in _blocks(message):
        arguments = _CALLS.get(str(block.get("type")))
        if arguments is not None and block.get("id") not in seen:
            own = {"id": block.get("id"), "name": str(block.get("name") or "")}
            yield {**own, "args": block.get(arguments)}


def _template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    # Chat templates run `tojson` on the arguments themselves, so a dict stays a dict.
    function = {"name": call["name"] or "", "arguments": call["args"] or {}}
    return {"id": call["id"], "type": "function", "function": function}


def _thoughts(message: BaseMessage) -> str:
    if not isinstance(message, AIMessage):
        return ""
    kept = message.additional_kwargs.get(REASONING)
    if isinstance(kept, str) and kept:
        return kept
    found = ((b, _THOUGHTS.get(str(b.get("type")))) for b in _blocks(message))
    return "".join(str(block.get(name) or "") for block, name in found if name)
