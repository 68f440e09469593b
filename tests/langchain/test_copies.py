"""Fault 9: LangChain copies a model for each call with options of its own; the engine stays one."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
from langchain_core.runnables import ConfigurableField
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.errors import DecodingError
from rasd_integrations.langchain import RASDLLM, ChatRASD
from rasd_integrations.runtime import models

QUESTION = "what is the capital of France, and of Spain?"
OPTIONS = {"max_tokens": 4, "executor": "eager", "model_kwargs": {"dtype": "float32"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def loads(monkeypatch):
    """Count how often weights are read; those of earlier tests are gone."""
    gc.collect()
    names, load = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, *a: names.append(name) or load(name, *a))
    return names


def configured(llm):
    return llm.configurable_fields(
        temperature=ConfigurableField("temperature"), max_tokens=ConfigurableField("max_tokens")
    )


WAYS = {
    "configurable_fields": lambda llm: configured(llm).with_config(configurable={"max_tokens": 3}),
    "two of them": lambda llm: configured(llm).with_config(
        configurable={"temperature": 0.0, "max_tokens": 3}
    ),
    "bind": lambda llm: llm.bind(max_tokens=3),
    "with_config": lambda llm: llm.with_config(tags=["x"]),
    "model_copy": lambda llm: llm.model_copy(update={"max_tokens": 3}),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ChatRASD, RASDLLM])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_for_a_call_loads_nothing(kind, way, saved, loads):
    """Fault 9: one load, a warm prefix cache and one set of statistics, whatever is collected in between."""
    llm = kind(model=saved, **OPTIONS)
    derived = WAYS[way](llm)
    for _ in range(3):
        derived.invoke(QUESTION)
        gc.collect()
    assert loads == [saved]
    assert llm.stats.prompt_tokens > 0
    assert llm.stats.cached_prompt_tokens > 0
    llm.invoke(QUESTION)
    assert loads == [saved]


@pytest.mark.slow
def test_a_model_chosen_per_call_is_loaded_once(saved, tmp_path, loads):
    """Fault 9: two models that calls go to in turns stay both, as long as the model they were asked of."""
    other = str(tmp_path)
    tiny_llama(seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    llm = ChatRASD(model=saved, **OPTIONS)
    chosen = llm.configurable_fields(model=ConfigurableField("model"))
    for _ in range(3):
        for name in (saved, other):
            chosen.invoke(QUESTION, config={"configurable": {"model": name}})
            gc.collect()
    assert sorted(loads) == sorted([saved, other])
    alive = [weakref.ref(shared) for shared in models._loaded.values() if shared.name == other]
    assert len(alive) == 1
    llm.close()
    gc.collect()
    assert alive[0]() is None
    with pytest.raises(DecodingError, match="closed"):
        chosen.invoke(QUESTION, config={"configurable": {"model": other}})


@pytest.mark.slow
def test_the_last_copy_takes_the_weights_with_it(saved, loads):
    """Dropping every copy frees the weights, without close()."""
    llm = ChatRASD(model=saved, **OPTIONS)
    derived = configured(llm).with_config(configurable={"max_tokens": 3})
    derived.invoke(QUESTION)
    target = weakref.ref(llm._rasd._engine.decoder().target)
    del llm
    gc.collect()
    derived.invoke(QUESTION)
    assert target() is not None
    del derived
    gc.collect()
    assert target() is None
    assert len(loads) == 1


def test_an_explicit_copy_with_another_engine_lives_by_itself(saved):
    """What a user copies with other options of the engine is closed by itself, not with the first."""
    first = ChatRASD(model=saved, **OPTIONS)
    second = first.model_copy(update={"namespace": "b"})
    first.close()
    second.invoke(QUESTION)
    with pytest.raises(DecodingError, match="closed"):
        first.invoke(QUESTION)


def test_closing_a_copy_for_a_call_closes_its_engine_alone(saved):
    """A copy that LangChain built of the fields shares the engine: close() of either closes it for both."""
    llm = ChatRASD(model=saved, **OPTIONS)
    fields = {name: value for name, value in llm.__dict__.items() if name in ChatRASD.model_fields}
    other = ChatRASD(**{**fields, "namespace": "b"})
    other.invoke(QUESTION)
    other.close()
    llm.invoke(QUESTION)
    with pytest.raises(DecodingError, match="closed"):
        other.invoke(QUESTION)


def test_a_store_attached_later_is_the_copies_too(saved):
    """attach() changes the options of the engine that copies look for."""
    llm = ChatRASD(model=saved, **OPTIONS)
    derived = configured(llm).with_config(configurable={"max_tokens": 3})
    llm.attach(["Paris is the capital of France.", "Madrid is that of Spain."])
    assert derived.invoke(QUESTION).response_metadata["rasd"]["num_chunks"] >= 0
    assert len(llm.engines._known) == 1


def test_options_that_cannot_be_compared_have_engines_of_their_own(saved):
    """An option whose == raises makes no error, and no shared engine."""

    class Odd(dict):
        def __eq__(self, other):
            raise TypeError

        __hash__ = None

    llm = ChatRASD(model=saved, **{**OPTIONS, "chat_template_kwargs": Odd()})
    derived = configured(llm).with_config(configurable={"max_tokens": 3})
    assert derived.invoke(QUESTION).content is not None
