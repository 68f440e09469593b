"""Every framework's way of naming tools, choices and formats means one thing, or is refused."""

from __future__ import annotations

import json

import pytest

from rasd_integrations import ConfigurationError, Grammar, ToolUse

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
SUB = {"name": "sub"}
OUTER = [{"type": "function", "function": ADD}, {"type": "function", "function": SUB}]


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        (None, "auto"),
        (False, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        (True, "required"),
        ("any", "required"),
        ("required", "required"),
        ("sub", "sub"),
        ({"type": "function", "function": {"name": "sub"}}, "sub"),
        ({"type": "tool", "name": "sub"}, "sub"),
        ({"type": "any"}, "required"),
    ],
)
def test_every_form_of_tool_choice(given, choice):
    """What LangChain, LlamaIndex, OpenAI and Anthropic write."""
    assert ToolUse.of(OUTER, given).choice == choice


@pytest.mark.parametrize(
    ("choice", "visible", "forced"),
    [
        ("auto", ["add", "sub"], []),
        ("none", [], []),
        ("required", ["add", "sub"], ["add", "sub"]),
        ("sub", ["add", "sub"], ["sub"]),
    ],
)
def test_what_a_choice_shows_and_forces(choice, visible, forced):
    """'none' hides the tools; with a forced one the prompt still shows the others."""
    use = ToolUse.of(OUTER, choice)
    assert [f["name"] for f in use.functions] == visible
    assert [f["name"] for f in use.forced] == forced


def test_bare_functions_are_taken():
    """A tool without OpenAI's outer mapping is one all the same."""
    assert ToolUse.of([ADD, SUB]) == ToolUse.of(OUTER)


@pytest.mark.parametrize(
    ("choice", "given", "parallel"),
    [
        ("auto", None, True),
        ("required", None, False),
        ("required", True, True),
        ("auto", False, False),
    ],
)
def test_a_forced_answer_is_one_call_unless_more_are_asked_for(choice, given, parallel):
    """Small models that must call do not stop calling by themselves."""
    assert ToolUse.of(OUTER, choice, parallel=given).parallel is parallel


def test_strict_follows_the_tools_own_word():
    """OpenAI's strict is a field of the function; the argument overrides it."""
    strict = [{"type": "function", "function": {**ADD, "strict": True}}]
    assert ToolUse.of(strict).strict
    assert not ToolUse.of(strict, strict=False).strict
    assert not ToolUse.of(OUTER).strict


@pytest.mark.parametrize("choice", [None, "auto", "none", False])
def test_no_tools_is_no_tool_use(choice):
    """Without tools and without a required call there is nothing to do."""
    assert ToolUse.of([], choice) is None
    assert ToolUse.of(None, choice) is None


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "required", "no tools are given"),
        (OUTER, "mul", "must be 'auto', 'required', 'none' or one of the tools: add, sub"),
        (OUTER, 7, "tool_choice is 7"),
        ([{"type": "function"}], None, "A tool is {'type': 'function'}"),
        (["add"], None, "A tool is 'add'"),
        ([ADD, ADD], None, "share a name"),
    ],
)
def test_what_cannot_be_met_is_refused(tools, choice, message):
    """The error names the value and the valid ones."""
    with pytest.raises(ConfigurationError, match=message):
        ToolUse.of(tools, choice)


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string"}}}, {"type": "string"}),
    ],
)  # fmt: skip
def test_response_formats(given, schema):
    """OpenAI's three forms."""
    grammar = Grammar.of_response_format(given)
    assert (None if grammar is None else json.loads(grammar.source)) == schema


@pytest.mark.parametrize("given", [{"type": "xml"}, "json", {"type": "json_schema"}, {}])
def test_unknown_response_formats_are_refused(given):
    """With the forms that there are."""
    with pytest.raises(ConfigurationError, match="response_format is"):
        Grammar.of_response_format(given)


@pytest.mark.parametrize(("kind", "source"), [("yaml", "a"), ("regex", "")])
def test_grammars_without_sense_are_refused(kind, source):
    """A kind that is none, a source that is empty."""
    with pytest.raises(ConfigurationError):
        Grammar(kind, source)
