"""Thoughts that the prompt has opened: none of them, and no mark, stays in the answer."""

from __future__ import annotations

import fakes_templates as templates
import pytest
from scripted import TEMPLATES, scripted_model

from rasd_integrations import RASD, SamplingParams

OPENS = TEMPLATES["plain"].replace(
    "<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}"
)
BY_OPTION = TEMPLATES["plain"].replace(
    "<|im_start|>assistant\\n' }}",
    "<|im_start|>assistant\\n' + ('<think>\\n' if thinking else '') }}",
)


def answer(
    template: str, said: str, prefill: str | None = None, **options: object
) -> tuple[str, str]:
    """Return the answer and the thoughts of a model that says ``said``."""
    opened = template == OPENS or options.get("thinking")
    closed = "<think>\n\n</think>\n\n" if template == templates.QWEN3 else ""
    lead = f"{closed}{prefill}" if prefill else "<think>\n" * bool(opened)
    model, tokenizer = scripted_model(
        lambda _: lead + said
    )  # what follows the header, the prompt's part too
    tokenizer.chat_template = template
    rasd = RASD.from_model(model, tokenizer, chat_template_kwargs=options)
    messages = [{"role": "user", "content": "What does <think> mean?"}]
    messages += [{"role": "assistant", "content": prefill}] if prefill else []
    done = rasd.generate(messages, SamplingParams(max_tokens=100))
    return done.text, done.reasoning


@pytest.mark.parametrize(
    ("template", "options", "prefill", "said", "expected"),
    [
        (OPENS, {}, None, "hm\n</think>\n\nYes", ("Yes", "hm")),
        (OPENS, {}, None, "hm", ("", "hm")),
        (BY_OPTION, {"thinking": True}, None, "hm\n</think>\n\nYes", ("Yes", "hm")),
        (BY_OPTION, {}, None, "<think>hm</think>Yes", ("Yes", "hm")),
        (BY_OPTION, {}, None, "Yes", ("Yes", "")),
        (OPENS, {}, "<think>\nhm", ", so</think>Yes", ("Yes", ", so")),
        (BY_OPTION, {}, "<think>\nhm", ", so</think>Yes", ("Yes", ", so")),
        (BY_OPTION, {}, "<think>\nhm\n</think>\n\nYes,", " it is", (" it is", "")),
        (BY_OPTION, {}, "The mark <think>", " opens one", (" opens one", "")),
        (templates.QWEN3, {}, "<think>\nhm", ", so</think>Yes", ("Yes", ", so")),
    ],
)  # fmt: skip
def test_thoughts_without_an_opening_mark_are_thoughts(template, options, prefill, said, expected):
    """Fault 15: the template begins the thought, always or by an option, or a continued message does.

    The template need not tell how a thought ends, and a mark among words is a word.
    """
    assert expected == answer(template, said, prefill, **options)
