"""Constraints on an answer: a grammar for its text, and the tools to call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import Self

from rasd_integrations.errors import ConfigurationError

GrammarKind = Literal["json_schema", "regex", "lark"]
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that the whole text of an answer must match.

    Attributes:
        kind: The language of ``source``.
        source: A JSON schema as JSON text, a regular expression, or a Lark grammar with ``start``.
    """

    kind: GrammarKind
    source: str

    def __post_init__(self) -> None:
        """Check the kind and that there is a source."""
        if self.kind not in ("json_schema", "regex", "lark"):
            msg = (
                f"A grammar's kind is {self.kind!r}, but must be 'json_schema', 'regex' or 'lark'."
            )
            raise ConfigurationError(msg)
        if not self.source:
            msg = f"A {self.kind} grammar needs its source as text, not {self.source!r}."
            raise ConfigurationError(msg)
        if self.kind == "json_schema":
            _check_schema(self.source)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Self:
        """Return the grammar of a JSON schema.

        Raises:
            ConfigurationError: It is not a JSON schema, or allows nothing.
        """
        try:
            source = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as err:
            msg = (
                f"A JSON schema must be plain JSON, but this one cannot be written as such: {err}."
            )
            raise ConfigurationError(msg) from err
        return cls("json_schema", source)

    @classmethod
    def json_object(cls) -> Self:
        """Return the grammar of any JSON object."""
        return cls.json_schema(_ANY_OBJECT)

    @classmethod
    def of_response_format(cls, response_format: Mapping[str, Any] | None) -> Self | None:
        """Return the grammar of OpenAI's ``response_format``; ``None`` for plain text.

        Raises:
            ConfigurationError: Its type is not ``text``, ``json_object`` or ``json_schema``.
        """
        given = response_format
        kind = given.get("type") if isinstance(given, Mapping) else None
        if given is None or kind == "text":
            return None
        if kind == "json_object":
            return cls.json_object()
        if kind == "json_schema":
            inner = given.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, Mapping) else None
            if isinstance(schema, Mapping):
                return cls.json_schema(schema)
        msg = (
            f"response_format is {given!r}, but must be {{'type': 'text'}}, {{'type': 'json_object'}} or "
            f"{{'type': 'json_schema', 'json_schema': {{'name': ..., 'schema': {{...}}}}}}."
        )
        raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of one answer, and whether they must be called.

    Attributes:
        tools: In OpenAI's form: ``{"type": "function", "function": {"name", "description", "parameters"}}``.
        choice: ``"auto"`` (text or calls), ``"required"`` (at least one call), ``"none"`` (the model does not
            see them), or the name of the tool that must be called.
        parallel: One answer may have several calls.
        strict: Arguments must match their schemas even if no call is required; required ones always do.
    """

    tools: tuple[Mapping[str, Any], ...]
    choice: str = "auto"
    parallel: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        """Check that names are unique and that the choice can be met."""
        names = self.names
        if len(set(names)) < len(names):
            msg = f"Two tools share a name: {', '.join(names)}. Give each its own."
            raise ConfigurationError(msg)
        if self.choice in ("auto", "none"):
            return
        if not names:
            msg = f"tool_choice is {self.choice!r}, but no tools are given. Pass them with tools=[...]."
            raise ConfigurationError(msg)
        if self.choice != "required" and self.choice not in names:
            msg = (
                f"tool_choice is {self.choice!r}, but must be 'auto', 'required', 'none' or one of the "
                f"tools: {', '.join(names)}."
            )
            raise ConfigurationError(msg)

    @property
    def names(self) -> tuple[str, ...]:
        """The tools' names, in order."""
        return tuple(_function(tool)["name"] for tool in self.tools)

    @property
    def visible(self) -> tuple[Mapping[str, Any], ...]:
        """The tools shown in the prompt."""
        return () if self.choice == "none" else self.tools

    @property
    def forced(self) -> tuple[Mapping[str, Any], ...]:
        """The functions of which one must be called; empty if none must."""
        if self.choice in ("auto", "none"):
            return ()
        functions = [_function(tool) for tool in self.tools]
        return tuple(f for f in functions if self.choice in ("required", f["name"]))

    @property
    def functions(self) -> tuple[Mapping[str, Any], ...]:
        """The functions that may be called: ``name``, and a JSON schema ``parameters`` if given."""
        return tuple(_function(tool) for tool in self.visible)

    @classmethod
    def of(
        cls,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: object = None,
        *,
        parallel: bool | None = None,
        strict: bool | None = None,
    ) -> Self | None:
        """Normalise the frameworks' arguments; ``None`` without tools.

        Args:
            tools: In OpenAI's form, with or without the outer ``{"type": "function"}``.
            tool_choice: ``None``, ``"auto"``, ``"none"``, ``"any"``, ``"required"``, a bool, a tool's
                name, or OpenAI's ``{"type": "function", "function": {"name": ...}}``.
            parallel: Default: several calls with ``"auto"``, one if a call is required.
            strict: Default: the tools' own ``strict``.

        Raises:
            ConfigurationError: A tool without a name, or a choice that cannot be met.
        """
        listed = tuple(_outer(tool) for tool in tools or ())
        choice = _choice(tool_choice)
        if not listed and choice in ("auto", "none"):
            return None
        own = any(bool(_function(tool).get("strict")) for tool in listed)
        return cls(
            tools=listed,
            choice=choice,
            parallel=choice == "auto" if parallel is None else parallel,
            strict=own if strict is None else strict,
        )


def _check_schema(source: str) -> None:
    try:
        schema = json.loads(source)
    except (TypeError, ValueError, RecursionError) as err:
        msg = f"A JSON schema must be JSON text, but this one cannot be read: {err}."
        raise ConfigurationError(msg) from err
    if schema is False:
        msg = "The JSON schema is false, which allows no answer. Leave it out, or give an object."
        raise ConfigurationError(msg)
    if schema is not True and not isinstance(schema, dict):
        msg = (
            f"A JSON schema must be an object, but this one is {type(schema).__name__}: {source[:80]}. "
            f"A list of values is {{'enum': [...]}}, of alternatives {{'anyOf': [...]}}."
        )
        raise ConfigurationError(msg)


def _choice(given: object) -> str:
    if isinstance(given, Mapping):
        function = given.get("function")
        inner = function.get("name") if isinstance(function, Mapping) else given.get("name")
        given = inner if inner is not None else given.get("type")
    if given is None or given is False:
        return "auto"
    if given is True or given == "any":
        return "required"
    if isinstance(given, str) and given:
        return given
    msg = (
        f"tool_choice is {given!r}, but must be 'auto', 'required', 'any', 'none' or a tool's name."
    )
    raise ConfigurationError(msg)


def _outer(tool: Any) -> Mapping[str, Any]:
    if isinstance(tool, Mapping):
        bare = "function" not in tool and "name" in tool
        form = {"type": "function", "function": dict(tool)} if bare else tool
        function = form.get("function")
        if (
            isinstance(function, Mapping)
            and isinstance(function.get("name"), str)
            and function["name"]
        ):
            return form
    msg = (
        f"A tool is {tool!r}, but must be {{'type': 'function', 'function': {{'name': ..., "
        f"'parameters': {{...}}}}}}."
    )
    raise ConfigurationError(msg)


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function: Mapping[str, Any] = tool["function"]
    return function
