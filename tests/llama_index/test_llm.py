"""The LlamaIndex LLM's endpoints and prompts, over an engine that only writes down what it was asked."""

from __future__ import annotations

import asyncio
import inspect
import json

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import TEXT, USER, call_of
from fakes_llama_index import FakeRASD
from llama_index.core.base.llms.types import (
    ChatMessage,
    CitableBlock,
    CitationBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from rasd_integrations.errors import PromptError
from rasd_integrations.runtime.rasd import RASD

pytestmark = pytest.mark.usefixtures("fake_engine")

# --- the eight endpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["stream", "generate", "astream", "agenerate"])
def test_the_recording_engine_has_the_engines_face(method):
    """What these tests hand to the fake, the real engine takes."""
    real, fake = (inspect.signature(getattr(kind, method)).parameters for kind in (RASD, FakeRASD))

    assert [(p.name, p.kind, p.default) for p in real.values()] == [
        (p.name, p.kind, p.default) for p in fake.values()
    ]


async def test_async_endpoints_use_the_engines_own_async(llm):
    """No async endpoint runs the blocking call on the event loop."""
    await llm.acomplete("Who?")
    await llm.achat(USER)
    [_ async for _ in await llm.astream_complete("Who?")]
    [_ async for _ in await llm.astream_chat(USER)]

    assert ["agenerate", "agenerate", "astream", "astream"] == [c.method for c in llm._rasd.calls]


def test_streams_carry_the_answer_so_far(llm):
    """Each response holds all text until now; pieces without text are left out but for the last."""
    chat = [r.message.content for r in llm.stream_chat(USER)]
    text = [r.text for r in llm.stream_complete("Who?")]

    assert ["The ", "The lighthouse ", TEXT, TEXT] == chat == text


async def test_usage_and_statistics_stand_on_the_last_response_only(llm):
    """``raw`` has what token counters read and the answer's own statistics."""
    streamed = list(llm.stream_chat(USER))
    astreamed = [r async for r in await llm.astream_complete("Who built it?")]
    whole = llm.chat(USER)

    assert [None, None, None] == [r.raw for r in streamed[:-1]] == [r.raw for r in astreamed[:-1]]
    assert streamed[-1].raw == astreamed[-1].raw == whole.raw
    assert {"prompt_tokens": 12, "completion_tokens": 7, "total_tokens": 19} == whole.raw["usage"]
    assert whole.raw["rasd"]["generated_tokens"] == 7
    assert json.loads(json.dumps(whole.raw)) == whole.raw


def test_closing_a_stream_closes_the_engines(llm):
    """A consumer that stops early stops the decoding."""
    chunks = llm._rasd.stream("Who?")
    llm._rasd.stream = lambda *_, **__: chunks
    stream = llm.stream_complete("Who?")
    next(stream)
    stream.close()

    with pytest.raises(StopIteration):
        next(chunks)


async def test_closing_an_async_stream_closes_the_engines(llm):
    """A consumer that stops early stops the decoding, also in async code."""
    chunks = llm._rasd.astream("Who?")
    llm._rasd.astream = lambda *_, **__: chunks
    stream = await llm.astream_chat(USER)
    await anext(stream)
    await stream.aclose()
    for _ in range(5):  # the framework's wrapper leaves the inner stream to the loop's own clean-up
        await asyncio.sleep(0)

    with pytest.raises(StopAsyncIteration):
        await anext(chunks)


def test_a_stream_checks_its_prompt_when_called(llm):
    """What is wrong with a prompt is said before the first piece is asked for."""
    with pytest.raises(PromptError, match="empty"):
        llm.stream_chat([])


# --- prompts --------------------------------------------------------------------------------------


def test_a_base_model_gets_text(llm, monkeypatch):
    """Without a chat template, messages become the framework's own plain prompt."""
    monkeypatch.setattr(FakeRASD, "has_chat_template", False)
    llm.chat(USER)
    llm.complete("Who?")

    assert llm.metadata.is_chat_model is False
    assert ["user: Who built it?\nassistant: ", "Who?"] == [c.prompt for c in llm._rasd.calls]


def test_messages_reach_the_chat_template_whole(llm):
    """Roles take the template's names; tool calls, results and thoughts keep their fields."""
    messages = [
        ChatMessage(role=MessageRole.DEVELOPER, content="Be brief."),
        ChatMessage(role="user", blocks=[TextBlock(text="one"), TextBlock(text="two")]),
        ChatMessage(
            role="assistant",
            blocks=[
                ThinkingBlock(content="hm"),
                ToolCallBlock(tool_call_id="7", tool_name="look", tool_kwargs={"q": "x"}),
            ],
        ),
        ChatMessage(
            role="tool", content="found", additional_kwargs={"tool_call_id": "7", "name": "look"}
        ),
    ]
    llm.chat(messages)

    function = {"name": "look", "arguments": {"q": "x"}}
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "7", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "found", "tool_call_id": "7", "name": "look"},
    ]
    assert expected == call_of(llm).prompt


def test_a_block_that_is_not_text_is_refused(llm):
    """An image is named, not dropped."""
    message = ChatMessage(role="user", blocks=[ImageBlock(url="https://example.org/x.png")])

    with pytest.raises(PromptError, match="'image'"):
        llm.chat([message])


def test_blocks_without_text_in_the_history_are_passed_over(llm, caplog):
    """Fault 12: what an assistant or a tool showed elsewhere is left out with one line; what is citable is read."""
    image = ImageBlock(url="https://example.org/x.png")
    cited = CitableBlock(title="t", source="s", content=[TextBlock(text="read"), image])
    quote = CitationBlock(
        cited_content=TextBlock(text="x"), source="s", title="t", additional_location_info={}
    )
    llm.chat(
        [
            ChatMessage(role="assistant", blocks=[image, TextBlock(text="said"), quote]),
            ChatMessage(role="tool", blocks=[cited], additional_kwargs={"tool_call_id": "1"}),
            ChatMessage(role="user", content="and?"),
        ]
    )
    assert ["said", "read", "and?"] == [m["content"] for m in call_of(llm).prompt]
    assert 2 == len([r for r in caplog.records if "'image'" in r.getMessage()])
