"""Tool calls in LlamaIndex's forms: blocks, the older ``additional_kwargs``, and selections to call."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool
from pydantic_core import from_json

from rasd_integrations.errors import ConfigurationError, DecodingError, PromptError
from rasd_integrations.text.answer.parser import parsed_arguments

logger = logging.getLogger(__name__)

_OLD = "tool_calls"


def tool_specs(tools: Sequence[Any] | None) -> list[Any]:
    """Return tools in OpenAI's form; what is no LlamaIndex tool is unchanged.

    Raises:
        ConfigurationError: ``tools`` is not a list.
    """
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        msg = f"tools is a {type(tools).__name__}, but must be a list of tools."
        raise ConfigurationError(msg)
    return [_spec(tool) if isinstance(tool, BaseTool) else tool for tool in tools]


def arguments_of(text: str) -> dict[str, Any] | str:
    """Return a call's arguments as a mapping; text that is no JSON object (yet) unchanged."""
    found = parsed_arguments(text) if text else None  # nothing yet may be a call that was cut
    return text if found is None else found


def calls_in(message: ChatMessage) -> list[ToolCallBlock]:
    """Return the tool calls of a message: its blocks, else those in the older form.

    Raises:
        PromptError: A call in the older form without a function's name.
    """
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    return blocks or [_block(call) for call in message.additional_kwargs.get(_OLD) or ()]


def keep_first_call(message: ChatMessage) -> None:
    """Remove all tool calls but the first from a message."""
    first = calls_in(message)[:1]
    message.blocks = [b for b in message.blocks if not isinstance(b, ToolCallBlock)] + first
    message.additional_kwargs.pop(_OLD, None)


def selection(call: ToolCallBlock, *, cut: bool) -> ToolSelection:
    """Return a call in the form that LlamaIndex runs.

    Incomplete or malformed arguments are repaired; if that is impossible they are empty, and the tool says what it
    misses.

    Args:
        call: The call.
        cut: The answer is whole and ended at ``max_tokens``.

    Raises:
        DecodingError: The answer was cut within the arguments; half a call must not be run.
    """
    arguments: Any = call.tool_kwargs
    if isinstance(arguments, str):
        if cut:
            msg = (
                f"The answer reached max_tokens within a call of {call.tool_name!r}: its arguments end with "
                f"{arguments[-40:]!r}. Raise max_tokens."
            )
            raise DecodingError(msg)
        try:
            arguments = from_json(arguments, allow_partial="trailing-strings")
        except ValueError:
            logger.debug("The arguments of %r are no JSON: %r", call.tool_name, arguments)
            arguments = {}
    return ToolSelection(
        tool_id=call.tool_call_id or "", tool_name=call.tool_name, tool_kwargs=arguments
    )


def _spec(tool: BaseTool) -> dict[str, Any]:
    spec = tool.metadata.to_openai_tool(skip_length_check=True)
    # Its own name, brackets and all, by which the caller will look it up; no service asks for another.
    spec["function"]["name"] = tool.metadata.get_name()
    return spec


def _block(call: Any) -> ToolCallBlock:
    """Return a call in any of its older forms: OpenAI's as mapping or object, or a ``ToolSelection``."""
    if isinstance(call, ToolCallBlock):
        return call
    if isinstance(call, ToolSelection):
        return ToolCallBlock(
            tool_call_id=call.tool_id, tool_name=call.tool_name, tool_kwargs=call.tool_kwargs
        )
    function = _field(call, "function")
    name, arguments = _field(function, "name"), _field(function, "arguments")
    if not isinstance(name, str) or not name:
        msg = (
            f"A message's additional_kwargs['tool_calls'] holds {call!r}, but must hold calls like "
            f"{{'id': ..., 'function': {{'name': ..., 'arguments': ...}}}}. Send ToolCallBlocks."
        )
        raise PromptError(msg)
    if isinstance(arguments, Mapping):
        given: dict[str, Any] | str = dict(arguments)
    else:
        given = arguments_of(str(arguments)) if arguments else {}
    return ToolCallBlock(tool_call_id=_field(call, "id"), tool_name=name, tool_kwargs=given)


def _field(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)
