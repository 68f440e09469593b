"""Agents on the real engine: full loops with tools, and what the engine is told of their prompts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from assistant import standard_model
from cases_langchain import (
    ABOUT_ADA,
    ABOUT_PARIS,
    ADA,
    HOWS,
    PARIS,
    STORES,
    call,
    joined,
    memory_store,
    texts,
)  # fmt: skip
from langchain.agents import create_agent
from langchain.agents.middleware import dynamic_prompt
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import create_retriever_tool, tool
from pydantic import BaseModel
from scripted import scripted_model

from rasd_integrations.langchain import ChatRASD

pytestmark = pytest.mark.usefixtures("recording_engine")


assistant = functools.cache(standard_model)


@pytest.fixture
def llm():
    return ChatRASD.from_model(*assistant(), max_tokens=300)


def asked(question):
    return {"messages": [HumanMessage(question)]}


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"It rains in {city}."


@tool
def subtract(a: int, b: int) -> int:
    """Subtract the number b from the number a."""
    return a - b


# --- full loops ---


async def outcome(agent: Any, how: str, state: Any) -> list[Any]:
    """Return the messages that ``agent`` ends with, called in the way that ``how`` names."""
    match how:
        case "invoke":
            end = agent.invoke(state)
        case "stream":
            *_, end = agent.stream(state, stream_mode="values")
        case "ainvoke":
            end = await agent.ainvoke(state)
        case "astream":
            end = [s async for s in agent.astream(state, stream_mode="values")][-1]
        case "batch":
            end = agent.batch([state])[0]
        case "abatch":
            end = (await agent.abatch([state]))[0]
    return end["messages"]


def calling(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@functools.cache
def historian():
    """Return a model that searches, looks at the weather, computes with what it found, and answers."""
    steps = [
        calling("search", '{"query": "Who wrote the first program?"}'),
        "Two things at once.\n"
        + calling("get_weather", '{"city": "Zürich"}')
        + "\n"
        + calling("subtract", '{"a": 2025, "b": 1843}'),
        "Ada did, 182 years ago. It rains in Zürich.",
    ]
    return scripted_model(lambda prompt: steps[min(prompt.count("<tool_response>"), 2)])


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("store", ["chroma", "faiss"])
async def test_a_full_loop_with_two_tools_and_a_retriever(store, how):
    """The model searches the store, makes two calls in one answer, and answers from their results."""
    llm = ChatRASD.from_model(*historian(), max_tokens=300)
    retriever = STORES[store]().as_retriever(search_kwargs={"k": 2})
    search = create_retriever_tool(retriever, "search", "Search the facts.")
    agent = create_agent(llm, [get_weather, subtract, search])
    messages = await outcome(agent, how, asked("Who wrote the first program, and how long ago?"))

    kinds = [type(m) for m in messages]
    assert [HumanMessage, AIMessage, ToolMessage, AIMessage, ToolMessage, ToolMessage, AIMessage] == kinds  # fmt: skip
    assert messages[2].content.startswith(ADA)
    assert "Two things at once." == messages[3].text.strip()
    results = {m.name: m.content for m in messages[4:6]}
    assert {"get_weather": "It rains in Zürich.", "subtract": "182"} == results
    assert "Ada did, 182 years ago. It rains in Zürich." == messages[6].text

    first, *later = llm._rasd.calls
    found = [d.page_content for d in retriever.invoke(ABOUT_ADA)]
    assert first.hints is None
    assert [found, found] == [texts(c.hints) for c in later]


async def test_two_cities_are_two_calls_of_one_answer(llm):
    """Parallel calls have ids of their own, and each gets its result."""
    messages = await outcome(
        create_agent(llm, [get_weather]), "ainvoke", asked("What is the weather in Paris and Rome?")
    )
    _, calls, *results, _ = messages
    assert [{"city": "Paris"}, {"city": "Rome"}] == [c["args"] for c in calls.tool_calls]
    assert [c["id"] for c in calls.tool_calls] == [m.tool_call_id for m in results]
    assert 2 == len({c["id"] for c in calls.tool_calls})


def test_calls_and_text_are_streamed_out_of_the_graph(llm):
    """`stream_mode="messages"` shows the call as it is written and the answer word by word."""
    agent = create_agent(llm, [get_weather])
    state = asked("What is the weather in Paris?")
    chunks = [
        chunk
        for chunk, _ in agent.stream(state, stream_mode="messages")
        if isinstance(chunk, AIMessageChunk)
    ]
    fragments = [c for chunk in chunks for c in chunk.tool_call_chunks]
    assert "get_weather" == fragments[0]["name"]
    assert '{"city": "Paris"}' == "".join(c["args"] for c in fragments)
    assert 2 < len(fragments)
    assert "The result is: It rains in Paris." == "".join(c.text for c in chunks)


@pytest.mark.parametrize("modes", [["values"], ["values", "messages"]])
def test_a_call_cut_at_max_tokens_is_not_run(modes):
    """LangChain mends cut JSON where it joins a stream; half a call must not be made all the same."""
    made = []

    @tool
    def delete(path: str) -> str:
        """Delete a file."""
        made.append(path)
        return "done"

    written = calling("delete", '{"path": "/home/ada/notes.txt"}')
    model, tokenizer = scripted_model(lambda prompt: written)
    short = ChatRASD.from_model(model, tokenizer, max_tokens=written.index("/ada"))
    events = create_agent(short, [delete]).stream(asked("Delete it."), stream_mode=modes)
    message = [state for mode, state in events if mode == "values"][-1]["messages"][-1]
    assert [] == made
    assert ([], "length") == (message.tool_calls, message.response_metadata["finish_reason"])
    (broken,) = message.invalid_tool_calls
    assert ("delete", '{"path": "/home') == (broken["name"], broken["args"])
    assert "max_tokens" in broken["error"]


class Report(BaseModel):
    """The weather."""

    city: str
    sky: str


@pytest.mark.parametrize("strategy", [Report, ToolStrategy(Report)])
async def test_an_agent_with_a_structured_answer(llm, strategy):
    """By the profile a schema is held to by the engine's grammar; a forced call does as well."""
    agent = create_agent(llm, [get_weather], response_format=strategy)
    end = await agent.ainvoke(asked("What is the weather in Paris?"))
    assert isinstance(end["structured_response"], Report)
    assert "It rains in Paris." == end["messages"][2].content
    form = [(c.params.grammar is not None, c.tools.choice) for c in llm._rasd.calls]
    assert [form[0]] * 2 == form
    assert (strategy is Report, "auto" if strategy is Report else "required") == form[0]


# --- what the engine is told of an agent's prompts ---


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("response_format", ["content", "content_and_artifact"])
async def test_agent_with_a_retriever_tool(llm, retriever, how, response_format):
    """Documents come by event or artifact; question and query are the planner's to read in the history."""
    search = create_retriever_tool(
        retriever, "search", "Search: who wrote what?", response_format=response_format
    )
    await call(create_agent(llm, [search]), how, asked(ABOUT_ADA))
    decision, answer = llm._rasd.calls
    assert decision.hints is None
    found = [d.page_content for d in retriever.invoke(ABOUT_ADA)]
    assert texts(answer.hints) == found
    assert [None, None] == [answer.hints.question, answer.hints.search_query]
    expected = "artifact" if response_format == "content_and_artifact" else "retriever"
    assert expected == answer.hints.chunk_source
    assert ("tool", "search") == (answer.prompt[-1]["role"], answer.prompt[-1]["name"])


def test_a_loop_by_hand_around_a_retriever(llm, retriever):
    """Separate runs, as those of an asynchronous agent on Python 3.10 are, make the same hints."""
    found = retriever.invoke(ABOUT_ADA)
    search = {"name": "search", "args": {"query": ABOUT_ADA}, "id": "1"}
    history = [
        HumanMessage(ABOUT_ADA),
        AIMessage("", tool_calls=[search]),
        ToolMessage(joined(found), name="search", tool_call_id="1"),
    ]
    llm.invoke(history)
    (answer,) = llm._rasd.calls
    assert [d.page_content for d in found] == texts(answer.hints)
    assert [None, None] == [answer.hints.question, answer.hints.search_query]


@pytest.mark.parametrize("how", HOWS)
async def test_agent_with_the_tutorials_own_tool(llm, how):
    """A tool that calls `similarity_search` fires no retriever event; its artifact has the Documents."""
    store = memory_store()

    @tool(response_format="content_and_artifact")
    def retrieve_context(query: str):
        """Retrieve facts: who wrote what?"""
        found = store.similarity_search(query, k=2)
        text = "\n\n".join(f"Source: {d.metadata}\nContent: {d.page_content}" for d in found)
        return text, found

    await call(create_agent(llm, [retrieve_context]), how, asked(ABOUT_ADA))
    _, answer = llm._rasd.calls
    found = [d.page_content for d in store.similarity_search(ABOUT_ADA, k=2)]
    assert ("artifact", found) == (answer.hints.chunk_source, texts(answer.hints))


@pytest.mark.parametrize("how", HOWS)
async def test_agent_with_a_dynamic_prompt(llm, how):
    """Middleware that calls `similarity_search` leaves no trace: the planner is left to its own rules."""
    store = memory_store()

    @dynamic_prompt
    def with_context(request):
        found = store.similarity_search(request.state["messages"][-1].text, k=2)
        return "Use this:\n" + joined(found)

    agent = create_agent(llm, [], middleware=[with_context])
    await call(agent, how, asked(ABOUT_ADA))
    (answer,) = llm._rasd.calls
    assert answer.hints is None
    assert ADA in answer.prompt[0]["content"]


async def test_a_second_turn_has_the_documents_of_its_own_search(llm, retriever):
    """An earlier turn's tool results stand in the prompt as well, but were not retrieved for this answer."""
    search = create_retriever_tool(retriever, "search", "Search for a capital.")
    earlier = [
        HumanMessage(ABOUT_ADA),
        AIMessage("", tool_calls=[{"name": "search", "args": {"query": "old"}, "id": "0"}]),
        ToolMessage(ADA, tool_call_id="0"),
        AIMessage("Ada."),
    ]
    create_agent(llm, [search]).invoke({"messages": [*earlier, HumanMessage(ABOUT_PARIS)]})
    _, answer = llm._rasd.calls
    assert PARIS == texts(answer.hints)[0]
