"""What all three framework models share: fields, checks, the engine's options, and the options of a call."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import pickle
import re
import textwrap
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
from fakes_rasd import ENGINE
from option_sets import OF_CALL, faults
from pydantic import BaseModel
from scripted import scripted_model

from rasd_integrations.config import RetrievalConfig, SamplingParams, SpeculationConfig
from rasd_integrations.drafters import SuffixDrafter
from rasd_integrations.edges.call_options import ANSWER_OPTIONS, ENGINE_OPTIONS
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.response_format import Grammar
from rasd_integrations.transfer import Rapid

KINDS = ("langchain.ChatRASD", "langchain.RASDLLM", "llama_index.RASDLLM")


# What is refused of a constructor and of a call.
LOGPROBS = [
    ({"top_logprobs": 3}, ["top_logprobs is 3", "logprobs is None", "Set logprobs=True"]),
    ({"logprobs": False, "top_logprobs": 3}, ["top_logprobs is 3", "logprobs is False"]),
    ({"logprobs": True, "top_logprobs": 21}, ["top_logprobs is 21", "[0, 20]"]),
    ({"logprobs": True, "top_logprobs": -1}, ["top_logprobs is -1", "[0, 20]"]),
]


def model_class(kind):
    """Return the class, once its framework is there."""
    room, name = kind.split(".")
    pytest.importorskip("langchain_core" if room == "langchain" else "llama_index.core")
    return getattr(__import__(f"rasd_integrations.{room}", fromlist=[name]), name)


@pytest.fixture(params=KINDS)
def cls(request, monkeypatch):
    """Return each of the classes, over an engine that records."""
    made = model_class(request.param)
    if request.param.startswith("langchain"):
        from fakes_langchain import FakeRASD
    else:
        from fakes_llama_index import FakeRASD
    monkeypatch.setattr(ENGINE, FakeRASD)
    return made


@pytest.fixture
def llm(cls):
    return cls(model="org/one")


@pytest.fixture(scope="module")
def parts():
    """Return a model that always says the same, and its tokenizer."""
    return scripted_model(lambda _: "Paris.")


def ask(llm, **options):
    """Call a model and return the options that the engine got."""
    invoke = getattr(llm, "invoke", None) or llm.complete
    invoke("Hi", **options)
    calls = getattr(llm._rasd, "calls", None)
    return calls[-1].params if calls else None


# --- the constructor ---


def test_fields_and_defaults_are_those_of_the_sampling_params():
    """Each answer option is one of `SamplingParams`, and an engine option is none of a call's, but one."""
    own = {field.name: field.default for field in fields(SamplingParams)}
    assert {"logprobs"} == set(ANSWER_OPTIONS) - set(
        own
    )  # OpenAI's, see the tests of `top_logprobs`
    assert {"knowledge_transfer"} == set(ENGINE_OPTIONS) & set(own)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_and_descriptions(kind):
    """Fields have the defaults of `SamplingParams`, a description, and names an editor can show."""
    cls = model_class(kind)
    shown = {name: cls.model_fields[name] for name in (*ANSWER_OPTIONS, *ENGINE_OPTIONS)}
    own = {field.name: field.default for field in fields(SamplingParams)} | {"logprobs": None}
    assert {n: own[n] for n in ANSWER_OPTIONS} == {n: shown[n].default for n in ANSWER_OPTIONS}
    assert [] == [name for name, field in shown.items() if not field.description]
    assert set(shown) <= set(inspect.signature(cls).parameters)


def test_every_engine_option_is_handed_on(cls):
    """What the engine is built with is what the constructor was given; construction loads nothing."""
    given = {
        "drafter": "org/small",
        "drafter_device": "cuda:1",
        "executor": "eager",
        "weights": "dense",
        "store": ["text"],
        "context": "documents",
        "knowledge_transfer": "cautious",
        "model_kwargs": {"dtype": "bfloat16"},
        "chat_template_kwargs": {"enable_thinking": False},
        "prefix_cache_bytes": 1024,
        "cache_dir": "kept",
        "prefix_disk_bytes": 2048,
        "namespace": "tenant",
        "memory": False,
        "mode": "route",
    }
    llm = cls(model=Path("models") / "m.gguf", num_draft_tokens=7, retrieval={"k": 32}, **given)
    made = {
        "retrieval": RetrievalConfig(k=32),
        "speculation": SpeculationConfig(num_draft_tokens=7),
        "deterministic": False,
    }
    assert {**given, **made} == llm._rasd.options
    assert str(Path("models") / "m.gguf") == llm._rasd.model_name
    assert (0, 1) == (llm._rasd.loads, llm.load()._rasd.loads)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modle": "org/one"}, ["modle", "'model'"]),
        ({"model_name": "org/one"}, ["model_name", "'model'"]),
        ({"temprature": 1}, ["Did you mean 'temperature'"]),
        ({"device": "cuda"}, ["'device'", "model_kwargs={'device_map': ...}"]),
        ({"context_window": 9}, ["context_window", "the model's own"]),
        ({"generate_kwargs": {"temperature": 1}}, ["temperature=, top_p="]),
        ({"retrieval": {1: 2}}, ["Unknown option 1", "timeout_s"]),
        ({"retrieval": {"kk": 3}}, ["kk", "'k'"]),
        ({"top_p": 2}, ["top_p", "2.0", "(0, 1]"]),
        ({"top_p": 0}, ["top_p is 0"]),
        ({"temperature": -1}, ["temperature is -1"]),
        ({"temperature": "hot"}, ["temperature is 'hot'"]),
        ({"context": "all"}, ["context is 'all'", "documents"]),
        ({"on_cut": "ignore"}, ["on_cut is 'ignore'"]),
        *LOGPROBS,
        ({"num_draft_tokens": 3, "speculation": {"num_draft_tokens": 4}}, ["3", "4"]),
        ({"model": 3}, ["from_model"]),
        ({"model": object()}, ["from_model"]),
        ({"model": ""}, ["model"]),
    ],
)
def test_bad_constructor_options_are_refused_by_name(cls, options, said):
    """An unknown name, a value out of range and a contradiction each say what is wrong."""
    with pytest.raises(ConfigurationError) as caught:
        cls(**{"model": "org/one", **options})
    assert [] == [words for words in said if words not in str(caught.value)]


def test_a_model_must_be_named(cls):
    """The one option without a default."""
    with pytest.raises(ConfigurationError, match="has no model"):
        cls()


def test_options_of_the_engine_cannot_be_set_later(llm):
    """Assigning them after construction would have no effect, so it is refused."""
    for name in ("model", "drafter"):
        with pytest.raises(ValueError, match="frozen"):
            setattr(llm, name, "org/two")


@pytest.mark.parametrize("kind", KINDS)
def test_examples_in_the_docstring_are_code(kind):
    """Each block compiles, and the first makes a model."""
    cls = model_class(kind)
    pattern = r"```python\n(.*?)```|::\n\n((?: {8}[^\n]*\n|\n)+)"
    blocks = re.findall(pattern, inspect.getdoc(cls) + "\n", re.DOTALL)
    code = [textwrap.dedent(fenced or indented) for fenced, indented in blocks]
    assert len(code) >= 5
    for block in code:
        compile(block, kind, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names = {}
    exec(code[0], names)
    assert isinstance(names["llm"], cls)


# --- loaded objects, copies and dumps ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_tokenizer_is_public(kind, parts):
    """It is the very one that was given."""
    assert model_class(kind).from_model(*parts).tokenizer is parts[1]


def test_loaded_objects_reach_the_engine(cls):
    """`from_model` builds the engine of the objects, with the same options."""
    llm = cls.from_model("M", "T", "D", temperature=0.5, namespace="n")
    assert ("M", "T", "D") == llm._rasd.loaded_objects
    assert ("n", 0.5) == (llm._rasd.options["namespace"], llm.temperature)


def test_loaded_objects_refuse_load_options(cls):
    """A dtype for weights that are loaded already would have no effect."""
    with pytest.raises(ConfigurationError, match=r"\['dtype'\] come too late"):
        cls.from_model("M", "T", model_kwargs={"dtype": "bfloat16"})


def test_loaded_objects_are_seen_nowhere_but_in_the_engine(cls):
    """No dump, print or pickle holds them."""
    llm = cls.from_model("M", "T", "D")
    shown = [repr(llm), str(llm.model_dump()), pickle.dumps(llm.model).decode("latin-1")]
    assert ["'M'" in text or "'T'" in text or "'D'" in text for text in shown] == [False] * 3


def test_dumped_settings_hold_no_secrets_and_no_objects(cls):
    """`model_kwargs` and the store are left out; a drafter object is marked as one."""
    llm = cls(
        model="org/one",
        drafter=SuffixDrafter(),
        store=["private text"],
        model_kwargs={"token": "hf_secret"},
    )
    shown = [repr(llm), str(llm.model_dump()), llm.model_dump_json()]
    assert [] == [text for text in shown if "hf_secret" in text or "private text" in text]
    assert llm.model_dump()["drafter"] == "<drafter object: SuffixDrafter>"
    assert cls(model="m", drafter=Path("small")).model_dump()["drafter"] == "small"


def test_a_transfer_rule_is_dumped_by_its_name(cls):
    """What is written down makes an equal model again; a function is marked as one."""
    dumped = json.loads(cls(model="m", knowledge_transfer=Rapid(3.0)).model_dump_json())
    assert dumped["knowledge_transfer"] == "rapid:3"
    config = SpeculationConfig(knowledge_transfer=Rapid(3.0), num_draft_tokens=2)
    dumped = json.loads(cls(model="m", speculation=config).model_dump_json())
    again = cls(model="m", speculation=dumped["speculation"])._rasd.options["speculation"]
    assert (again.rule, again.num_draft_tokens) == (config.rule, 2)
    marked = cls(model="m", knowledge_transfer=lambda p, q, state: q)
    assert json.loads(marked.model_dump_json())["knowledge_transfer"].startswith("<transfer rule: ")


def test_deep_copies_share_the_engine(llm):
    """Weights are not copied along with options."""
    assert copy.deepcopy(llm)._rasd is llm._rasd


# --- the engine's other calls ---


def test_warm_tells_its_progress(llm):
    """Texts are warmed as they are."""
    told = []
    llm.warm(["one", "two"], lambda *figures: told.append(figures))
    assert (["one", "two"], [(2, 2)]) == (llm._rasd.warmed, told)


def test_leaving_the_block_closes_the_engine(llm):
    """The model is a context manager."""
    with llm as same:
        assert (same, False) == (llm, llm._rasd.closed)
    assert llm._rasd.closed is True


# --- the options of a call ---


def test_call_options_go_before_the_fields(llm):
    """Every option of an answer may be given per call, and a field set later counts from then on."""
    llm.temperature = 0.3
    found = ask(
        llm, top_p=0.5, top_k=4, min_p=0.1, max_tokens=2, seed=9, stop=["END"], on_cut="raise"
    )
    expected = SamplingParams(
        temperature=0.3,
        top_p=0.5,
        top_k=4,
        min_p=0.1,
        max_tokens=2,
        seed=9,
        stop=("END",),
        on_cut="raise",
    )
    assert expected == found


def test_fields_hold_if_a_call_says_nothing(cls):
    """A call's None means the field, as wrappers pass it for what they do not set; of a seed it is a value."""
    own = {
        "temperature": 0.2,
        "top_p": 0.8,
        "top_k": 2,
        "max_tokens": 9,
        "seed": 1,
        "on_cut": "raise",
    }
    llm = cls(model="m", stop=["#", "\n\n"], **own)
    expected = SamplingParams(stop=("#", "\n\n"), **own)
    assert expected == ask(llm, temperature=None, stop=None, max_tokens=None)
    assert ask(llm, seed=None).seed is None


@pytest.mark.parametrize(
    ("own", "call", "expected"),
    [
        ({}, {}, None),
        ({"logprobs": True}, {}, 0),
        ({"logprobs": True, "top_logprobs": 3}, {}, 3),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": None, "top_logprobs": None}, 3),
        ({"logprobs": True, "top_logprobs": 3}, {"top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": False}, None),
        ({"logprobs": False}, {"logprobs": True, "top_logprobs": 2}, 2),
        ({"logprobs": False, "top_logprobs": 0}, {}, None),
        ({"logprobs": True}, {"top_logprobs": 5}, 5),
    ],
)
def test_logprobs_are_asked_for_as_of_openai(cls, own, call, expected):
    """`logprobs` turns them on and off, `top_logprobs` says how many alternatives."""
    assert expected == ask(cls(model="m", **own), **call).top_logprobs


def test_a_single_stop_is_one_string(cls):
    """A text is not read letter by letter, and a call's own replaces it."""
    llm = cls(model="m", stop="AB")
    assert [("AB",), ("C",)] == [ask(llm).stop, ask(llm, stop=["C"]).stop]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temprature": 1}, ["temprature", "'temperature'"]),
        ({"timeout": 3}, ["timeout"]),
        ({"drafter": "small/model"}, ["'small/model'", "'auto'", "None"]),
        ({"knowledge_transfer": -1}, ["knowledge_transfer is -1", "'rapid:-1'"]),
        ({"response_format": {"type": "json"}}, ["response_format is"]),
        (
            {"response_format": {"type": "text"}, "grammar": Grammar.json_object()},
            ["give one of them"],
        ),
        ({"max_tokens": 0}, ["max_tokens is 0"]),
        ({"max_tokens": "many"}, ["many"]),
        ({"temperature": "hot"}, ["temperature is 'hot'"]),
        ({"top_k": -1}, ["top_k is -1"]),
        ({"stop": 5}, ["wrong type"]),
        ({"on_cut": "ignore"}, ["on_cut is 'ignore'"]),
        *LOGPROBS,
        ({"logprobs": 5}, ["logprobs is 5", "True, False or None"]),
        ({"rasd": {"quesion": "?"}}, ["Did you mean 'question'"]),
        ({"rasd": {"question": 3}}, ["rasd['question'] is 3", "must be text"]),
        ({"rasd": {"chunks": [1]}}, ["rasd['chunks'][0] is a int"]),
        ({"rasd": "x"}, ["rasd is 'x'", "str"]),
    ],
)
def test_bad_call_options_are_refused_by_name(llm, options, said):
    """An option of a call is honoured or refused, never ignored."""
    with pytest.raises(ConfigurationError) as caught:
        ask(llm, **options)
    assert [] == [words for words in said if words not in str(caught.value)]
    assert llm._rasd.calls == []


@pytest.mark.parametrize(
    ("built", "asked", "drafting"),
    [
        ("auto", {}, True),
        ("auto", {"drafter": "auto"}, True),
        ("auto", {"drafter": None}, False),
        ("self", {"drafter": "self"}, True),
        ("self", {"drafter": "auto"}, True),
        (None, {"drafter": None}, False),
    ],
)
def test_a_call_may_turn_drafting_off(cls, built, asked, drafting):
    """None decodes plainly; the model's own drafter, by its name or as "auto", is no change."""
    assert drafting is ask(cls(model="org/one", drafter=built), **asked).drafting


def test_drafting_cannot_be_turned_on_without_a_drafter(cls):
    """A model built without a drafter has none to turn on."""
    with pytest.raises(ConfigurationError, match="built with None"):
        ask(cls(model="org/one", drafter=None), drafter="auto")


def test_knowledge_transfer_is_a_calls_own(llm):
    """The call's value goes to the engine; without one the engine follows its own."""
    asked = [ask(llm, knowledge_transfer=rule) for rule in ("none", "rapid:2", None)]
    assert ["none", "rapid:2", None] == [params.knowledge_transfer for params in asked]


class Person(BaseModel):
    """A person."""

    name: str


class Unwritable(BaseModel):
    """A class without a JSON schema."""

    call: type(lambda: None)

    model_config = {"arbitrary_types_allowed": True}


@pytest.mark.parametrize(
    ("response_format", "grammar"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar.json_object()),
        (Person, Grammar.json_schema(Person.model_json_schema())),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}},
            Grammar.json_schema({"type": "array"}),
        ),
    ],
)
def test_response_format_becomes_a_grammar(llm, response_format, grammar):
    """OpenAI's forms, and a class for its schema."""
    assert grammar == ask(llm, response_format=response_format).grammar


def test_a_class_without_a_schema_is_refused(llm):
    """The error names the class."""
    with pytest.raises(ConfigurationError, match="Unwritable"):
        ask(llm, response_format=Unwritable)


# --- anything at all, on the real engine ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 300), marks=pytest.mark.soak)])
def test_options_give_an_answer_or_an_error_of_ours(kind, parts, seeds):
    """Good options are taken; bad names, values and types are refused by name. 300 sets in all."""
    # LlamaIndex's `complete` takes no tools, not even none; its chat calls do.
    taken = {n: v for n, v in OF_CALL.items() if n != "tools" or kind != "llama_index.RASDLLM"}
    assert [] == faults(partial(model_class(kind).from_model, *parts), ask, seeds, taken)
