"""ChatRASD's options, its engine's other calls, and what LangChain asks about the model."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
from fakes_langchain import FakeRASD
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.load import dumpd, dumps
from langchain_core.messages import (
    AIMessage,
    HumanMessage,
)
from langchain_core.runnables import ConfigurableField
from pydantic import BaseModel

from rasd_integrations.config import RetrievalConfig, SamplingParams, SpeculationConfig
from rasd_integrations.drafters import SuffixDrafter
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain import RASDLLM, ChatRASD
from rasd_integrations.response_format import Grammar


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setattr("rasd_integrations.langchain.engines.RASD", FakeRASD)


@pytest.fixture
def llm():
    return ChatRASD(model="org/one")


def last_call(llm):
    return llm._rasd.calls[-1]


# --- options ---


def test_construction_loads_nothing():
    """A new model has not touched its weights."""
    assert ChatRASD(model="org/one")._rasd.loaded is False


def test_constructor_hands_every_engine_option_on():
    """What the engine is built with is what the constructor was given."""
    store = [Document("x")]
    llm = ChatRASD(
        model="org/one",
        drafter="org/small",
        drafter_device="cuda:1",
        executor="eager",
        store=store,
        context="documents",
        knowledge_transfer=10.0,
        model_kwargs={"dtype": "bfloat16"},
        chat_template_kwargs={"enable_thinking": False},
        num_draft_tokens=7,
        retrieval={"k": 32},
        prefix_cache_bytes=1024,
        prefix_cache_dir="kept",
        prefix_cache_dir_bytes=2048,
        namespace="tenant",
    )
    expected = {
        "drafter": "org/small",
        "drafter_device": "cuda:1",
        "executor": "eager",
        "store": store,
        "context": "documents",
        "knowledge_transfer": 10.0,
        "deterministic": False,
        "model_kwargs": {"dtype": "bfloat16"},
        "chat_template_kwargs": {"enable_thinking": False},
        "retrieval": RetrievalConfig(k=32),
        "speculation": SpeculationConfig(num_draft_tokens=7),
        "prefix_cache_bytes": 1024,
        "prefix_cache_dir": "kept",
        "prefix_cache_dir_bytes": 2048,
        "namespace": "tenant",
    }
    assert expected == llm._rasd.options


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"modle": "org/one"}, ["modle", "'model'"]),
        ({"model": "org/one", "max_new_tokens": 5}, ["max_new_tokens", "'max_tokens'"]),
        ({"model_name": "org/one"}, ["model_name", "'model'"]),
        ({"model": "org/one", "device": "cuda"}, ["'device'", "model_kwargs={'device_map': ...}"]),
        ({"model": "org/one", "context_window": 9}, ["context_window", "the model's own"]),
        ({"model": "org/one", "generate_kwargs": {"temperature": 1}}, ["temperature=, top_p="]),
        ({"model": "org/one", "retrieval": {1: 2}}, ["Unknown option 1", "timeout_s"]),
        ({"model": "org/one", "top_p": 2}, ["top_p", "2.0", "(0, 1]"]),
        ({"model": "org/one", "temperature": "hot"}, ["temperature"]),
        ({"model": "org/one", "context": "everything"}, ["context", "documents"]),
        ({"model": "org/one", "retrieval": {"kk": 3}}, ["kk", "'k'"]),
        ({"model": 3}, ["from_model"]),
        ({"model": "m", "num_draft_tokens": 3, "speculation": {"num_draft_tokens": 4}}, ["3", "4"]),
        ({}, ["model"]),
    ],
)
def test_bad_constructor_options_are_refused_by_name(options, names):
    """An unknown name, a value out of range and a contradiction each say what is wrong."""
    with pytest.raises(ConfigurationError) as caught:
        ChatRASD(**options)
    assert [] == [name for name in names if name not in str(caught.value)]


def test_standard_options_of_remote_services_are_taken_and_told(monkeypatch):
    """Code that builds any chat model passes a key, an address, a timeout and retries; each is named once."""
    monkeypatch.setattr("rasd_integrations.langchain.remote._told", set())
    remote = {"api_key": "secret", "base_url": "http://x", "timeout": 60}
    with pytest.warns(UserWarning, match="api_key, base_url, timeout: without effect") as told:
        llm = ChatRASD(model="org/one", streaming=True, **remote, max_retries=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChatRASD(model="org/one", **remote)
    with pytest.warns(UserWarning, match="^max_retries: without effect"):
        RASDLLM(model="org/one", **remote, max_retries=2)
    assert llm.model == "org/one"
    assert [__file__] == [warning.filename for warning in told]
    assert "secret" not in str(told[0].message)


def test_call_options_go_before_the_instances_own(llm):
    """Every option of an answer may be given per call."""
    llm.temperature = 0.3
    llm.invoke("Hi", top_p=0.5, top_k=4, max_tokens=2, seed=9, stop=["END"])
    expected = SamplingParams(
        temperature=0.3, top_p=0.5, top_k=4, max_tokens=2, seed=9, stop=("END",)
    )
    assert expected == last_call(llm).params


def test_constructor_stop_holds_until_a_call_gives_its_own():
    """`stop` of the instance is honoured, and replaced by that of a call."""
    llm = ChatRASD(model="org/one", stop="A")
    llm.invoke("Hi")
    assert last_call(llm).params.stop == ("A",)
    llm.invoke("Hi", stop=["B"])
    assert last_call(llm).params.stop == ("B",)


def test_an_option_of_none_means_the_instances_own(llm):
    """Wrappers pass None for what they do not set."""
    llm.max_tokens = 7
    llm.invoke("Hi", max_tokens=None, tools=None, tool_choice=None)
    assert last_call(llm).params.max_tokens == 7


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"temprature": 1}, ["temprature", "'temperature'"]),
        ({"timeout": 3}, ["timeout"]),
        ({"drafter": "self"}, ["'self'", "'auto'", "None"]),
        ({"knowledge_transfer": -1}, ["knowledge_transfer", "-1"]),
        ({"functions": [{"name": "f"}]}, ["functions", "tools="]),
        ({"function_call": "auto"}, ["function_call", "tool_choice="]),
        ({"tool_choice": "any"}, ["tool_choice", "tools="]),
        ({"response_format": {"type": "json"}}, ["response_format"]),
        ({"n": 3}, ["n is 3", "batch"]),
        ({"model": "org/two"}, ["org/two", "org/one"]),
        ({"max_tokens": "many"}, ["many"]),
        ({"top_k": -1}, ["top_k", "-1"]),
        ({"rasd": {"questions": "x"}}, ["questions", "'question'"]),
        ({"rasd": {"question": 3}}, ["question", "int"]),
        ({"rasd": {"chunks": 3}}, ["chunk", "int"]),
        ({"rasd": "x"}, ["rasd", "str"]),
    ],
)
def test_bad_call_options_are_refused_by_name(llm, options, names):
    """An option of a call is honoured or refused, never ignored."""
    with pytest.raises(ConfigurationError) as caught:
        llm.invoke("Hi", **options)
    assert [] == [name for name in names if name not in str(caught.value)]
    assert llm._rasd.calls == []


def test_options_of_the_engine_cannot_be_set_later(llm):
    """Assigning the model's name after construction would be ignored, so it is refused."""
    with pytest.raises(ValueError, match="frozen"):
        llm.model = "org/two"


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
def test_a_call_may_turn_drafting_off(built, asked, drafting):
    """None decodes plainly; the model's own drafter, by its name or as "auto", is no change."""
    llm = ChatRASD(model="org/one", drafter=built)
    llm.invoke("Hi", **asked)
    assert drafting is last_call(llm).params.drafting


def test_drafting_cannot_be_turned_on_where_nothing_drafts():
    """A model built without a drafter has none to turn on."""
    with pytest.raises(ConfigurationError, match="built with None"):
        ChatRASD(model="org/one", drafter=None).invoke("Hi", drafter="auto")


def test_knowledge_transfer_is_a_calls_own(llm):
    """The call's value goes to the engine; without one the engine follows its own."""
    llm.invoke("Hi", knowledge_transfer=0)
    llm.invoke("Hi")
    assert [0, None] == [call.params.knowledge_transfer for call in llm._rasd.calls]


class Person(BaseModel):
    """A person."""

    name: str


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
    llm.bind(response_format=response_format).invoke("Hi")
    assert grammar == last_call(llm).params.grammar


def test_configurable_fields_change_the_options_of_one_call(llm):
    """LangChain rebuilds the model from its fields; the change reaches the engine."""
    made = []
    original = FakeRASD.stream
    chain = llm.configurable_fields(temperature=ConfigurableField(id="t"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FakeRASD, "stream", lambda s, *a, **k: made.append(a[1]) or original(s, *a, **k)
        )
        chain.invoke("Hi", config={"configurable": {"t": 0.9}})
    assert [0.9] == [params.temperature for params in made]


def test_loaded_objects_reach_the_engine():
    """`from_model` builds the engine of the objects, with the same options."""
    llm = ChatRASD.from_model("M", "T", "D", temperature=0.5, namespace="n")
    options = llm._rasd.options
    assert ("loaded M", "T", "D", "n") == (
        llm._rasd.model_name,
        options["tokenizer"],
        options["drafter_model"],
        options["namespace"],
    )
    assert llm.temperature == 0.5


def test_loaded_objects_are_seen_nowhere_but_in_the_engine():
    """No field, dump, print or pickle holds them; a copy that LangChain makes of the fields has them still."""
    llm = ChatRASD.from_model("M", "T", "D")
    shown = [
        repr(llm),
        str(llm.model_dump()),
        str(dumpd(llm)),
        pickle.dumps(llm.model).decode("latin-1"),
    ]
    chain = llm.configurable_fields(temperature=ConfigurableField(id="t"))
    copied, _ = chain._prepare({"configurable": {"t": 0.9}})

    assert ["'M'" in text or "'T'" in text or "'D'" in text for text in shown] == [False] * 4
    assert not any("loaded" in name for name in ChatRASD.model_fields)
    assert (0.9, "loaded M", "T") == (
        copied.temperature,
        copied._rasd.model_name,
        copied._rasd.options["tokenizer"],
    )


@pytest.mark.parametrize("kind", [ChatRASD, RASDLLM])
def test_dumped_settings_hold_no_secrets_and_no_objects(kind):
    """`model_kwargs` and the store are left out of every dump and trace; a drafter object is marked as one."""
    told = []

    class Handler(BaseCallbackHandler):
        def on_chat_model_start(self, serialized, messages, **kwargs):
            told.append(str((serialized, kwargs)))

        def on_llm_start(self, serialized, prompts, **kwargs):
            told.append(str((serialized, kwargs)))

    llm = kind(
        model="org/one",
        drafter=SuffixDrafter(),
        store=["private text"],
        model_kwargs={"token": "hf_secret"},
    )
    llm.invoke("Hi", config={"callbacks": [Handler()]})
    shown = [
        repr(llm),
        str(llm.model_dump()),
        llm.model_dump_json(),
        dumps(llm),
        str(llm.dict()),
        *told,
    ]

    assert len(shown) == 6
    assert [] == [text for text in shown if "hf_secret" in text or "private text" in text]
    assert llm.model_dump()["drafter"] == "<drafter object: SuffixDrafter>"


def test_loaded_objects_refuse_load_options():
    """A dtype for weights that are loaded already would be ignored."""
    with pytest.raises(ConfigurationError, match="dtype"):
        ChatRASD.from_model("M", "T", model_kwargs={"dtype": "bfloat16"})


def test_deep_copies_share_the_engine(llm):
    """Weights are not copied along with options."""
    assert copy.deepcopy(llm)._rasd is llm._rasd


def test_a_copy_shares_the_engine_unless_it_asks_for_another(llm):
    """Copies with other options of an answer share weights; another model's name is honoured."""
    warmer = llm.model_copy(update={"temperature": 0.7})
    assert (0.7, True) == (warmer.temperature, warmer._rasd is llm._rasd)
    assert llm.model_copy(update={"model": "org/two"})._rasd.model_name == "org/two"


# --- the engine's other calls ---


def test_warm_takes_documents_and_texts(llm):
    """Documents are warmed by their text."""
    told = []
    llm.warm([Document("one"), "two"], lambda *figures: told.append(figures))
    assert ["one", "two"] == llm._rasd.warmed
    assert [(2, 2)] == told


def test_load_loads_and_completes_the_profile(llm):
    """Only the loaded model knows its window, of which the answer takes its part, and whether it thinks."""
    assert {"max_input_tokens", "reasoning_output"}.isdisjoint(llm.profile)
    assert llm.load()._rasd.loaded is True
    assert (2048 - 512, True) == (llm.profile["max_input_tokens"], llm.profile["reasoning_output"])


def test_leaving_the_block_closes_the_engine():
    """The model is a context manager."""
    with ChatRASD(model="org/one") as llm:
        assert llm._rasd.closed is False
    assert llm._rasd.closed is True


def test_stats_add_up_over_answers(llm):
    """The model's statistics are those of all its answers."""
    llm.invoke("Hi")
    llm.invoke("Hi")
    assert llm.stats.generated_tokens == 6


# --- what LangChain asks ---


async def test_two_models_never_share_a_cached_answer():
    """The cache key names the model, and the options that change an answer."""
    cache = InMemoryCache()
    models = [
        ChatRASD(model="org/one", cache=cache),
        ChatRASD(model="org/two", cache=cache),
        ChatRASD(model="org/one", cache=cache, temperature=1.0),
        ChatRASD(model="org/one", cache=cache, context="documents"),
        ChatRASD(model="org/one", cache=cache, seed=3),
    ]
    for place, llm in enumerate(models):
        llm._rasd.answer = lambda prompt, place=place: f"answer {place}"
    assert [f"answer {i}" for i in range(5)] == [llm.invoke("Hi").content for llm in models]
    assert models[0].invoke("Hi").content == "answer 0"
    assert (await models[1].ainvoke("Hi")).content == "answer 1"
    assert [1, 1, 1, 1, 1] == [len(llm._rasd.calls) for llm in models]


def test_tracing_parameters_name_provider_model_and_options():
    """Traces show what was asked of which model."""
    llm = ChatRASD(model="org/one", temperature=0.5, max_tokens=9, stop=["X"])
    expected = {
        "ls_provider": "rasd",
        "ls_model_type": "chat",
        "ls_model_name": "org/one",
        "ls_temperature": 0.5,
        "ls_max_tokens": 9,
        "ls_stop": ["X"],
    }
    assert expected == llm._get_ls_params()


def test_traces_carry_the_version(llm):
    """The package's version stands next to langchain-core's."""
    assert {"rasd-integrations", "langchain-core"} <= set(llm.metadata["lc_versions"])


def test_tokens_are_counted_by_the_models_own_tokenizer(llm):
    """LangChain's default would load GPT-2 from the hub."""
    assert llm.get_num_tokens("one two three") == 3
    assert llm.get_num_tokens_from_messages([HumanMessage("one two"), AIMessage("three")]) == 3


def test_a_custom_token_counter_goes_first():
    """`custom_get_token_ids` is LangChain's own option and stays honoured."""
    llm = ChatRASD(model="org/one", custom_get_token_ids=lambda text: [7, 7])
    assert [7, 7] == llm.get_token_ids("one two three")


def test_a_calls_own_options_are_traced(llm):
    """Traces name what a call asked for, not what the instance was built with."""
    params = llm._get_ls_params(stop=["Y"], model="org/two", temperature=0.7, max_tokens=3)
    assert ("org/two", 0.7, 3, ["Y"]) == (
        params["ls_model_name"],
        params["ls_temperature"],
        params["ls_max_tokens"],
        params["ls_stop"],
    )


def test_tools_count_as_tokens(llm):
    """What the template writes of the tools is a part of the prompt."""
    tools = [Person, {"name": "f", "description": "F.", "parameters": {"type": "object"}}]
    assert 2 + 2 == llm.get_num_tokens_from_messages([HumanMessage("one two")], tools)


@pytest.mark.parametrize("installed", [True, False])
def test_profile_says_what_works_here(installed, monkeypatch):
    """Text only; tools with every model; what needs a grammar only where the library for it is installed."""
    if not installed:
        monkeypatch.setattr("rasd_integrations.langchain.chat_models.find_spec", lambda name: None)
    profile = ChatRASD(model="org/one").profile
    assert [True, True, 512] == [
        profile[n] for n in ("text_inputs", "text_outputs", "max_output_tokens")
    ]
    others = ("image_inputs", "audio_inputs", "video_inputs", "pdf_inputs")
    assert [False] * 4 == [profile[n] for n in others]
    assert [True, True] == [profile[n] for n in ("tool_calling", "tool_call_streaming")]
    assert [installed] * 2 == [profile[n] for n in ("tool_choice", "structured_output")]
