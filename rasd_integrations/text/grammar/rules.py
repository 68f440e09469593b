"""Writes the Lark rules of an answer: its thought, text and tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.response_format import Grammar, ToolUse
from rasd_integrations.text.grammar.schema import prepared, without_unique_items
from rasd_integrations.text.tool_formats import ToolFormat

ANSWER = "answer"
"""Name of the user's own Lark grammar, next to the rules made here."""


def answer_rules(
    grammar: Grammar | None,
    tools: ToolUse | None,
    tool_format: ToolFormat | None,
    thought_end: str | None,
    control: Mapping[str, int],
) -> tuple[list[str], str | None]:
    """Return the Lark rules of an answer, and the user's own grammar if they refer to it.

    Raises:
        ConfigurationError: Both a grammar and calls that must be made are given.
    """
    rules: list[str] = []
    own: str | None = None
    answers: list[str] = []
    if tools is not None and tool_format is not None and (tools.forced or tools.visible):
        if tools.forced and grammar is not None:
            msg = (
                f"A grammar is given, but tool_choice {tools.choice!r} demands a call. Leave out one "
                f"of them, or use tool_choice='auto'."
            )
            raise ConfigurationError(msg)
        rules += _call_rules(tools, tool_format, control)
        answers.append("calls")
        if not tools.forced and grammar is None:
            answers = ["free"]
            rules += _free_rules(tools, tool_format, control)
    if grammar is not None:
        rules.append(f"text: {_text_rule(grammar)}")
        own = grammar.source if grammar.kind == "lark" else None
        answers.append("text")
    start = f"({' | '.join(answers)})"
    if thought_end is not None:
        if thought_end in control:  # text cannot contain it
            rules += [f"thought: THOUGHT? <[{control[thought_end]}]>", "THOUGHT: /(?s:.+)/"]
        else:
            rules.append(f"thought[lazy]: /(?s:.*){_escaped(thought_end)}/")
        rules.append("SPACE: /\\s+/")
        start = f"thought SPACE? {start}"
    return [f"start: {start}", *rules], own


def _text_rule(grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        return f"%json {json.dumps(prepared(json.loads(grammar.source)))}"
    if grammar.kind == "regex":
        pattern = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", grammar.source)
        return f"/{pattern}/"
    return f"@{ANSWER}"


def _call_rules(tools: ToolUse, form: ToolFormat, control: Mapping[str, int]) -> list[str]:
    """Return the rules of ``calls``: one call, or several if ``parallel``."""
    functions = tools.forced or tools.functions
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
    more = f"({_terms(form.separator, control)} call)*" if tools.parallel else ""
    rules.append(
        _rule("calls", _terms(form.opening, control), "call", more, _terms(form.closing, control))
    )
    return rules + [
        _call_rule(f"call_{i}", form.before_arguments(function["name"]), function, form, control)
        for i, function in enumerate(functions)
    ]


def _free_rules(tools: ToolUse, form: ToolFormat, control: Mapping[str, int]) -> list[str]:
    """Return the rules of ``free``: text in which the opening mark of a call begins one."""
    mark = form.mark
    if mark in control:  # text cannot contain it
        return ["free: TEXT | TEXT? calls", "TEXT: /(?s:.+)/"]
    if not mark:  # bare JSON is a call only at the beginning of the answer
        return ["free: TEXT | calls", "TEXT: /[^{](?s:.*)/"]
    functions = tools.functions
    several = f"({_terms(form.separator, control)} call)*" if tools.parallel else ""
    hops = "hop*" if tools.parallel else "hop?"
    firsts = " | ".join(f"first_{i}" for i in range(len(functions)))
    rules = [
        f"free: {hops} TEXT?",
        "TEXT: /(?s:.+)/",
        _rule("hop", "trigger", f"({firsts})", several, _terms(form.closing, control)),
        f"trigger[lazy]: /(?s:.*){_escaped(mark)}/",
    ]
    for i, function in enumerate(functions):
        before = (form.opening + form.before_arguments(function["name"])).removeprefix(mark)
        rules.append(_call_rule(f"first_{i}", before, function, form, control))
    return rules


def _call_rule(
    name: str,
    before: str,
    function: Mapping[str, Any],
    form: ToolFormat,
    control: Mapping[str, int],
) -> str:
    arguments = arguments_rule(function)
    return _rule(name, _terms(before, control), arguments, _terms(form.tail, control))


def _rule(name: str, *parts: str) -> str:
    return f"{name}: {' '.join(part for part in parts if part)}"


def arguments_rule(function: Mapping[str, Any]) -> str:
    """Return the Lark rule of a function's arguments."""
    given = function.get("parameters")
    schema = {"type": "object", "properties": {}, **(given if isinstance(given, Mapping) else {})}
    # Frameworks read arguments into typed values, in which a set drops its duplicates.
    return f"%json {json.dumps(prepared(without_unique_items(schema)))}"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", "\\/")


def _terms(text: str, control: Mapping[str, int]) -> str:
    """Return ``text`` as Lark terms: control tokens as ids, the rest as strings."""
    if not text:
        return ""
    names = sorted((re.escape(name) for name in control), key=len, reverse=True)
    parts = re.split(f"({'|'.join(names)})", text) if names else [text]
    return " ".join(
        f"<[{control[part]}]>" if part in control else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )
