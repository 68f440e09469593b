"""ChatRASD by itself: options, the one path from prompt to text, metadata, messages, errors."""

from __future__ import annotations

import asyncio
import copy

import pytest
from fakes_langchain import ANSWER, FakeRASD
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.runnables import ConfigurableField

from rasd_integrations.config import RetrievalConfig, SamplingParams, SpeculationConfig
from rasd_integrations.errors import ConfigurationError, PromptError
from rasd_integrations.langchain import ChatRASD
from rasd_integrations.types import Chunk


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setattr("rasd_integrations.langchain.base.RASD", FakeRASD)


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
        drafter="self",
        store=store,
        context="documents",
        knowledge_transfer=10.0,
        model_kwargs={"dtype": "bfloat16"},
        chat_template_kwargs={"enable_thinking": False},
        num_draft_tokens=7,
        retrieval={"k": 32},
        prefix_cache_bytes=1024,
        namespace="tenant",
    )
    expected = {
        "drafter": "self",
        "store": store,
        "context": "documents",
        "knowledge_transfer": 10.0,
        "model_kwargs": {"dtype": "bfloat16"},
        "chat_template_kwargs": {"enable_thinking": False},
        "retrieval": RetrievalConfig(k=32),
        "speculation": SpeculationConfig(num_draft_tokens=7),
        "prefix_cache_bytes": 1024,
        "namespace": "tenant",
    }
    assert expected == llm._rasd.options


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"modle": "org/one"}, ["modle", "'model'"]),
        ({"model": "org/one", "max_new_tokens": 5}, ["max_new_tokens", "'max_tokens'"]),
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


def test_standard_options_of_remote_services_are_taken():
    """Code that builds any chat model passes a key, an address, a timeout and retries."""
    remote = {"api_key": "k", "base_url": "http://x", "timeout": 60, "max_retries": 2}
    assert ChatRASD(model="org/one", streaming=True, **remote).model == "org/one"


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
        ({"tools": [{"name": "f"}]}, ["tools"]),
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


def test_tools_cannot_be_bound_yet(llm):
    """Until tools are supported, binding them says so rather than dropping them."""
    with pytest.raises(NotImplementedError):
        llm.bind_tools([])


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
    llm.warm([Document("one"), "two"])
    assert ["one", "two"] == llm._rasd.warmed


def test_load_loads_and_completes_the_profile(llm):
    """Only the loaded model knows its window: what a prompt may have is the window less the answer."""
    assert "max_input_tokens" not in llm.profile
    assert llm.load()._rasd.loaded is True
    assert 2048 - 512 == llm.profile["max_input_tokens"]


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


# --- one path ---


async def test_every_way_of_calling_says_the_same(llm):
    """The join of a stream is the invoked answer, sync and async."""
    answers = [
        llm.invoke("Hi").content,
        "".join(chunk.content for chunk in llm.stream("Hi")),
        (await llm.ainvoke("Hi")).content,
        "".join([chunk.content async for chunk in llm.astream("Hi")]),
        llm.batch(["Hi"])[0].content,
        (await llm.abatch(["Hi"]))[0].content,
    ]
    assert [ANSWER] * 6 == answers


def test_text_arrives_word_by_word_without_empty_chunks(llm):
    """Held-back bytes make no chunk; the last chunk closes the stream."""
    assert ["Ada", " wrote", " it.", ""] == [chunk.content for chunk in llm.stream("Hi")]


async def test_metadata_stands_on_the_last_chunk_only(llm):
    """Usage, finish reason and statistics come once, so that merging chunks does not add them up."""
    for chunks in (list(llm.stream("Hi")), [c async for c in llm.astream("Hi")]):
        *before, last = chunks
        assert [None] * 3 == [c.usage_metadata for c in before]
        assert [{}] * 3 == [c.response_metadata for c in before]
        assert last.chunk_position == "last"
        assert last.usage_metadata == {
            "input_tokens": 1,
            "output_tokens": 3,
            "total_tokens": 4,
            "input_token_details": {"cache_read": 2},
        }
        assert {"model_name", "model_provider", "finish_reason", "rasd"} == set(
            last.response_metadata
        )
        assert 2.0 == last.response_metadata["rasd"]["mean_acceptance_length"]
        assert last.response_metadata["model_provider"] == "rasd"


def test_invoked_answers_carry_the_same_metadata(llm):
    """An invoked answer is the merged stream, metadata included."""
    message = llm.invoke("Hi")
    assert message.usage_metadata["total_tokens"] == 4
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.response_metadata["rasd"]["drafters"] == {
        "suffix": {"drafted": 4, "accepted": 3}
    }


def test_usage_callback_counts_by_model_name(llm):
    """LangChain's own usage counter finds the model's name."""
    with get_usage_metadata_callback() as counter:
        llm.invoke("Hi")
        list(llm.stream("Hi"))
    assert counter.usage_metadata["org/one"]["total_tokens"] == 8


async def test_version_one_output_has_one_text_block(llm):
    """With output_version="v1" the merged stream is one block of text."""
    llm = ChatRASD(model="org/one", output_version="v1")
    merged = None
    async for chunk in llm.astream("Hi"):
        merged = chunk if merged is None else merged + chunk
    assert [("text", ANSWER)] == [(b["type"], b["text"]) for b in merged.content]
    assert [("text", ANSWER)] == [(b["type"], b["text"]) for b in llm.invoke("Hi").content]


async def test_event_stream_v2_reports_each_token_once(llm):
    """`astream_events` sees the words, and no word twice."""
    events = [e async for e in llm.astream_events("Hi", version="v2")]
    words = [e["data"]["chunk"].content for e in events if e["event"] == "on_chat_model_stream"]
    assert ANSWER == "".join(words)


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_event_stream_v3_has_text_and_usage(llm):
    """The protocol's event stream is bridged from the one stream."""
    stream = llm.stream_events("Hi", version="v3")
    message = stream.output
    assert ANSWER == message.text
    assert message.usage_metadata["output_tokens"] == 3


class Tokens(BaseCallbackHandler):
    """Collects reported tokens."""

    def __init__(self):
        self.words = []

    def on_llm_new_token(self, token, **kwargs):
        self.words.append(token)


async def test_tokens_are_reported_once_when_streaming_and_never_when_not(llm):
    """LangChain's base reports a stream's tokens itself; the model must not report them again."""
    tokens = Tokens()
    list(llm.stream("Hi", config={"callbacks": [tokens]}))
    assert ["Ada", " wrote", " it.", ""] == tokens.words
    tokens.words.clear()
    await llm.ainvoke("Hi", config={"callbacks": [tokens]})
    assert [] == tokens.words


def test_streaming_option_reports_tokens_of_an_invoked_answer():
    """`streaming=True` is honoured: invoke tells callbacks of its tokens."""
    tokens = Tokens()
    ChatRASD(model="org/one", streaming=True).invoke("Hi", config={"callbacks": [tokens]})
    assert ANSWER == "".join(tokens.words)


# --- stopping and failing ---


def test_closing_a_stream_stops_the_engine(llm):
    """No step is made for a consumer that has gone."""
    stream = llm.stream("Hi")
    next(stream)
    stream.close()
    assert (1, 0) == (llm._rasd.steps, llm._rasd.open_streams)


async def test_cancelling_a_task_stops_the_engine(llm):
    """A cancelled answer leaves no stream open."""
    started = asyncio.Event()

    async def consume():
        async for _ in llm.astream("Hi"):
            started.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)
    assert (1, 0) == (llm._rasd.steps, llm._rasd.open_streams)


async def test_an_engines_error_reaches_the_caller(llm):
    """A failure in mid-answer is raised, not turned into a short answer."""
    llm._rasd.fail_after = 1
    with pytest.raises(RuntimeError, match="fails here"):
        llm.invoke("Hi")
    with pytest.raises(RuntimeError, match="fails here"):
        await llm.ainvoke("Hi")


# --- messages ---


def test_messages_become_template_dicts(llm):
    """Every kind of message has its role; tool arguments stay a dict for the template's tojson."""
    call = {"name": "search", "args": {"query": "x"}, "id": "1", "type": "tool_call"}
    llm.invoke(
        [
            SystemMessage("s"),
            HumanMessage([{"type": "text", "text": "a"}, "b"]),
            AIMessage(
                [
                    {"type": "text", "text": "t"},
                    {"type": "tool_use", "id": "1", "name": "search", "input": {}},
                ],
                tool_calls=[call],
            ),
            ToolMessage("found", tool_call_id="1", name="search"),
            FunctionMessage("found", name="f"),
            ChatMessage("c", role="critic"),
            AIMessage("done"),
        ]
    )
    function = {"name": "search", "arguments": {"query": "x"}}
    expected = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "t",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "found", "tool_call_id": "1", "name": "search"},
        {"role": "tool", "content": "found", "name": "f"},
        {"role": "critic", "content": "c"},
        {"role": "assistant", "content": "done"},
    ]
    assert expected == last_call(llm).prompt


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (HumanMessage([{"type": "image", "url": "http://x/y.png"}]), "'image'"),
        (HumanMessage([{"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"}]), "'audio'"),
        (ToolMessage([{"type": "json", "json": {}}], tool_call_id="1"), "'json'"),
        (RemoveMessage(id="1"), "RemoveMessage"),
    ],
)
def test_content_that_is_not_text_is_refused_by_name(llm, message, name):
    """A picture must not silently vanish from the prompt."""
    with pytest.raises(PromptError, match=name):
        llm.invoke([message])


# --- the caller's own hints ---


@pytest.mark.parametrize(
    "how", ["invoke", "stream", "ainvoke", "astream", "batch", "abatch", "bind"]
)
async def test_explicit_hints_arrive_on_every_path(llm, how):
    """`rasd={...}` is heard wherever a call option can be given."""
    given = {"question": "Who?", "chunks": ["one", Document("two", id="7"), Chunk("three", rank=9)]}
    match how:
        case "invoke":
            llm.invoke("Hi", rasd=given)
        case "stream":
            list(llm.stream("Hi", rasd=given))
        case "ainvoke":
            await llm.ainvoke("Hi", rasd=given)
        case "astream":
            [_ async for _ in llm.astream("Hi", rasd=given)]
        case "batch":
            llm.batch(["Hi"], rasd=given)
        case "abatch":
            await llm.abatch(["Hi"], rasd=given)
        case "bind":
            llm.bind(rasd=given).invoke("Hi")
    hints = last_call(llm).hints
    assert ("Who?", "explicit", "explicit") == (
        hints.question,
        hints.question_source,
        hints.chunk_source,
    )
    assert (Chunk("one"), Chunk("two", id="7", rank=1), Chunk("three", rank=9)) == hints.chunks


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


def test_profile_says_text_only(llm):
    """Agents read from the profile that there are no tools and no structured output yet."""
    asked = (
        "text_inputs",
        "image_inputs",
        "tool_calling",
        "structured_output",
        "max_output_tokens",
    )
    assert [True, False, False, False, 512] == [llm.profile[name] for name in asked]
