"""Normalises chat messages for templates, and folds roles that a template refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rasd_integrations.errors import PromptError
from rasd_integrations.text.answer.parser import parsed_arguments
from rasd_integrations.text.control import plain_data
from rasd_integrations.text.prompt.blocks import blocks_text
from rasd_integrations.text.tool_formats import FALLBACK, ToolFormat, results_as_text
from rasd_integrations.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
_OPTIONAL = ("tool_calls", "reasoning_content")


def plain_message(message: Message) -> dict[str, Any]:
    """Return ``message`` with a known role, content as one text, and tool arguments as mappings.

    Empty optional fields are dropped: templates only check if they are present.

    Raises:
        PromptError: It is not a mapping, its role is unknown, a block is not text, or a tool call has no
            name.
    """
    given: object = message
    if not isinstance(given, Mapping):
        msg = f"A message is a {type(message).__name__}, but must be a mapping of role and content."
        raise PromptError(msg)
    role = message.get("role")
    if role not in ROLES:
        msg = f"A message has the role {role!r}. Use one of {', '.join(ROLES)}."
        raise PromptError(msg)
    plain = {k: v for k, v in message.items() if k not in _OPTIONAL or v}
    plain["content"] = _text(message.get("content"), role)
    if calls := plain.get("tool_calls"):
        if not isinstance(calls, list | tuple):
            msg = (
                f"A message's tool_calls is a {type(calls).__name__}, but must be a list of calls."
            )
            raise PromptError(msg)
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return dict(plain_data(plain))


def fold_roles(
    messages: list[dict[str, Any]], format: ToolFormat = FALLBACK
) -> list[dict[str, Any]]:
    """Return the conversation as alternating user and assistant turns.

    System text goes before the first user text, tool results become user text, tool calls become
    assistant text in the markup of ``format``, and turns of the same role are joined. An assistant's
    first turn follows an empty user turn. Reasoning is dropped.
    """
    system = "\n\n".join(m["content"] for m in messages if m["role"] in ("system", "developer"))
    turns: list[dict[str, Any]] = [{"role": "user", "content": system}] if system else []
    for message in results_as_text(messages):
        if message["role"] in ("system", "developer"):
            continue
        role = "assistant" if message["role"] == "assistant" else "user"
        parts = [message["content"], format.written(message.get("tool_calls") or ())]
        content = "\n".join(part for part in parts if part)
        if turns and turns[-1]["role"] == role:
            content = "\n\n".join(part for part in (turns.pop()["content"], content) if part)
        elif not turns and role == "assistant":
            turns.append({"role": "user", "content": ""})
        turns.append({"role": role, "content": content})
    return turns


def _text(content: Any, role: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str | list | tuple):
        return blocks_text(content, role)
    msg = f"A message's content is a {type(content).__name__}, but must be text or a list of text blocks."
    raise PromptError(msg)


def _plain_call(call: Any) -> dict[str, Any]:
    """Return a tool call with its arguments as a mapping, for the template's ``tojson``."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
        msg = (
            f"A message has the tool call {call!r}, but must have {{'id': ..., 'type': 'function', "
            f"'function': {{'name': ..., 'arguments': {{...}}}}}}."
        )
        raise PromptError(msg)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        parsed = parsed_arguments(arguments)
        # A model's JSON may be malformed; the template then quotes it.
        arguments = arguments if parsed is None else parsed
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}
