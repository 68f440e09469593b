"""Reasoning: separated from the answer, and detected from tokenizer and prompt."""

from __future__ import annotations

import fakes_templates as templates
import pytest
from fakes_answers import FORMATS, Answer, answer, call
from fakes_templates import tokenizer_with

from rasd_integrations.text import tool_formats as tf
from rasd_integrations.text.answer.parser import ReasoningFormat, opens_thought, reasoning_format


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("<think>\nhm\n\nso\n</think>\n\nYes", False, Answer("Yes", "hm\n\nso", [])),
        ("\n <think>hm</think>Yes", False, Answer("Yes", "hm", [])),
        ("\nhm\n</think>\n\nYes", True, Answer("Yes", "hm", [])),
        (" hm</think> Yes", True, Answer(" Yes", " hm", [])),
        ("<think>\nhm\n</think>\n\nYes", True, Answer("Yes", "hm", [])),
        ("<think>a</think>\n<think>b</think>\nYes", False, Answer("Yes", "ab", [])),
        ("<think>\n\n</think>\n\nYes\n", False, Answer("Yes\n", "", [])),
        ("hm, not done", True, Answer("", "hm, not done", [])),
        ("<think>hm </thi", False, Answer("", "hm </thi", [])),
        ("Yes <think>no</think>", False, Answer("Yes <think>no</think>", "", [])),
        (" \nYes", False, Answer(" \nYes", "", [])),
        ("<thin", False, Answer("<thin", "", [])),
        ("", True, Answer("", "", [])),
    ],
)
@pytest.mark.parametrize("format", [None, tf.HERMES, tf.LLAMA3, tf.FALLBACK])
def test_thoughts_at_the_start_are_split_off(format, text, thinking, expected):
    """Reasoning and its marks are not text; later marks are."""
    assert expected == answer(format, text, thinking=thinking)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_calls_inside_a_thought_are_thoughts(format):
    """Only calls after the reasoning count, even if they must come first in the answer."""
    first, second = call(format, "f", '{"a": 1}'), call(format, "g", "{}")
    done = answer(format, f"<think>\n{first}\n</think>\n\n{second}")
    assert Answer("", first, [("g", "{}")]) == done


def test_other_marks_of_thoughts():
    """Other families have other marks."""
    marks = ReasoningFormat("[THINK]", "[/THINK]")
    assert Answer("Yes", "hm", []) == answer(None, "[THINK]hm[/THINK]Yes", reasoning=marks)


@pytest.mark.parametrize(
    ("template", "added", "control", "expected"),
    [
        (templates.QWEN3, (), (), ReasoningFormat()),
        (templates.QWEN25, (), (), None),
        (templates.CHATML, ("<think>", "</think>"), (), ReasoningFormat()),
        (templates.CHATML, (), ("[THINK]", "[/THINK]"), ReasoningFormat("[THINK]", "[/THINK]", ("[THINK]", "[/THINK]"))),
        (None, (), (), None),
    ],
)  # fmt: skip
def test_marks_of_thoughts_are_read_off_the_tokenizer(template, added, control, expected):
    """The template or the vocabulary has the marks; otherwise there is no reasoning."""
    assert expected == reasoning_format(tokenizer_with(template, control=control, added=added))


def test_marks_of_thoughts_are_read_off_a_template_given_as_an_option():
    """``chat_template_kwargs`` choose the template here too."""
    options = {"chat_template": templates.QWEN3}
    assert ReasoningFormat() == reasoning_format(tokenizer_with(templates.CHATML), options)


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        (templates.QWQ, {}, True),
        (templates.QWEN3, {}, False),
        (templates.QWEN3, {"enable_thinking": False}, False),
    ],
)
def test_prompt_that_opens_the_thought_is_known(template, options, expected):
    """QwQ's prompt ends inside reasoning; Qwen3's leaves it to the model, or closes it."""
    tokenizer = tokenizer_with(template + "{# </think> #}")
    messages = [{"role": "user", "content": "What does <think> mean?"}]
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options
    )
    assert expected == opens_thought(prompt[-40:], reasoning_format(tokenizer))
    assert not opens_thought(prompt, None)
