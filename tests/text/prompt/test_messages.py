"""Normalised messages: tool calls, reasoning, and folded roles."""

from __future__ import annotations

import fakes_templates as templates
import pytest
from fakes_templates import tokenizer_with

from rasd_integrations.errors import PromptError
from rasd_integrations.text import tool_formats as tf
from rasd_integrations.text.prompt.messages import fold_roles, plain_message


def called(arguments: object, **more: object) -> dict[str, object]:
    call = {"function": {"name": "f", "arguments": arguments}, **more}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"a": 1}, {"a": 1}),
        ('{"a": "ü"}', {"a": "ü"}),
        ('"{\\"a\\": 1}"', {"a": 1}),
        ("", {}),
        (None, {}),
        ('{"a": ', '{"a": '),
        ("[1]", "[1]"),
    ],
)
def test_arguments_are_mappings_or_the_broken_text(arguments, expected):
    """Whatever form a framework keeps arguments in, templates get a mapping if there is one."""
    (call,) = plain_message(called(arguments, id="x"))["tool_calls"]
    assert {
        "id": "x",
        "type": "function",
        "function": {"name": "f", "arguments": expected},
    } == call


def test_empty_optional_fields_are_left_out():
    """Templates ask whether a message has calls, not how many."""
    message = {"role": "assistant", "content": "a", "tool_calls": [], "reasoning_content": None}
    assert {"role": "assistant", "content": "a"} == plain_message(message)
    assert "hm" == plain_message({**message, "reasoning_content": "hm"})["reasoning_content"]


@pytest.mark.parametrize(
    "call", ["f", {}, {"name": "f"}, {"function": "f"}, {"function": {"name": 3}}]
)
def test_tool_call_without_a_name_is_refused(call):
    """The error has the given value and the expected form."""
    with pytest.raises(PromptError, match=r"'function': \{'name'"):
        plain_message({"role": "assistant", "content": "", "tool_calls": [call]})


@pytest.mark.parametrize("template", [templates.QWEN3, templates.QWEN25, templates.LLAMA32])
def test_thoughts_go_to_templates_that_use_them(template):
    """Qwen3's template writes the reasoning before a call; others do not."""
    history = [
        {"role": "user", "content": "q"},
        {**called({}), "reasoning_content": "I should call f."},
        {"role": "tool", "content": "r"},
    ]
    prompt = tokenizer_with(template).apply_chat_template(
        [plain_message(m) for m in history], tokenize=False, add_generation_prompt=True
    )
    assert (template == templates.QWEN3) == ("<think>\nI should call f.\n</think>" in prompt)
    assert (template == templates.QWEN3) == ("I should" in prompt)


def test_folded_calls_and_results_are_in_the_markup_of_the_format():
    """Calls are the assistant's text as the model writes them, results are the user's."""
    history = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm"},
        called({"a": "ü"}),
        {"role": "tool", "content": "r"},
        {"role": "user", "content": "and?"},
    ]
    plain = [plain_message(m) for m in history]
    turns = fold_roles(plain, tf.MISTRAL)
    assert ["user", "assistant", "user"] == [m["role"] for m in turns]
    assert (
        'Let me see.\n\n[TOOL_CALLS][{"name": "f", "arguments": {"a": "ü"}}]' == turns[1]["content"]
    )
    assert "<tool_response>\nr\n</tool_response>\n\nand?" == turns[2]["content"]
    assert all({"role", "content"} == set(turn) for turn in turns)
    assert tf.HERMES.written(plain[2]["tool_calls"]) in fold_roles(plain)[1]["content"]
