"""Quotes in LangChain: in the metadata of every kind of call, and as citations of content blocks."""

from __future__ import annotations

import json
from functools import reduce

import pytest
from cases_langchain import (
    ABOUT_ADA,
    ADA,
    BREAD,
    HOWS,
    PROMPT,
    documents,
    joined,
    memory_store,
)
from fakes_langchain import Answer
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, load
from langchain_core.messages import (
    AIMessage,
    HumanMessage,
    ToolMessage,
    message_to_dict,
    messages_from_dict,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnablePassthrough
from scripted import scripted_model

from rasd_integrations.langchain import RASDLLM, ChatRASD
from rasd_integrations.stats import Quote

SAID = f"Well: {ADA} And that was in London."
END = 6 + len(ADA) - 1
pytestmark = pytest.mark.filterwarnings(
    "ignore::langchain_core._api.beta_decorator.LangChainBetaWarning"
)


def chain_of(kind, **options):
    """Return the usual chain over three stored facts, and its store."""
    store = memory_store()
    llm = kind.from_model(
        *scripted_model(lambda prompt: SAID), max_tokens=300, **{"store": store, **options}
    )
    prompt = PROMPT if kind is ChatRASD else PromptTemplate.from_template("{context}\n\n{question}")
    retriever = store.as_retriever(search_kwargs={"k": 3})
    return {"context": retriever | joined, "question": RunnablePassthrough()} | prompt | llm, store


async def awhole(stream):
    return reduce(lambda a, b: a + b, [chunk async for chunk in stream])


async def answers(chain, how, *inputs):
    """Return the answer to each input, called in the way that ``how`` names."""
    match how:
        case "invoke":
            return [chain.invoke(value) for value in inputs]
        case "stream":
            return [reduce(lambda a, b: a + b, chain.stream(value)) for value in inputs]
        case "ainvoke":
            return [await chain.ainvoke(value) for value in inputs]
        case "astream":
            return [await awhole(chain.astream(value)) for value in inputs]
        case "batch":
            return chain.batch(list(inputs))
    return await chain.abatch(list(inputs))


@pytest.mark.parametrize("drafter", ["auto", None])
@pytest.mark.parametrize("how", HOWS)
async def test_a_chain_says_whom_its_answer_quotes(how, drafter):
    """Unchanged chain, every way to call it: span, chunk and source in metadata and content blocks."""
    chain, store = chain_of(ChatRASD, drafter=drafter)
    (document,) = [d for d in store.similarity_search(ABOUT_ADA) if d.page_content == ADA]
    for message in await answers(chain, how, ABOUT_ADA, ABOUT_ADA + " "):
        (quote,) = message.response_metadata["rasd"]["quotes"]
        assert quote == {
            "start": 6, "end": END, "text": ADA[:-1], "chunk_id": document.id, "chunk_start": 0,
            "metadata": {"source": "0.txt"},
        }  # fmt: skip
        assert message.content == message.text == SAID
        (block,) = message.content_blocks
        (found,) = block["annotations"]
        assert (block["type"], block["text"]) == ("text", SAID)
        assert SAID[found["start_index"] : found["end_index"]] == found["cited_text"] == ADA[:-1]
        assert (found["type"], found["title"]) == ("citation", "0.txt")
        assert found["extras"]["chunk_id"] == document.id


@pytest.mark.parametrize("how", HOWS)
async def test_a_text_parser_behind_the_model_sees_the_text(how):
    """The content stays a text for all who read it as one."""
    chain, _ = chain_of(ChatRASD)
    for text in await answers(chain | StrOutputParser(), how, ABOUT_ADA):
        assert text == SAID


def test_documents_that_python_wrote_into_the_prompt_are_quoted():
    """Without a format step the prompt has their repr; positions are those of the stored text."""
    store, said = memory_store(), f"So: {BREAD}"
    llm = ChatRASD.from_model(*scripted_model(lambda prompt: said), max_tokens=300)
    retriever = store.as_retriever(search_kwargs={"k": 2})
    chain = {"context": retriever, "question": RunnablePassthrough()} | PROMPT | llm
    message = chain.invoke("How long does bread bake?")
    (quote,) = message.response_metadata["rasd"]["quotes"]
    assert (quote["text"], quote["chunk_start"]) == (BREAD[:-1], 0)
    assert "\n" in quote["text"]


def test_what_an_agents_tool_found_is_quoted():
    """A tool's artifact are the documents; its message is what the model reads."""
    llm = ChatRASD.from_model(*scripted_model(lambda prompt: SAID), max_tokens=300)
    call = {"name": "search", "args": {"query": "Ada"}, "id": "c1", "type": "tool_call"}
    found = ToolMessage(ADA, tool_call_id="c1", artifact=documents()[:1])
    message = llm.invoke([HumanMessage(ABOUT_ADA), AIMessage("", tool_calls=[call]), found])
    (quote,) = message.response_metadata["rasd"]["quotes"]
    assert (quote["text"], quote["metadata"]) == (ADA[:-1], {"source": "0.txt"})


def test_a_completion_carries_its_quotes():
    """In ``generation_info``, where a completion model keeps its metadata."""
    chain, _ = chain_of(RASDLLM)

    class Ends(BaseCallbackHandler):
        def on_llm_end(self, response, **kwargs):
            self.info = response.generations[0][0].generation_info

    ends = Ends()
    assert chain.invoke(ABOUT_ADA, {"callbacks": [ends]}) == SAID
    assert [q["text"] for q in ends.info["rasd"]["quotes"]] == [ADA[:-1]]


def test_citations_survive_a_message_as_json():
    """Kept conversations are read back with them, by both of LangChain's ways."""
    message = chain_of(ChatRASD)[0].invoke(ABOUT_ADA)
    blocks = message.content_blocks
    (back,) = messages_from_dict(json.loads(json.dumps([message_to_dict(message)])))
    assert back.content_blocks == blocks
    assert blocks[0]["annotations"]
    loaded = load(json.loads(json.dumps(dumpd(message))), allowed_objects="messages")
    assert loaded.content_blocks == blocks


def test_a_changed_text_is_not_cited():
    """What is no longer in the message at its place is not shown as a quote."""
    message = chain_of(ChatRASD)[0].invoke(ABOUT_ADA)
    changed = message.model_copy(update={"content": f"So. {SAID}"})
    assert changed.content_blocks == [{"type": "text", "text": f"So. {SAID}", "annotations": []}]


def test_an_address_is_told_as_one():
    """A source that is an address is the citation's, and a title its title."""
    document = documents()[0]
    document.metadata = {"source": "https://example.org/ada", "title": "Ada", "when": object()}
    llm = ChatRASD.from_model(*scripted_model(lambda prompt: SAID), max_tokens=300)
    message = llm.invoke(f"{ADA}\n\n{ABOUT_ADA}", rasd={"chunks": [document]})
    (found,) = message.content_blocks[0]["annotations"]
    assert (found["url"], found["title"]) == ("https://example.org/ada", "Ada")
    assert "when" not in found["extras"]["metadata"]


# --- shapes of an answer, from an engine that says what it is told ---

TEXT = "First it says one two three four five, then it calls."
SPANS = (Quote(14, 37, "one two three four five", "c1", 4, {"source": "a.md"}),)


@pytest.fixture
def saying(monkeypatch, fake_engine):
    """Return a function that makes a model that says an answer with quotes."""

    def make(answer, **options):
        llm = ChatRASD(model="org/one", **options)

        def said(prompt):
            return answer

        llm._rasd.answer = said
        inner = llm._rasd._pieces

        def pieces(call):
            for piece in inner(call):
                if piece.stats is not None:
                    piece.stats.quotes = SPANS
                yield piece

        monkeypatch.setattr(llm._rasd, "_pieces", pieces)
        return llm

    return make


ANSWERS = {
    "text": Answer(TEXT),
    "thoughts": Answer(TEXT, "Let me think."),
    "calls": Answer(TEXT, calls=[("f", '{"a": 1}'), ("g", "{}")]),
    "all": Answer(TEXT, "Let me think.", [("f", '{"a": 1}')]),
}


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize("how", ["invoke", "stream"])
@pytest.mark.parametrize("shape", ANSWERS)
def test_citations_are_of_the_text_between_thoughts_and_calls(saying, shape, how, version):
    """In both of LangChain's forms of content, whole and joined, they are in the one block of text."""
    llm = saying(ANSWERS[shape], output_version=version)
    message = llm.invoke("Hi") if how == "invoke" else reduce(lambda a, b: a + b, llm.stream("Hi"))
    assert message.text == TEXT
    assert isinstance(message.content, str if version is None else list)
    blocks = message.content_blocks
    (block,) = [b for b in blocks if b["type"] == "text"]
    assert block["text"] == TEXT
    (found,) = block["annotations"]
    assert TEXT[found["start_index"] : found["end_index"]] == found["cited_text"]
    others = [b["type"] for b in blocks if b is not block]
    thoughts, calls = ANSWERS[shape].reasoning, ANSWERS[shape].calls
    assert others == ["reasoning"] * bool(thoughts) + ["tool_call"] * len(calls)


@pytest.mark.parametrize("version", [None, "v1"])
async def test_events_of_a_stream_end_with_the_citations(saying, version):
    """LangChain's typed events finish the block of text with them."""
    stream = saying(ANSWERS["thoughts"], output_version=version).stream_events("Hi", version="v3")
    events = [event for event in stream if event["event"] == "content-block-finish"]
    texts = [e["content"] for e in events if e["content"]["type"] == "text"]
    assert [(t["text"], len(t["annotations"])) for t in texts] == [(TEXT, 1)]


def test_a_message_with_quotes_is_read_back_as_a_turn(saying):
    """Blocks with annotations in a conversation are the text that they hold."""
    llm = saying(ANSWERS["text"], output_version="v1")
    first = llm.invoke("Hi")
    llm.invoke([("human", "Hi"), first, ("human", "Go on")])
    assert llm._rasd.calls[-1].prompt[1]["content"] == TEXT


def test_a_message_of_an_earlier_version_has_blocks_as_before():
    """Without quotes the blocks are what LangChain derives."""
    for metadata in ({}, {"rasd": {}}, {"rasd": {"quotes": []}}):
        message = AIMessage("Hi", response_metadata={"model_provider": "rasd", **metadata})
        assert message.content_blocks == AIMessage("Hi").content_blocks
