"""Structured output: a model bound to a schema, and the parser that reads its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap
from langchain_core.utils.json import parse_partial_json
from langchain_core.utils.pydantic import is_basemodel_subclass

from rasd_integrations.config import reject_unknown
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain.tools import Tool, json_schema, openai_tool

if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    from langchain_core.language_models import LanguageModelInput

    from rasd_integrations.langchain.chat_models import ChatRASD

Method: TypeAlias = "Literal['function_calling', 'json_schema', 'json_mode']"
_METHODS = ("function_calling", "json_schema", "json_mode")


def structured_output(
    llm: ChatRASD,
    schema: Any,
    *,
    method: Method,
    include_raw: bool,
    strict: bool | None,
    tools: Sequence[Tool] | None,
    **unknown: Any,
) -> Runnable[LanguageModelInput, Any]:
    """Return ``llm`` bound to ``schema``, followed by the parser; see ``ChatRASD.with_structured_output``.

    Raises:
        ConfigurationError: An unknown option, or a combination that cannot be met.
        ValueError: Nothing that LangChain can read a schema of.
    """
    known = ("schema", "method", "include_raw", "strict", "tools")
    reject_unknown(unknown, known, "with_structured_output")
    _check(schema, method, include_raw=include_raw, strict=strict, tools=tools)
    trace = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
    options: dict[str, Any] = {} if schema is None else {"ls_structured_output_format": trace}
    name = None
    bound: Runnable[LanguageModelInput, AIMessage]
    if method == "function_calling":
        tool = openai_tool(schema, strict=strict)
        name = tool["function"]["name"]
        bound = llm.bind_tools([tool], tool_choice=name, parallel_tool_calls=False, **options)
    elif method == "json_mode":
        bound = llm.bind(response_format={"type": "json_object"}, **options)
    else:
        inner = {"name": "answer", "schema": json_schema(schema)}
        options["response_format"] = {"type": "json_schema", "json_schema": inner}
        bound = llm.bind_tools(tools, strict=strict, **options) if tools else llm.bind(**options)
    is_model = isinstance(schema, type) and is_basemodel_subclass(schema)
    parser = StructuredParser(answer_class=schema if is_model else None, call=name)
    if not include_raw:
        return bound | parser
    return RunnableMap(raw=bound) | RunnableLambda(parser.beside_raw, name="parsed")


def _check(
    schema: Any,
    method: str,
    *,
    include_raw: bool,
    strict: bool | None,
    tools: Sequence[Tool] | None,
) -> None:
    msg = None
    if method not in _METHODS:
        msg = f"method is {method!r}, but must be one of {', '.join(_METHODS)}."
    elif schema is None and method != "json_mode":
        msg = f"method {method!r} needs a schema. Pass one, or use method='json_mode'."
    elif strict is not None and method == "json_mode":
        msg = f"strict is {strict}, but 'json_mode' holds to no schema. Use method='json_schema'."
    elif tools and not (method == "json_schema" and include_raw):
        msg = "tools= needs method='json_schema' and include_raw=True: the answer may be a call instead."
    if msg:
        raise ConfigurationError(msg)


class StructuredParser(BaseCumulativeTransformOutputParser[Any]):
    """Parses an answer into an object; a stream into growing partial objects."""

    answer_class: Any = None
    """The objects' pydantic class; None gives dicts."""
    call: str | None = None
    """Name of the tool whose call has the object as arguments; None reads the text."""

    @property
    def _type(self) -> str:
        return "rasd-structured"

    def parse(self, text: str) -> Any:
        """Parse ``text``.

        Raises:
            OutputParserException: It is no object of the schema.
        """
        return self._built(self._loaded(text), text)

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Parse an answer; ``None`` while there is no object yet.

        Raises:
            OutputParserException: The answer has ended and is no object of the schema.
        """
        generation = result[0]
        if not isinstance(generation, ChatGeneration):
            return self.parse(generation.text)
        message = generation.message
        text = str(message.text) if self.call is None else self._arguments(message)
        ended = message.response_metadata.get("finish_reason")
        if ended or not partial:
            return self._built(self._loaded(text, message), text, message)
        try:
            value = parse_partial_json(text)
            return self._built(value, text) if isinstance(value, dict | list) else None
        except ValueError:  # not enough of it yet
            return None

    def beside_raw(self, raw: dict[str, BaseMessage]) -> dict[str, Any]:
        """Return the message, its object, and the error if it has none."""
        message, parsed, error = raw["raw"], None, None
        calls = isinstance(message, AIMessage) and message.tool_calls
        if self.call is not None or not calls:
            try:
                parsed = self.parse_result([ChatGeneration(message=message)])
            except Exception as err:  # noqa: BLE001 - handed to the caller, as LangChain promises
                error = err
        return {"raw": message, "parsed": parsed, "parsing_error": error}

    def _arguments(self, message: BaseMessage) -> str:
        """Return the arguments of the call as text, verbatim if a chunk still has them."""
        for kind in ("tool_call_chunks", "tool_calls", "invalid_tool_calls"):
            for call in getattr(message, kind, ()):
                if call["name"] == self.call:
                    args = call["args"]
                    return args or "" if isinstance(args, str | None) else json.dumps(args)
        return ""

    def _loaded(self, text: str, message: BaseMessage | None = None) -> Any:
        try:
            return json.loads(text, strict=False)
        except ValueError as err:
            if text:
                msg = f"The answer is no JSON ({err}). {_cut(message) or _STOPPED}"
            else:
                what = "text" if self.call is None else f"call of {self.call}"
                msg = f"The answer has no {what}. {_cut(message) or _STOPPED}"
            raise OutputParserException(msg, llm_output=text) from err

    def _built(self, value: Any, text: str, message: BaseMessage | None = None) -> Any:
        if self.answer_class is None:
            return value
        validate = getattr(self.answer_class, "model_validate", None) or self.answer_class.parse_obj
        try:
            return validate(value)
        except ValueError as err:
            msg = f"The answer is no {self.answer_class.__name__}: {err}. {_cut(message)}"
            raise OutputParserException(msg, llm_output=text) from err


_STOPPED = "A stop string may have cut it."


def _cut(message: BaseMessage | None) -> str:
    """Return advice for an answer that ``max_tokens`` cut; else nothing."""
    if message is None or message.response_metadata.get("finish_reason") != "length":
        return ""
    spent = (getattr(message, "usage_metadata", None) or {}).get("output_tokens")
    return (
        f"It was cut at max_tokens, {spent} tokens. Raise max_tokens, or limit the length of texts and "
        f"lists in the schema."
    )
