"""Tool calling of the LlamaIndex LLM, over an engine that says what the test wrote."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import USER, call_of
from fakes_llama_index import FakeRASD, called, thought
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import FunctionTool

from rasd_integrations.errors import ConfigurationError, DecodingError, PromptError
from rasd_integrations.llama_index import RASDLLM

ADD = called("add", '{"a": 1', ', "b": 2}')
TWICE = [*ADD, *called("add", '{"a": 3, "b": 4}', index=1)]


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


TOOL = FunctionTool.from_defaults(add)
SPEC = TOOL.metadata.to_openai_tool()


# --- what reaches the engine ----------------------------------------------------------------------


def test_agents_take_it(llm, monkeypatch):
    """It is a function-calling LLM where its chat template writes the prompts."""
    assert isinstance(llm, FunctionCallingLLM)
    assert llm.metadata.is_function_calling_model
    assert not RASDLLM("m", messages_to_prompt=str).metadata.is_function_calling_model
    monkeypatch.setattr(FakeRASD, "has_chat_template", False)
    assert not llm.metadata.is_function_calling_model


def test_strict_is_heard_of_tools_in_openais_form(llm):
    """Fault 13: strictness is the call's, or the tool's own."""
    llm.chat_with_tools([SPEC], "Add.", strict=True)
    assert True is llm._rasd.calls[-1].tools.strict
    llm.chat_with_tools(
        [{"type": "function", "function": {**SPEC["function"], "strict": True}}], "Add."
    )
    assert True is llm._rasd.calls[-1].tools.strict


async def test_tools_reach_the_engine_on_every_chat_endpoint(llm):
    """Whole or streamed, sync or async, the same tools and choice arrive."""
    asked = {"allow_parallel_tool_calls": True, "tool_required": True, "strict": True}
    llm.chat_with_tools([TOOL], "Add.", **asked)
    list(llm.stream_chat_with_tools([TOOL], "Add.", **asked))
    await llm.achat_with_tools([TOOL], "Add.", **asked)
    [_ async for _ in await llm.astream_chat_with_tools([TOOL], "Add.", **asked)]

    uses = [call.tools for call in llm._rasd.calls]
    assert [(SPEC,)] * 4 == [use.tools for use in uses]
    assert [("required", True, True)] * 4 == [(u.choice, u.parallel, u.strict) for u in uses]


@pytest.mark.parametrize(
    ("asked", "choice"),
    [
        ({}, "auto"),
        ({"tool_required": True}, "required"),
        ({"tool_choice": "add", "tool_required": True}, "add"),
        ({"tool_choice": "none"}, "none"),
        ({"tool_choice": "any"}, "required"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "add"),
    ],
)
def test_the_choice_of_a_tool(llm, asked, choice):
    """Every way to say it; what is said outright goes before ``tool_required``."""
    llm.chat_with_tools([TOOL], "Add.", **asked)

    use = call_of(llm).tools
    assert (choice, False) == (use.choice, use.parallel)


def test_options_of_a_chat_call_name_tools_too(llm):
    """Tools may be given to a plain chat call, as objects or as specifications."""
    llm.chat(USER, tools=[TOOL, {**SPEC, "function": {**SPEC["function"], "name": "plus"}}])

    assert ("add", "plus") == call_of(llm).tools.names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "add"}, "tools is a str"),
        ({"tools": [add]}, "A tool is"),
        ({"tools": [TOOL, TOOL]}, "share a name"),
        ({"tool_choice": "required"}, "no tools are given"),
        ({"tools": [TOOL], "tool_choice": "subtract"}, "one of the tools: add"),
    ],
)
def test_what_cannot_be_called_is_refused(llm, options, message):
    """Each fault is named before anything is decoded."""
    with pytest.raises(ConfigurationError, match=message):
        llm.chat(USER, **options)


@pytest.mark.parametrize("base", [True, False])
def test_tools_need_a_template_to_be_told_of(llm, monkeypatch, base):
    """A prompt that is a text cannot show tools; the error says why and what to do."""
    if base:
        monkeypatch.setattr(FakeRASD, "has_chat_template", False)
    else:
        llm.messages_to_prompt = str
    with pytest.raises(ConfigurationError, match="template" if base else "messages_to_prompt"):
        llm.chat(USER, tools=[TOOL])


def test_tool_calls_in_a_history_are_read_in_every_form(llm):
    """Blocks, OpenAI's form as mapping or object, and selections mean the same; blocks go before the rest."""
    function = {"name": "add", "arguments": '{"a": 1}'}
    old = [
        {"id": "7", "type": "function", "function": function},
        SimpleNamespace(id="7", function=SimpleNamespace(**function)),
        {"id": "7", "function": {"name": "add", "arguments": {"a": 1}}},
        ToolSelection(tool_id="7", tool_name="add", tool_kwargs={"a": 1}),
    ]
    block = ToolCallBlock(tool_call_id="7", tool_name="add", tool_kwargs={"a": 1})
    messages = [
        ChatMessage(role="assistant", additional_kwargs={"tool_calls": [call]}) for call in old
    ]
    both = ChatMessage(role="assistant", blocks=[block], additional_kwargs={"tool_calls": old[:1]})
    llm.chat([*messages, both])

    plain = {"id": "7", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert [[plain]] * 5 == [m["tool_calls"] for m in call_of(llm).prompt]


def test_a_call_without_a_name_is_refused(llm):
    """What is no tool call is shown, not dropped."""
    message = ChatMessage(role="assistant", additional_kwargs={"tool_calls": [{"id": "7"}]})

    with pytest.raises(PromptError, match="'id': '7'"):
        llm.chat([message])


# --- what comes back ------------------------------------------------------------------------------


def test_a_response_holds_thoughts_text_and_calls(llm):
    """Each is a block of its own; without text there is none."""
    llm._rasd.answers = ([thought("Hm."), "Wait.", *ADD], ADD)
    first, second = llm.chat(USER).message, llm.chat(USER).message

    call = ToolCallBlock(tool_call_id="call_0", tool_name="add", tool_kwargs={"a": 1, "b": 2})
    assert [ThinkingBlock(content="Hm."), TextBlock(text="Wait."), call] == first.blocks
    assert ([call], None) == (second.blocks, second.content)


async def test_streams_carry_the_calls_so_far(llm):
    """Arguments are text until they are whole; the last response equals the whole answer's message."""
    llm._rasd.answers = [TWICE] * 3
    streamed = list(llm.stream_chat(USER))
    astreamed = [r async for r in await llm.astream_chat(USER)]

    written = [r.message.blocks[-1].tool_kwargs for r in streamed]
    whole = {"a": 1, "b": 2}
    assert ["", '{"a": 1', whole, "", {"a": 3, "b": 4}, {"a": 3, "b": 4}] == written
    assert [r.message for r in streamed] == [r.message for r in astreamed]
    assert streamed[-1].message == llm.chat(USER).message
    assert {""} == {r.delta for r in streamed}
    assert streamed[-1].raw["finish_reason"] == "tool_calls"


def test_thoughts_stream_beside_the_text(llm):
    """A thought is no part of the text, and its new piece is told."""
    llm._rasd.answers = ([thought("H"), thought("m."), "Hi", "!"],)
    responses = list(llm.stream_chat(USER))

    told = [(r.delta, r.additional_kwargs.get("thinking_delta")) for r in responses]
    assert [("", "H"), ("", "m."), ("Hi", None), ("!", None), ("", None)] == told
    assert [ThinkingBlock(content="Hm."), TextBlock(text="Hi!")] == responses[-1].message.blocks
    assert ["H", "Hm.", "Hm."] == [r.message.blocks[0].content for r in responses[:3]]


def test_selections(llm):
    """The calls of a response in the form that is run, from blocks or the older form."""
    llm._rasd.answers = (TWICE,)
    response = llm.chat(USER, tools=[TOOL])
    function = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    old = ChatMessage(
        role="assistant", additional_kwargs={"tool_calls": [{"id": "call_0", "function": function}]}
    )
    one, two = llm.get_tool_calls_from_response(response)

    expected = ToolSelection(tool_id="call_0", tool_name="add", tool_kwargs={"a": 1, "b": 2})
    assert (expected, {"a": 3, "b": 4}) == (one, two.tool_kwargs)
    assert [expected] == llm.get_tool_calls_from_response(ChatResponse(message=old))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("", {}),
        ("null", {}),
        ('{"a": 1', {"a": 1}),
        ('{"a": 1, "b"', {"a": 1}),
        ('{"a": "one\ntwo"}', {"a": "one\ntwo"}),
        ("{'a': 1}", {}),
        ("[1, 2]", {}),
    ],
)
def test_arguments_that_are_no_object_are_mended_or_empty(llm, written, read):
    """A free model's faults reach the tool, which says what it misses."""
    llm._rasd.answers = (called("add", written),)
    response = llm.chat(USER, tools=[TOOL])
    assert [read] == [c.tool_kwargs for c in llm.get_tool_calls_from_response(response)]


def test_half_a_call_is_no_selection(llm):
    """An answer that ended at ``max_tokens`` within a call is not run with what there is of it."""
    llm._rasd.answers = (called("add", '{"a": 1'),)
    llm._rasd.ends = "length"
    cut = llm.chat(USER, tools=[TOOL])
    with pytest.raises(DecodingError, match="Raise max_tokens"):
        llm.get_tool_calls_from_response(cut)
