"""ChatRASD's options, its engine's other calls, and what LangChain asks about the model."""

from __future__ import annotations

import warnings

import pytest
from fakes_langchain import FakeRASD
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.load import dumpd, dumps
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import ConfigurableField
from pydantic import BaseModel

from rasd_integrations.drafters import SuffixDrafter
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain import RASDLLM, ChatRASD

pytestmark = pytest.mark.usefixtures("fake_engine")

# --- options ---


def test_standard_options_of_remote_services_are_taken_and_told(monkeypatch):
    """Code that builds any chat model passes a key, a timeout and retries; without a server each is named once."""
    monkeypatch.setattr("rasd_integrations.langchain.base._warned", set())
    remote = {"api_key": "secret", "base_url": None, "timeout": 60}
    with pytest.warns(UserWarning, match="api_key, timeout: without effect.*base_url") as told:
        llm = ChatRASD(model="org/one", streaming=True, **remote, max_retries=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChatRASD(model="org/one", **remote)
    with pytest.warns(UserWarning, match="^max_retries: without effect"):
        RASDLLM(model="org/one", **remote, max_retries=2)
    assert llm.model == "org/one"
    assert [__file__] == [warning.filename for warning in told]
    assert "secret" not in str(told[0].message)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"tool_choice": "auto", "tools": 3}, ["tools is 3"]),
        ({"functions": [{"name": "f"}]}, ["functions", "tools="]),
        ({"function_call": "auto"}, ["function_call", "tool_choice="]),
        ({"tool_choice": "any"}, ["tool_choice", "tools="]),
        ({"n": 3}, ["n is 3", "batch"]),
        ({"model": "org/two"}, ["org/two", "org/one"]),
    ],
)
def test_bad_call_options_are_refused_by_name(llm, options, names):
    """An option of a call is honoured or refused, never ignored."""
    with pytest.raises(ConfigurationError) as caught:
        llm.invoke("Hi", **options)
    assert [] == [name for name in names if name not in str(caught.value)]
    assert llm._rasd.calls == []


class Person(BaseModel):
    """A person."""

    name: str


def test_configurable_fields_change_the_options_of_one_call(llm):
    """LangChain rebuilds the model from its fields; the change reaches the engine."""
    made = []
    original = FakeRASD.stream
    chain = llm.configurable_fields(temperature=ConfigurableField(id="t"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FakeRASD, "stream", lambda s, asked: made.append(asked.params) or original(s, asked)
        )
        chain.invoke("Hi", config={"configurable": {"t": 0.9}})
    assert [0.9] == [params.temperature for params in made]


def test_a_copy_of_the_fields_has_the_loaded_objects_still():
    """LangChain rebuilds models from their fields; a trace of them holds no objects."""
    llm = ChatRASD.from_model("M", "T", "D")
    chain = llm.configurable_fields(temperature=ConfigurableField(id="t"))
    copied, _ = chain._prepare({"configurable": {"t": 0.9}})

    assert [] == [name for name in ("'M'", "'T'", "'D'") if name in str(dumpd(llm))]
    assert not any("loaded" in name for name in ChatRASD.model_fields)
    assert (0.9, ("M", "T", "D")) == (copied.temperature, copied._rasd.loaded_objects)


@pytest.mark.parametrize("kind", [ChatRASD, RASDLLM])
def test_traces_hold_no_secrets_and_no_objects(kind):
    """`model_kwargs` and the store are left out of LangChain's own dumps and of what callbacks get."""
    told = []

    class Handler(BaseCallbackHandler):
        def on_chat_model_start(self, serialized, messages, **kwargs):
            told.append(str((serialized, kwargs)))

        def on_llm_start(self, serialized, prompts, **kwargs):
            told.append(str((serialized, kwargs)))

    secret = {"store": ["private text"], "model_kwargs": {"token": "hf_secret"}}
    llm = kind(model="org/one", drafter=SuffixDrafter(), **secret)
    llm.invoke("Hi", config={"callbacks": [Handler()]})
    shown = [dumps(llm), str(llm.dict()), *told]

    assert len(shown) == 3
    assert [] == [text for text in shown if "hf_secret" in text or "private text" in text]


def test_a_copy_shares_the_engine_unless_it_asks_for_another(llm):
    """Copies with other options of an answer share weights; another model's name is honoured."""
    warmer = llm.model_copy(update={"temperature": 0.7})
    assert (0.7, True) == (warmer.temperature, warmer._rasd is llm._rasd)
    assert llm.model_copy(update={"model": "org/two"})._rasd.model_name == "org/two"


# --- the engine's other calls ---


def test_warm_takes_documents(llm):
    """Documents are warmed by their text."""
    assert ["one", "two"] == llm.warm([Document("one"), "two"])._rasd.warmed


def test_load_loads_and_completes_the_profile(llm):
    """Only the loaded model knows its window, of which the answer takes its part, and whether it thinks."""
    assert {"max_input_tokens", "reasoning_output"}.isdisjoint(llm.profile)
    assert llm.load()._rasd.loads == 1
    assert (2048 - 512, True) == (llm.profile["max_input_tokens"], llm.profile["reasoning_output"])


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
