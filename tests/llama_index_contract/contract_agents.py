"""The LlamaIndex contract: agents and workflows of agents."""

from __future__ import annotations

import pytest
from contract_setup import FACT, KEY, QUESTION, ContractSetup
from llama_index.core.agent.workflow import (
    AgentStream,
    AgentWorkflow,
    FunctionAgent,
    ReActAgent,
    ToolCallResult,
)
from llama_index.core.tools import QueryEngineTool, RetrieverTool, ToolMetadata
from pydantic import BaseModel

SUM = "Please add 3 and 4."
# LlamaIndex's agents use what pydantic and its own workflows have deprecated.
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning")
STREAMING = pytest.mark.parametrize("streaming", [True, False])
LOOK = ToolMetadata(name="capes", description="Knows every lighthouse at a cape.")


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Total(BaseModel):
    """A number."""

    value: int


async def run(agent, question, **options):
    """Run an agent; return its result and the events on the way."""
    handler = agent.run(question, **options)
    events = [event async for event in handler.stream_events()]
    return await handler, events


def ran(events):
    """Return the tools that ran and what they gave."""
    return [
        (e.tool_name, str(e.tool_output.raw_output))
        for e in events
        if isinstance(e, ToolCallResult)
    ]


class FunctionAgents(ContractSetup):
    """Agents that call functions."""

    @QUIET
    @STREAMING
    async def test_a_function_tool(self, caller, streaming):
        """The tool runs once and its result is in the answer."""
        agent = FunctionAgent(tools=[add], llm=caller, streaming=streaming)
        result, events = await run(agent, SUM)

        assert "7" in str(result)
        assert [("add", "7")] == ran(events)
        assert [("add", {"a": 3, "b": 4})] == [
            (c.tool_name, c.tool_kwargs) for c in result.tool_calls
        ]

    @QUIET
    async def test_its_stream(self, caller):
        """The pieces of text join to the answer; the calls show as they are written."""
        _, events = await run(FunctionAgent(tools=[add], llm=caller), SUM)
        pieces = [event for event in events if isinstance(event, AgentStream)]

        answered = [p for p in pieces if not p.tool_calls]
        assert "7" in "".join(p.delta for p in answered)
        assert answered[-1].response.endswith("".join(p.delta for p in answered[-3:]))
        assert any(p.tool_calls for p in pieces)

    @QUIET
    @STREAMING
    async def test_a_query_engine_among_its_tools(self, caller, index, streaming):
        """It looks things up with one tool and adds with the other."""
        engine = index.as_query_engine(llm=caller)
        tools = [QueryEngineTool(engine, metadata=LOOK), add]
        agent = FunctionAgent(tools=tools, llm=caller, streaming=streaming)
        looked, events = await run(agent, QUESTION)
        added, more = await run(agent, SUM)

        assert KEY in str(looked)
        assert "7" in str(added)
        assert ["capes", "add"] == [name for name, _ in (*ran(events), *ran(more))]

    @QUIET
    async def test_a_retriever_among_its_tools(self, caller, index):
        """The chunks themselves come back to it."""
        tools = [RetrieverTool(index.as_retriever(similarity_top_k=1), metadata=LOOK)]
        result, _ = await run(FunctionAgent(tools=tools, llm=caller), QUESTION)

        assert FACT in str(result)

    @QUIET
    async def test_several_calls_at_once(self, caller):
        """All of them run, and the answer has what each gave."""

        def weather(city: str) -> str:
            """Get the weather in a city."""
            return f"Sunny in {city}."

        agent = FunctionAgent(tools=[weather], llm=caller)
        result, events = await run(agent, "Get the weather in Paris and in Rome, please.")

        assert [("weather", "Sunny in Paris."), ("weather", "Sunny in Rome.")] == sorted(
            ran(events)
        )
        assert all(city in str(result) for city in ("Paris", "Rome"))

    @QUIET
    async def test_no_tool_where_none_is_needed(self, caller):
        """A greeting is answered at once."""
        result, events = await run(FunctionAgent(tools=[add], llm=caller), "Hello!")

        assert str(result)
        assert [] == ran(events)

    @QUIET
    async def test_the_first_tool_can_be_named(self, caller):
        """``initial_tool_choice`` holds whatever was said."""
        agent = FunctionAgent(tools=[add], llm=caller, initial_tool_choice="add")
        _, events = await run(agent, "Hello!")

        assert "add" == ran(events)[0][0]

    @QUIET
    async def test_two_runs_with_one_memory(self, caller, memory):
        """The second run reads the first, calls and all."""
        agent = FunctionAgent(tools=[add], llm=caller)
        await agent.run(SUM, memory=memory)
        result = await agent.run("Now add 20 and 1, please.", memory=memory)

        assert "21" in str(result)
        roles = ["user", "assistant", "tool", "assistant"]
        assert ["user", "assistant", *roles, *roles] == [m.role.value for m in memory.get_all()]
        assert SUM in self.prompts_read()[-1]

    @QUIET
    async def test_an_answer_as_an_object(self, caller):
        """``output_cls`` gives an object beside the text."""
        result, _ = await run(FunctionAgent(tools=[add], llm=caller, output_cls=Total), SUM)

        assert isinstance(result.get_pydantic_model(Total), Total)

    @QUIET
    async def test_a_workflow_of_two(self, caller):
        """One agent hands over to the other, which ends the run."""
        clerk = FunctionAgent(name="Clerk", description="Takes orders.", llm=caller)
        adder = FunctionAgent(name="Adder", description="Sums up.", tools=[add], llm=caller)
        workflow = AgentWorkflow(agents=[clerk, adder], root_agent="Clerk")
        result, events = await run(workflow, 'Use the handoff tool with "Adder", please.')

        assert ["handoff"] == [name for name, _ in ran(events)][:1]
        assert "Adder" == result.current_agent_name
        assert str(result)


class ReActAgents(ContractSetup):
    """Agents that write everything as text; every chat model can be one."""

    @QUIET
    @STREAMING
    async def test_react_with_a_function_tool(self, llm, streaming):
        """Thought, action, observation, answer."""
        result, events = await run(ReActAgent(tools=[add], llm=llm, streaming=streaming), SUM)

        assert "7" in str(result)
        assert [("add", "7")] == ran(events)

    @QUIET
    @STREAMING
    async def test_react_with_a_query_engine(self, llm, index, streaming):
        """The inner call is one of the same LLM."""
        tools = [QueryEngineTool(index.as_query_engine(llm=llm), metadata=LOOK), add]
        result, events = await run(ReActAgent(tools=tools, llm=llm, streaming=streaming), QUESTION)

        assert KEY in str(result)
        assert ["capes"] == [name for name, _ in ran(events)]

    @QUIET
    async def test_react_workflow_of_two(self, llm):
        """Handing over works in text too."""
        clerk = ReActAgent(name="Clerk", description="Takes orders.", tools=[add], llm=llm)
        adder = ReActAgent(name="Adder", description="Sums up.", tools=[add], llm=llm)
        workflow = AgentWorkflow(agents=[clerk, adder], root_agent="Clerk")
        result, events = await run(workflow, 'Use the handoff tool with "Adder", please.')

        assert "handoff" == ran(events)[0][0]
        assert "Adder" == result.current_agent_name
