"""Random options through LangChain: an answer, or an error of ours."""

from __future__ import annotations

from functools import partial

import pytest
from option_sets import faults
from scripted import scripted_model

from rasd_integrations.langchain import RASDLLM, ChatRASD


@pytest.fixture(scope="module")
def parts():
    """Return a model that always says the same, and its tokenizer."""
    return scripted_model(lambda _: "Paris.")


def ask(llm, **options):
    return llm.invoke("Hi", **options)


@pytest.mark.parametrize("kind", [ChatRASD, RASDLLM])
@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 300), marks=pytest.mark.soak)])
def test_options_give_an_answer_or_an_error_of_ours(kind, parts, seeds):
    """Good options are taken; bad names, values and types are refused by name. 300 sets in all."""
    assert [] == faults(partial(kind.from_model, *parts), ask, seeds)
