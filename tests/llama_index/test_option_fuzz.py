"""Random options through LlamaIndex: an answer, or an error of ours."""

from __future__ import annotations

from functools import partial

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.base.llms.types import ChatMessage
from option_sets import faults
from scripted import scripted_model

from rasd_integrations.llama_index import RASDLLM


@pytest.fixture(scope="module")
def parts():
    """Return a model that always says the same, and its tokenizer."""
    return scripted_model(lambda _: "Paris.")


def ask(llm, **options):
    return llm.chat([ChatMessage(content="Hi")], **options)


@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 300), marks=pytest.mark.soak)])
def test_options_give_an_answer_or_an_error_of_ours(parts, seeds):
    """Good options are taken; bad names, values and types are refused by name. 300 sets in all."""
    assert [] == faults(partial(RASDLLM.from_model, *parts), ask, seeds)
