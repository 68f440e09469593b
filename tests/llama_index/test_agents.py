"""LlamaIndex's agents over an engine that says what the test wrote: what reaches it, and what agents make of it."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import (
    QUESTION,
    TEXT,
    assert_chunks,
    assert_hints_are_exact,
    history,
    shown,
)
from fakes_llama_index import FakeRASD, called, thought
from llama_index.core.agent.workflow import (
    AgentStream,
    AgentWorkflow,
    FunctionAgent,
    ReActAgent,
    ToolCallResult,
)
from llama_index.core.tools import QueryEngineTool, RetrieverTool, ToolMetadata

from rasd_integrations.errors import DecodingError

# LlamaIndex's agents use what pydantic and its own workflows have deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LOOK = ToolMetadata(name="look", description="Looks things up.")
REACT = f'Thought: I must look.\nAction: look\nAction Input: {{"input": "{QUESTION}"}}'
LOOK_UP = called("look", '{"input": ', f'"{QUESTION}"}}')


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def retriever_tool(index):
    """Return the index as a tool that answers with chunks."""
    return RetrieverTool(index.as_retriever(), metadata=LOOK)


def engine_tool(index, llm):
    """Return the index as a tool that answers with text."""
    return QueryEngineTool(index.as_query_engine(llm=llm), metadata=LOOK)


@pytest.mark.parametrize("streaming", [True, False])
async def test_function_agent_with_a_retriever_tool(index, llm, streaming):
    """The call after the tool knows the nodes and what was searched, though the tool ran in another task."""
    llm._rasd.answers = (LOOK_UP, "Stevenson did.")
    agent = FunctionAgent(
        tools=[retriever_tool(index)], llm=llm, system_prompt="Look.", streaming=streaming
    )
    result = await agent.run(QUESTION, memory=history())

    first, second = llm._rasd.calls
    assert str(result) == "Stevenson did."
    assert [("look",)] * 2 == [call.tools.names for call in (first, second)]
    assert first.hints is None
    roles = ["system", "user", "assistant", "user", "assistant", "tool"]
    assert roles == [m["role"] for m in second.prompt]
    function = {"name": "look", "arguments": {"input": QUESTION}}
    assert [{"id": "call_0", "type": "function", "function": function}] == second.prompt[-2][
        "tool_calls"
    ]
    assert second.prompt[-1]["tool_call_id"] == "call_0"
    assert_chunks(second)
    assert second.hints.search_query == QUESTION
    assert [index] == llm._rasd.attached


async def test_function_agent_with_a_query_engine_tool(index, llm):
    """The outer model sees the inner answer; the inner call is a packed answer like any other."""
    llm._rasd.answers = (LOOK_UP, "Stevenson, in 1828.", "Stevenson did.")
    result = await FunctionAgent(tools=[engine_tool(index, llm)], llm=llm).run(QUESTION)

    _, inner, outer = llm._rasd.calls
    assert str(result) == "Stevenson did."
    assert_hints_are_exact(inner)
    assert_chunks(inner)
    assert inner.tools is None
    assert outer.prompt[-1]["content"] == "Stevenson, in 1828."


@pytest.mark.parametrize("parallel", [True, False])
async def test_function_agent_runs_every_call(llm, parallel):
    """Calls written in one answer all run; an agent that allows one alone says so to the engine."""
    llm._rasd.answers = (
        [*called("add", '{"a": 1, "b": 2}'), *called("add", '{"a": 3, "b": 4}', index=1)],
        "3 and 7.",
    )
    agent = FunctionAgent(tools=[add], llm=llm, allow_parallel_tool_calls=parallel)
    result = await agent.run("Add twice.")

    first, second = llm._rasd.calls
    assert str(result) == "3 and 7."
    assert first.tools.parallel is parallel
    assert ["3", "7"] == [m["content"] for m in second.prompt if m["role"] == "tool"]


async def test_function_agent_streams_thoughts_text_and_growing_calls(llm):
    """Its events carry what is new; arguments that are half written are read as far as they go."""
    llm._rasd.answers = (
        [thought("Let me "), thought("add."), "Wait. ", *called("add", '{"a": 1', ', "b": 2}')],
        "3.",
    )
    handler = FunctionAgent(tools=[add], llm=llm).run("Add 1 and 2.")
    events = [event async for event in handler.stream_events()]
    await handler
    streamed = [event for event in events if isinstance(event, AgentStream)]

    assert ["Let me ", "add."] == [e.thinking_delta for e in streamed if e.thinking_delta]
    assert "Wait. 3." == "".join(event.delta for event in streamed)
    first = [e.tool_calls[0].tool_kwargs for e in streamed if e.tool_calls]
    assert [{}, {"a": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 2}] == first
    assert [3] == [e.tool_output.raw_output for e in events if isinstance(e, ToolCallResult)]
    assert "Let me add." == llm._rasd.calls[1].prompt[1]["reasoning_content"]


async def test_an_agent_without_tools_just_answers(llm):
    """No tools reach the engine where there are none."""
    result = await FunctionAgent(llm=llm).run("Hello!")

    (call,) = llm._rasd.calls
    assert (TEXT, None) == (str(result), call.tools)


async def test_a_tools_error_is_told_to_the_model(llm):
    """Arguments that fit no tool go back as the tool's own error, and the model may try again."""
    llm._rasd.answers = (
        called("add", '{"a": 1'),
        called("add", '{"a": 1, "b": 2}'),
        called("subtract", "{}"),
        "3.",
    )
    result = await FunctionAgent(tools=[add], llm=llm).run("Add 1 and 2.")

    said = [m["content"] for m in llm._rasd.calls[-1].prompt if m["role"] == "tool"]
    assert str(result) == "3."
    assert "missing 1 required positional argument" in said[0]
    assert ("3", True) == (said[1], "subtract not found" in said[2])


async def test_half_a_call_is_not_run(llm):
    """An answer cut within a call ends the run and names the option to raise."""
    llm._rasd.answers = (called("add", '{"a": 1, "b": 2'),)
    llm._rasd.ends = "length"

    with pytest.raises(DecodingError, match=r"within a call of 'add'.*Raise max_tokens"):
        await FunctionAgent(tools=[add], llm=llm).run("Add 1 and 22.")


async def test_a_workflow_hands_over(index, llm):
    """The second agent goes on with its own prompt and tools, and knows what the first one retrieved."""
    llm._rasd.answers = (
        LOOK_UP,
        called("handoff", '{"to_agent": "writer", "reason": "found it"}'),
        "Stevenson did.",
    )
    finder = FunctionAgent(
        name="finder", description="Finds.", tools=[retriever_tool(index)], llm=llm
    )
    writer = FunctionAgent(
        name="writer", description="Writes.", tools=[add], llm=llm, system_prompt="Write."
    )
    workflow = AgentWorkflow(agents=[finder, writer], root_agent="finder")
    result = await workflow.run(QUESTION, memory=history())

    *_, last = llm._rasd.calls
    assert str(result) == "Stevenson did."
    assert [("look", "handoff"), ("look", "handoff"), ("add", "handoff")] == [
        call.tools.names for call in llm._rasd.calls
    ]
    assert "Write." == last.prompt[0]["content"]
    assert_chunks(last)


async def test_react_agent_with_a_retriever_tool(index, llm):
    """The call after the tool knows the nodes, though the tool ran in another task."""
    llm._rasd.answers = (REACT, "Thought: I can answer.\nAnswer: Stevenson.")
    agent = ReActAgent(tools=[retriever_tool(index)], llm=llm)
    result = await agent.run(QUESTION, memory=history())

    first, second = llm._rasd.calls
    assert str(result) == "Stevenson."
    assert (None, None) == (first.hints, first.tools)
    assert "Observation: file_name: f0.txt" in second.text
    assert_chunks(second)
    assert second.hints.search_query == QUESTION


async def test_react_agent_with_a_query_engine_tool(index, llm):
    """The inner call is a packed answer like any other."""
    llm._rasd.answers = (REACT, "Stevenson did.", "Thought: I can answer.\nAnswer: Stevenson.")
    await ReActAgent(tools=[engine_tool(index, llm)], llm=llm).run(QUESTION, memory=history())

    _, inner, _ = llm._rasd.calls
    assert_hints_are_exact(inner)
    assert_chunks(inner)


def test_predict_and_call_runs_the_retriever(index, llm):
    """The framework's one-shot call runs the tool that the model chose."""
    llm._rasd.answers = (LOOK_UP,)
    result = llm.predict_and_call([retriever_tool(index)], user_msg=QUESTION)

    assert shown(index.as_retriever().retrieve(QUESTION)[0].node) in str(result)
    assert llm._rasd.calls[0].tools.choice == "auto"


async def test_a_base_model_calls_by_react(llm, monkeypatch):
    """Without a chat template the agent that writes everything as text works."""
    monkeypatch.setattr(FakeRASD, "has_chat_template", False)
    line = 'Thought: I must add.\nAction: add\nAction Input: {"a": 1, "b": 2}'
    llm._rasd.answers = (line, "Thought: I can answer.\nAnswer: 3.")
    result = await ReActAgent(tools=[add], llm=llm).run("Add 1 and 2.")

    assert str(result) == "3."
    assert llm._rasd.calls[1].prompt.endswith("user: Observation: 3\nassistant: ")
