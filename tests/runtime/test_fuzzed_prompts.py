"""Odd prompts through both frameworks: no foreign exception, and no control token out of data."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fakes_templates as templates
import pytest
from fakes_templates import tokenizer_with
from fuzzed_prompts import MARKS, Prompts
from tiny import tiny_llama

from rasd_integrations import RASD, SamplingParams, ToolUse, langchain, llama_index
from rasd_integrations.errors import RASDError
from rasd_integrations.runtime import pipeline
from rasd_integrations.text.control import ControlTokens

_PLAIN = "{% for m in messages %}{{ m | tojson }}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
TEMPLATES = {
    **templates.ALL,
    "prints all": "{% for t in tools or [] %}{{ t }}{% endfor %}" + _PLAIN,
}


@functools.cache
def models(name: str) -> dict[str, Any]:
    """Return the classes over a random model with the template of that name and control tokens of all families."""
    tokenizer = tokenizer_with(TEMPLATES[name], control=MARKS)
    tokenizer.bos_token, tokenizer.eos_token = "<|endoftext|>", "</s>"
    shape = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    }
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=4096, **shape)
    options: dict[str, Any] = {"drafter": None, "prefix_cache_bytes": 0}
    return {
        "core": RASD.from_model(model, tokenizer, **options),
        "chat": langchain.ChatRASD.from_model(model, tokenizer, max_tokens=1, **options),
        "completion": langchain.RASDLLM.from_model(model, tokenizer, max_tokens=1, **options),
        "index": llama_index.RASDLLM.from_model(model, tokenizer, max_tokens=1, **options),
        "control": ControlTokens(tokenizer),
    }


@contextmanager
def recorded() -> Iterator[list[list[int]]]:
    """Record the ids of the prompts that reach the engine."""
    ids: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        encode = pipeline.encode

        def remember(*args: Any) -> list[int]:
            ids.append(encode(*args))
            return ids[-1]

        patch.setattr(pipeline, "encode", remember)
        yield ids


def asked(made: dict[str, Any], prompts: Prompts, way: str) -> Callable[[], object]:
    """Return the call that sends this seed's prompt one way."""
    if way == "core":
        messages, tools = prompts.core(), prompts.tools()
        return lambda: made["core"].generate(
            messages, SamplingParams(max_tokens=1), tools=ToolUse.of(tools)
        )
    if way == "chat":
        messages, options = (
            prompts.langchain(),
            {"tools": tools} if (tools := prompts.tools()) else {},
        )
        return lambda: made["chat"].invoke(messages, **options)
    if way == "index":
        messages, options = (
            prompts.llama_index(),
            {"tools": tools} if (tools := prompts.tools()) else {},
        )
        return lambda: made["index"].chat(messages, **options)
    text = prompts.text(30)
    return lambda: (
        made["index"].complete(text) if way == "complete" else made["completion"].invoke(text)
    )


def outcome(
    made: dict[str, Any], seed: int, way: str, *, harmless: bool
) -> tuple[str, Counter[int]]:
    """Return how a call ended, and the control tokens of what the model was to read."""
    call = asked(made, Prompts(seed, harmless=harmless), way)
    known = set(made["control"].ids.values())
    with recorded() as prompts:
        try:
            call()
            ended = "answered"
        except RASDError as err:
            ended = type(err).__name__
    return ended, Counter(i for ids in prompts for i in ids if i in known)


def run(seed: int) -> str:
    """Send one prompt and its twin one way, and compare them; returns how they ended."""
    names, ways = list(TEMPLATES), ("core", "chat", "index", "complete", "text")
    name, way = names[seed % len(names)], ways[seed // len(names) % len(ways)]
    made = models(name)
    ended, found = outcome(made, seed, way, harmless=False)
    if way == "text":  # the caller's own template: its control tokens are control tokens
        return ended
    expected = outcome(made, seed, way, harmless=True)
    assert (seed, name, way, *expected) == (seed, name, way, ended, found)
    return ended


ENDS = {"answered", "PromptError", "ContextOverflowError", "PromptTooLongError"}


@pytest.mark.slow
def test_two_hundred_odd_prompts():
    """Prompts with control tokens, odd Unicode, template syntax, blocks and roles of any kind: our errors or an answer."""
    ends = Counter(run(seed) for seed in range(200))
    assert set(ends) <= ENDS
    assert ends["answered"] > 100


@pytest.mark.soak
def test_three_thousand_odd_prompts():
    """The same over 3,100 prompts."""
    ends = Counter(run(seed) for seed in range(200, 3300))
    assert set(ends) <= ENDS
    assert ends["answered"] > 1000
