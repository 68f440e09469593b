"""ChatRASD by itself: the one path from prompt to text, metadata, errors, the caller's own hints."""

from __future__ import annotations

import asyncio

import pytest
from fakes_langchain import ANSWER
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.documents import Document

from rasd_integrations.langchain import ChatRASD
from rasd_integrations.types import Chunk

pytestmark = pytest.mark.usefixtures("fake_engine")


def last_call(llm):
    return llm._rasd.calls[-1]


# --- one path ---


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
            "output_token_details": {"reasoning": 0},
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
