"""Converts LangChain's tools and response formats to the engine's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_function, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.response_format import Grammar, ToolUse
from rasd_integrations.text.grammar.schema import without_unique_items

if TYPE_CHECKING:
    from typing import TypeAlias

Tool: TypeAlias = "Mapping[str, Any] | type | Callable[..., Any] | BaseTool"
"""What LangChain takes for a tool: an object, a function, a class, or a schema in any provider's form."""

_LEGACY = {"functions": "tools", "function_call": "tool_choice"}
_REFERENCE = re.compile(r'"#/(?:\$defs|definitions)/([^"]+)"')


def openai_tool(tool: Tool, *, strict: bool | None = None) -> dict[str, Any]:
    """Return ``tool`` in OpenAI's form.

    Raises:
        ConfigurationError: LangChain cannot make a tool of it.
    """
    with _explained("a tool", tool):
        form = convert_to_openai_tool(tool, strict=strict)
    if strict is not None and isinstance(form.get("function"), Mapping):
        # LangChain leaves what has this form already as it is.
        form = {**form, "function": {**form["function"], "strict": strict}}
    arguments = tool.tool_call_schema if isinstance(tool, BaseTool) else tool
    if _is_model(arguments) and _is_recursive(schema := json_schema(arguments)):
        form["function"]["parameters"] = (
            schema  # LangChain writes out references, as far as it goes
        )
    return form


def take_tool_use(options: dict[str, Any]) -> ToolUse | None:
    """Pop the options of tools from a call's ``options``; return ``None`` if there are no tools.

    Raises:
        ConfigurationError: A choice that cannot be met, a tool without a name, or OpenAI's old
            ``functions`` and ``function_call``.
    """
    for old, new in _LEGACY.items():
        if options.pop(old, None) is not None:
            msg = (
                f"{old}= is OpenAI's old form and not supported. Pass {new}=, or call bind_tools()."
            )
            raise ConfigurationError(msg)
    tools: object = options.pop("tools", None) or []
    if not isinstance(tools, list | tuple):
        msg = (
            f"tools is {tools!r}, but must be a list of functions, classes, tools or their schemas."
        )
        raise ConfigurationError(msg)
    return ToolUse.of(
        [openai_tool(tool) for tool in tools],
        options.pop("tool_choice", None),
        parallel=options.pop("parallel_tool_calls", None),
        strict=options.pop("strict", None),
    )


def answer_grammar(response_format: Any) -> Grammar | None:
    """Return the grammar of an OpenAI ``response_format``, or of a class with a schema.

    Raises:
        ConfigurationError: It is neither.
    """
    if isinstance(response_format, type):
        return Grammar.json_schema(json_schema(response_format))
    return Grammar.of_response_format(response_format)


def json_schema(schema: Any) -> dict[str, Any]:
    """Return the JSON schema of a pydantic class, a TypedDict or a schema in any provider's form.

    A class reads arrays of unique items into sets, which drop doubles, so its schema does not ask for them.

    Raises:
        ConfigurationError: LangChain, or pydantic, cannot make a schema of it.
    """
    if _is_model(schema):
        whole = schema.model_json_schema if hasattr(schema, "model_json_schema") else schema.schema
        with _explained("a schema", schema):
            return dict(without_unique_items(whole()))
    if isinstance(schema, Mapping):
        if schema.get("type") in ("function", "json_schema"):
            schema = dict(schema.get(schema["type"]) or {})
        if isinstance(schema.get("schema"), Mapping):
            return dict(schema["schema"])
        if not {"parameters", "input_schema", "toolSpec"} & {*schema}:
            return dict(schema)
    with _explained("a schema", schema):
        return dict(convert_to_openai_function(schema).get("parameters") or {"type": "object"})


@contextmanager
def _explained(what: str, given: object) -> Iterator[None]:
    try:
        yield
    except Exception as err:  # LangChain and pydantic raise many kinds over what they do not know
        msg = (
            f"{given!r} cannot be made {what}: {err}. Give a function, a pydantic class, a TypedDict or a "
            f"schema, with a name or title and a description."
        )
        raise ConfigurationError(msg) from err


def _is_model(schema: object) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def _is_recursive(schema: Mapping[str, Any]) -> bool:
    """True if a schema's definitions refer to themselves."""
    definitions = {**schema.get("$defs", {}), **schema.get("definitions", {})}
    uses = {name: set(_REFERENCE.findall(json.dumps(d))) for name, d in definitions.items()}
    for _ in uses:
        for used in uses.values():
            used |= {further for name in used for further in uses.get(name, ())}
    return any(name in used for name, used in uses.items())
