"""How the LLM finds out what its prompts were made of: templates, retrievals, the pipeline's own store."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import (
    NODES,
    QUESTION,
    TEXT,
    WAYS,
    assert_chunks,
    assert_hints_are_exact,
    history,
    make_index,
    shown,
)
from fakes_llama_index import FakeRASD, called, since
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.chat_engine import (
    CondenseQuestionChatEngine,
    ContextChatEngine,
)
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.retrievers import BaseRetriever, QueryFusionRetriever
from llama_index.core.schema import NodeWithScore
from llama_index.core.tools import QueryEngineTool, RetrieverTool, ToolMetadata
from llama_index.core.vector_stores import ExactMatchFilter, MetadataFilters

from rasd_integrations.errors import RetrievalError
from rasd_integrations.llama_index import RASDLLM
from rasd_integrations.llama_index.capture import Filled, PromptCapture
from rasd_integrations.llama_index.trace import Trace

# --- structured calls -----------------------------------------------------------------------------


class Lighthouse(BaseModel):
    """A lighthouse."""

    builder: str


WRITTEN = called("Lighthouse", '{"builder": "Stev', 'enson"}')


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("how", WAYS)
async def test_structured_predict(llm, monkeypatch, how, chat):
    """Programs fill the template themselves; question, context and re-rendering are exact all the same."""
    if "stream" in how and not chat:
        since("0.14.22")
    monkeypatch.setattr(FakeRASD, "has_chat_template", chat)
    llm.system_prompt = "Be brief."
    llm._rasd.answers = (WRITTEN if chat else '{"builder": "Stevenson"}',)
    template = PromptTemplate("Context: {context_str}\nQuery: {query_str}")
    args = {"context_str": "Stevenson built it.", "query_str": QUESTION}
    if how == "sync":
        out = llm.structured_predict(Lighthouse, template, **args)
    elif how == "async":
        out = await llm.astructured_predict(Lighthouse, template, **args)
    elif how == "stream":
        *_, out = llm.stream_structured_predict(Lighthouse, template, **args)
    else:
        stream = await llm.astream_structured_predict(Lighthouse, template, **args)
        *_, out = [o async for o in stream]

    (call,) = llm._rasd.calls
    assert out.builder == "Stevenson"
    assert_hints_are_exact(call, context="Stevenson built it.")
    assert "Be brief." in call.text


def test_structured_query_engine(index, llm):
    """A query engine with an output class goes the same way, and knows its nodes."""
    llm._rasd.answers = (WRITTEN,)
    index.as_query_engine(llm=llm, output_cls=Lighthouse).query(QUESTION)

    (call,) = llm._rasd.calls
    assert_hints_are_exact(call)
    assert_chunks(call)


def test_another_structured_call_is_not_taken_for_this_one(llm):
    """A template counts only if it gives the very prompt that was sent."""
    llm._rasd.answers = (WRITTEN, "plain")
    template = PromptTemplate("Context: {context_str}\nQuery: {query_str}")
    llm.structured_predict(Lighthouse, template, context_str="c", query_str="q")
    llm.complete("Something else.")

    assert llm._rasd.calls[1].hints is None


# --- which retrieval belongs to which call --------------------------------------------------------


async def test_parallel_questions_keep_their_own_retrieval(index, llm):
    """Questions asked at once get their own nodes and their own search query."""
    bread, press = "What does sourdough need?", "Where did the printing press spread?"
    engine = index.as_query_engine(llm=llm, similarity_top_k=1)
    await asyncio.gather(engine.aquery(bread), engine.aquery(press))

    found = {call.hints.search_query: call.hints.chunks[0].id for call in llm._rasd.calls}
    assert {bread: "n2", press: "n3"} == found


def test_plain_python_code(index, llm):
    """Retrieving and prompting by hand still tells the nodes, not another request's question."""
    nodes = index.as_retriever(similarity_top_k=1).retrieve(QUESTION)
    llm.chat([ChatMessage(role="user", content=f"{shown(nodes[0].node)}\n\n{QUESTION}")])

    (call,) = llm._rasd.calls
    assert (None, None) == (call.hints.question, call.hints.search_query)
    assert_chunks(call, (0,))


def test_a_fusion_retriever_tells_its_fused_nodes_and_its_index(index, llm):
    """A retriever over retrievers: the last list counts, the store is the inner one's."""
    fusion = QueryFusionRetriever(
        [index.as_retriever(), index.as_retriever()], llm=llm, num_queries=1, use_async=False
    )
    ContextChatEngine.from_defaults(retriever=fusion, llm=llm, memory=history()).chat(QUESTION)

    (call,) = llm._rasd.calls
    assert {"n0", "n1"} == {chunk.id for chunk in call.hints.chunks}
    assert [index] == llm._rasd.attached


def test_a_custom_retriever_tells_its_nodes(llm):
    """Any retriever counts; without an index there is no store to find."""

    class Mine(BaseRetriever):
        def _retrieve(self, query_bundle):
            return [NodeWithScore(node=NODES[0], score=1.0)]

    ContextChatEngine.from_defaults(retriever=Mine(), llm=llm, memory=history()).chat(QUESTION)

    (call,) = llm._rasd.calls
    assert_chunks(call, (0,))
    assert [] == llm._rasd.attached


def test_the_retrievers_filter_is_told(index, llm):
    """A metadata filter of the pipeline reaches the hints, so that a second search keeps to it."""
    filters = MetadataFilters(filters=[ExactMatchFilter(key="file_name", value="f0.txt")])
    index.as_query_engine(llm=llm, filters=filters).query(QUESTION)

    (call,) = llm._rasd.calls
    assert call.hints.filter is filters


def test_a_fault_of_the_observer_fails_no_answer(index, llm, monkeypatch, caplog):
    """LlamaIndex swallows what its handlers raise; here it is logged and the answer given."""

    def fail(*_):
        msg = "no node"
        raise RuntimeError(msg)

    monkeypatch.setattr("rasd_integrations.llama_index.trace.node_chunk", fail)
    answer = str(index.as_query_engine(llm=llm).query(QUESTION))

    assert answer == TEXT
    assert llm._rasd.calls[0].hints.chunks == ()
    assert ["no node"] == [str(record.exc_info[1]) for record in caplog.records]


def test_nothing_is_noted_without_an_llm():
    """The observer of a process without our LLMs holds nothing."""
    trace = Trace()
    trace.enter("span", None, None)
    trace.handle(RetrievalEndEvent(str_or_query_bundle="q", nodes=[NodeWithScore(node=NODES[0])]))

    assert trace.retrieval_for(shown(NODES[0])) is None
    assert {} == trace._spans


def test_the_notes_are_bounded():
    """However many prompts are filled, only the last ones are kept."""
    capture = PromptCapture()
    filled = Filled(PromptTemplate("{query_str}"), {}, "text")
    for number in range(100):
        capture.record(str(number), filled)

    assert (None, filled) == (capture.lookup("0"), capture.lookup("99"))


# --- explicit -------------------------------------------------------------------------------------


def test_what_the_caller_says_wins(index, llm):
    """``rasd={...}`` goes over what was seen; what it leaves out is kept."""
    nodes = index.as_retriever(similarity_top_k=1).retrieve(QUESTION)
    llm.complete(
        shown(nodes[0].node),
        rasd={"question": "Who?", "search_query": "builder", "chunks": ["a", NODES[1], nodes[0]]},
    )

    (call,) = llm._rasd.calls
    hints = call.hints
    assert ("Who?", "explicit", "builder") == (
        hints.question,
        hints.question_source,
        hints.search_query,
    )
    assert ["a", shown(NODES[1]), shown(NODES[0])] == [chunk.text for chunk in hints.chunks]
    assert hints.chunk_source == "explicit"


def test_explicit_hints_stand_alone(llm):
    """They need no pipeline."""
    llm.complete("Who?", rasd={"question": "Who?", "chunks": "one", "filter": {"tenant": 1}})

    (call,) = llm._rasd.calls
    assert ("Who?", {"tenant": 1}) == (call.hints.question, call.hints.filter)
    assert ["one"] == [chunk.text for chunk in call.hints.chunks]


# --- the pipeline's own store ---------------------------------------------------------------------


def test_the_retrievers_index_is_found(any_index, llm):
    """Without a store, the index that the pipeline reads becomes the store, once."""
    engine = any_index.as_query_engine(llm=llm)
    engine.query(QUESTION)
    engine.query("And sourdough?")

    assert [any_index] == llm._rasd.attached


def test_a_given_store_is_kept(index, llm, monkeypatch):
    """A store that the user named is not replaced by the pipeline's."""
    given = RASDLLM("m", store=["text"])
    index.as_query_engine(llm=given).query(QUESTION)
    attached = llm.attach(["other"])
    index.as_query_engine(llm=llm).query(QUESTION)

    assert attached is llm
    assert ([], [["other"]]) == (given._rasd.attached, llm._rasd.attached)


def test_an_index_that_cannot_be_searched_fails_no_answer(index, llm, monkeypatch, caplog):
    """The finding is logged once and the answer given."""

    def refuse(_store):
        msg = "no such store"
        raise RetrievalError(msg)

    monkeypatch.setattr(llm._rasd, "attach", refuse)
    engine = index.as_query_engine(llm=llm)
    with caplog.at_level(logging.WARNING):
        answers = [str(engine.query(QUESTION)), str(engine.query("And sourdough?"))]

    assert [TEXT, TEXT] == answers
    assert ["no such store"] == [r.args[0].args[0] for r in caplog.records]


def test_the_observer_keeps_no_index_alive(tmp_path, llm):
    """Retrievers and indexes that the user lets go are gone."""
    index = make_index("memory", tmp_path)
    llm._store_given = True
    index.as_query_engine(llm=llm).query(QUESTION)
    reference = weakref.ref(index)
    del index
    gc.collect()

    assert reference() is None


def test_attach_looks_inside(index, llm):
    """Query engines, chat engines and tools give their retriever; stores and retrievers stand for themselves."""
    retriever = index.as_retriever()
    engine = index.as_query_engine(llm=llm)
    fusion = QueryFusionRetriever([retriever], llm=llm, num_queries=1)
    tool = ToolMetadata(name="look", description="Looks things up.")
    for pipeline in (
        index,
        retriever,
        fusion,
        engine,
        ContextChatEngine.from_defaults(retriever=retriever, llm=llm, memory=history()),
        CondenseQuestionChatEngine.from_defaults(query_engine=engine, llm=llm, memory=history()),
        RetrieverTool(retriever, metadata=tool),
        QueryEngineTool(engine, metadata=tool),
    ):
        llm.attach(pipeline)

    inside = engine.retriever
    expected = [index, retriever, fusion, inside, retriever, inside, retriever, inside]
    assert expected == llm._rasd.attached
