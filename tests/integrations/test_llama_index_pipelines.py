"""What LlamaIndex's own pipelines hand to the LLM, and what the LLM makes of it for the engine.

Each row of LlamaIndex in ``research/ecosystem.md`` 3.1, through real engines over real stores.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref

import pytest

pytest.importorskip("llama_index.core")

from fakes_llama_index import ANSWER, FakeRASD, WordEmbedding
from llama_index.core import PromptTemplate, StorageContext, VectorStoreIndex
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
)
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.retrievers import BaseRetriever, QueryFusionRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.core.tools import QueryEngineTool, RetrieverTool, ToolMetadata
from llama_index.core.vector_stores import ExactMatchFilter, MetadataFilters

from rasd_integrations.errors import RetrievalError
from rasd_integrations.llama_index import RASDLLM
from rasd_integrations.llama_index.capture import Capture, Filled
from rasd_integrations.llama_index.trace import Trace

TEXT = "".join(ANSWER)
QUESTION = "Who built the lighthouse at Cape Wrath?"
FOLLOW_UP = "And when?"
CONDENSED = TEXT  # the scripted engine answers every call so, the condensing one too
HISTORY = [
    ChatMessage(role="user", content="Tell me of the {lighthouse} at Cape Wrath."),
    ChatMessage(role="assistant", content="It was built by Robert Stevenson."),
]
NODES = [
    TextNode(
        id_=f"n{number}",
        text=text,
        metadata={"file_name": f"f{number}.txt"},
        excluded_llm_metadata_keys=[],
    )
    for number, text in enumerate(
        [
            "The lighthouse at Cape Wrath was built by Robert Stevenson.\nIt was lit in 1828.",
            'The lighthouse at Cape Wrath had a keeper, "Old Tom"; he didn\'t like the cold wind of the north.',
            "Sourdough needs flour, water, salt and patience.",
            "The printing press spread through Europe in fifty years.",
        ]
    )
]


def make_index(store: str, tmp_path) -> VectorStoreIndex:
    """Return the nodes in one of the stores."""
    context = StorageContext.from_defaults()
    if store == "chroma":
        chromadb = pytest.importorskip("chromadb")
        module = pytest.importorskip("llama_index.vector_stores.chroma")
        client = chromadb.PersistentClient(path=str(tmp_path / "chroma"))
        collection = client.create_collection("texts", metadata={"hnsw:space": "cosine"})
        context = StorageContext.from_defaults(
            vector_store=module.ChromaVectorStore(chroma_collection=collection)
        )
    elif store == "faiss":
        faiss = pytest.importorskip("faiss")
        module = pytest.importorskip("llama_index.vector_stores.faiss")
        context = StorageContext.from_defaults(
            vector_store=module.FaissVectorStore(faiss_index=faiss.IndexFlatL2(512))
        )
    return VectorStoreIndex(NODES, storage_context=context, embed_model=WordEmbedding())


@pytest.fixture(params=["memory", "chroma", "faiss"])
def any_index(request, tmp_path):
    """Return the nodes in each of the stores."""
    return make_index(request.param, tmp_path)


@pytest.fixture
def index(tmp_path):
    """Return the nodes in LlamaIndex's own store."""
    return make_index("memory", tmp_path)


@pytest.fixture
def llm(monkeypatch):
    """Return an LLM over the recording engine."""
    monkeypatch.setattr("rasd_integrations.llama_index.base.RASD", FakeRASD)
    return RASDLLM("some/model", max_tokens=32)


def history(*messages: ChatMessage) -> ChatMemoryBuffer:
    """Return a memory without the database that the default one leaves open."""
    return ChatMemoryBuffer.from_defaults(list(messages or HISTORY), token_limit=4000)


def shown(node: TextNode) -> str:
    """Return a node's text as prompts show it."""
    return node.get_content(metadata_mode=MetadataMode.LLM)


def flat(prompt) -> str:
    """Return all text of a prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def assert_hints_are_exact(call, *, question=QUESTION, context=None):
    """The hints name the question and the context, and fill the same template with another one."""
    hints = call.hints
    assert (question, "template") == (hints.question, hints.question_source)
    assert context is None or context == hints.context
    assert hints.context in call.text
    assert call.prompt == hints.rerender(hints.context)
    assert call.text.replace(hints.context, "SHORT") == flat(hints.rerender("SHORT"))


def assert_chunks(call, numbers=(0, 1)):
    """The chunks are the retriever's nodes, best first, as prompts show them."""
    expected = [(f"n{n}", rank, shown(NODES[n])) for rank, n in enumerate(numbers)]
    assert expected == [(c.id, c.rank, c.text) for c in call.hints.chunks]
    assert call.hints.chunk_source == "retriever"
    assert call.hints.chunks[0].metadata["file_name"] == f"f{numbers[0]}.txt"


async def ask(engine, question, how):
    """Ask a query engine in one of four ways and return the text of the answer."""
    if how == "sync":
        return str(engine.query(question))
    if how == "async":
        return str(await engine.aquery(question))
    if how == "stream":
        return "".join(engine.query(question).response_gen)
    response = await engine.aquery(question)
    return "".join([delta async for delta in response.async_response_gen()])


METHODS = {"sync": "generate", "async": "agenerate", "stream": "stream", "astream": "astream"}
WAYS = list(METHODS)


# --- query engines --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("mode", ["compact", "tree_summarize"])
async def test_packed_answers(any_index, llm, mode, how):
    """One call reads all nodes: question, context, re-rendering and nodes are exact, in every store."""
    engine = any_index.as_query_engine(llm=llm, response_mode=mode, streaming="stream" in how)
    answer = await ask(engine, QUESTION, how)

    (call,) = llm._rasd.calls
    assert (TEXT, METHODS[how]) == (answer, call.method)
    assert_hints_are_exact(call, context=f"{shown(NODES[0])}\n\n{shown(NODES[1])}")
    assert_chunks(call)
    # A synthesizer that streams calls the LLM after the query has returned: then only the question is known.
    assert QUESTION == (call.hints.search_query or call.hints.question)


@pytest.mark.parametrize("how", WAYS)
async def test_refine(index, llm, how):
    """The first call reads a node as context, the next reads one beside the answer so far."""
    engine = index.as_query_engine(llm=llm, response_mode="refine", streaming="stream" in how)
    await ask(engine, QUESTION, how)

    first, second = llm._rasd.calls
    assert_hints_are_exact(first, context=shown(NODES[0]))
    assert_hints_are_exact(second, context=shown(NODES[1]))
    assert_chunks(first)
    assert_chunks(second)
    assert TEXT in flat(second.hints.rerender("SHORT"))


@pytest.mark.parametrize("how", WAYS)
async def test_simple_summarize(index, llm, how):
    """The context is shown as an escaped list; it is named as it stands there."""
    engine = index.as_query_engine(
        llm=llm, response_mode="simple_summarize", streaming="stream" in how
    )
    await ask(engine, QUESTION, how)

    (call,) = llm._rasd.calls
    assert_hints_are_exact(call, context=str([f"{shown(NODES[0])}\n{shown(NODES[1])}"]))
    assert_chunks(call)


@pytest.mark.parametrize("mode", ["accumulate", "compact_accumulate"])
@pytest.mark.parametrize("how", ["sync", "async"])
async def test_accumulate(index, llm, mode, how):
    """Each call names its own part of the context."""
    engine = index.as_query_engine(llm=llm, response_mode=mode)
    await ask(engine, QUESTION, how)

    both = f"{shown(NODES[0])}\n\n{shown(NODES[1])}"
    contexts = [shown(NODES[0]), shown(NODES[1])] if mode == "accumulate" else [both]
    assert contexts == [call.hints.context for call in llm._rasd.calls]
    for call in llm._rasd.calls:
        assert_hints_are_exact(call)
        assert_chunks(call)


async def test_a_tree_names_its_summaries_as_context(index, llm):
    """The call over summaries has them as context; the retrieved nodes are told all the same."""
    llm._rasd.window, llm.max_tokens = 400, 210
    engine = index.as_query_engine(llm=llm, response_mode="tree_summarize", similarity_top_k=4)
    await engine.aquery(QUESTION)

    *leaves, top = llm._rasd.calls
    assert len(leaves) >= 2
    assert_hints_are_exact(top, context="\n\n".join([TEXT] * len(leaves)))
    assert_chunks(top, (0, 1, 3, 2))


@pytest.mark.parametrize("how", WAYS)
async def test_a_base_model_fills_completion_prompts(index, llm, monkeypatch, how):
    """Without a chat template the same is known of the completion prompt."""
    monkeypatch.setattr(FakeRASD, "has_chat_template", False)
    engine = index.as_query_engine(llm=llm, streaming="stream" in how)
    await ask(engine, QUESTION, how)

    (call,) = llm._rasd.calls
    assert isinstance(call.prompt, str)
    assert_hints_are_exact(call, context=f"{shown(NODES[0])}\n\n{shown(NODES[1])}")
    assert_chunks(call)


def test_a_hand_written_prompt_is_rerendered_by_hand(index, llm):
    """``messages_to_prompt`` makes the short prompt too."""
    llm.messages_to_prompt = lambda messages: f"<{'|'.join(m.content for m in messages)}>"
    index.as_query_engine(llm=llm).query(QUESTION)

    (call,) = llm._rasd.calls
    assert call.prompt.startswith("<")
    assert_hints_are_exact(call)


def test_the_system_prompt_stands_in_both_prompts(index, llm):
    """A system prompt of the LLM is part of the long prompt and of the short one, once."""
    llm.system_prompt = "Answer in French."
    index.as_query_engine(llm=llm).query(QUESTION)

    (call,) = llm._rasd.calls
    assert_hints_are_exact(call)
    assert flat(call.hints.rerender("SHORT")).count("Answer in French.") == 1


def test_a_users_own_template(index, llm):
    """Other variable names: mapped ones as the framework maps them, free ones by what they hold."""
    template = PromptTemplate(
        "Read {docs} and answer {what}",
        template_var_mappings={"context_str": "docs", "query_str": "what"},
    )
    index.as_query_engine(llm=llm, text_qa_template=template).query(QUESTION)
    nodes = index.as_retriever().retrieve(QUESTION)
    docs = " // ".join(shown(n.node) for n in nodes)
    llm.predict(PromptTemplate("{rules}: {docs}? {question}"), rules="r", docs=docs, question="Q?")

    mapped, free = llm._rasd.calls
    assert_hints_are_exact(mapped)
    assert_hints_are_exact(free, question="Q?", context=docs)


def test_a_template_without_context_tells_the_question_only(llm):
    """Nothing is invented where nothing was retrieved."""
    llm.predict(PromptTemplate("Say more of {query_str}"), query_str="bread")

    (call,) = llm._rasd.calls
    assert ("bread", (), None, None) == (
        call.hints.question,
        call.hints.chunks,
        call.hints.context,
        call.hints.rerender,
    )


def test_a_plain_call_has_no_hints(llm):
    """A call outside any pipeline leaves everything to the engine."""
    llm.complete("Say something that no retriever ever returned.")

    (call,) = llm._rasd.calls
    assert call.hints is None


# --- chat engines ---------------------------------------------------------------------------------


async def talk(engine, message, how):
    """Say something to a chat engine in one of four ways and return the answer."""
    if how == "sync":
        return str(engine.chat(message))
    if how == "async":
        return str(await engine.achat(message))
    if how == "stream":
        return "".join(engine.stream_chat(message).response_gen)
    response = await engine.astream_chat(message)
    return "".join([delta async for delta in response.async_response_gen()])


@pytest.mark.parametrize("how", WAYS)
async def test_context_chat_engine(any_index, llm, how):
    """The context stands in the system message, the history between, the question last."""
    engine = ContextChatEngine.from_defaults(
        retriever=any_index.as_retriever(), llm=llm, memory=history()
    )
    answer = await talk(engine, QUESTION, how)

    (call,) = llm._rasd.calls
    assert (TEXT, METHODS[how]) == (answer, call.method)
    assert ["system", "user", "assistant", "user"] == [m["role"] for m in call.prompt]
    assert_hints_are_exact(call, context=f"{shown(NODES[0])}\n\n{shown(NODES[1])}")
    assert_chunks(call)


@pytest.mark.parametrize("how", WAYS)
async def test_condense_plus_context_chat_engine(index, llm, how):
    """Asked is the raw follow-up, searched is the condensed question; the condensing call has no context."""
    engine = CondensePlusContextChatEngine.from_defaults(
        retriever=index.as_retriever(), llm=llm, memory=history()
    )
    await talk(engine, FOLLOW_UP, how)

    condense, answer = llm._rasd.calls
    assert condense.hints is None
    assert_hints_are_exact(answer, question=FOLLOW_UP)
    assert answer.hints.search_query == CONDENSED
    assert {"n0", "n1"} >= {chunk.id for chunk in answer.hints.chunks[:1]}


@pytest.mark.parametrize("how", WAYS)
async def test_condense_question_chat_engine(index, llm, how):
    """The condensing call tells its question; the answer is asked for with the condensed one."""
    engine = CondenseQuestionChatEngine.from_defaults(
        query_engine=index.as_query_engine(llm=llm, streaming="stream" in how),
        llm=llm,
        memory=history(),
    )
    await talk(engine, FOLLOW_UP, how)

    condense, answer = llm._rasd.calls
    assert (FOLLOW_UP, None) == (condense.hints.question, condense.hints.context)
    assert_hints_are_exact(answer, question=CONDENSED)
    assert answer.hints.search_query == CONDENSED


# --- agents and tools -----------------------------------------------------------------------------


# LlamaIndex's agents use what pydantic and its own workflows have deprecated.
IGNORE_AGENTS = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Scripted(FakeRASD):
    """An engine that answers with the next of its lines."""

    lines: tuple[str, ...] = ()

    def _chunks(self, prompt):
        *_, last = super()._chunks(prompt)
        yield last.__class__(text=self.lines[len(self.calls) - 1])
        yield last


@IGNORE_AGENTS
async def test_react_agent_with_a_retriever_tool(index, llm, monkeypatch):
    """The call after the tool knows the nodes, though the tool ran in another task."""
    line = f'Thought: I must look.\nAction: look\nAction Input: {{"input": "{QUESTION}"}}'
    engine = Scripted("m")
    engine.lines = (line, "Thought: I can answer.\nAnswer: Stevenson.")
    llm._rasd = engine
    tool = RetrieverTool(
        index.as_retriever(), metadata=ToolMetadata(name="look", description="Looks things up.")
    )
    result = await ReActAgent(tools=[tool], llm=llm).run(QUESTION, memory=history())

    first, second = engine.calls
    assert "Stevenson" in str(result)
    assert first.hints is None
    assert "Observation: file_name: f0.txt" in second.text
    assert_chunks(second)
    assert second.hints.search_query == QUESTION


@IGNORE_AGENTS
async def test_react_agent_with_a_query_engine_tool(index, llm):
    """The inner call is a packed answer like any other."""
    line = f'Thought: I must look.\nAction: look\nAction Input: {{"input": "{QUESTION}"}}'
    engine = Scripted("m")
    engine.lines = (line, "Stevenson did.", "Thought: I can answer.\nAnswer: Stevenson.")
    llm._rasd = engine
    tool = QueryEngineTool.from_defaults(
        index.as_query_engine(llm=llm), name="look", description="Looks things up."
    )
    await ReActAgent(tools=[tool], llm=llm).run(QUESTION, memory=history())

    _, inner, _ = engine.calls
    assert_hints_are_exact(inner)
    assert_chunks(inner)


# --- structured calls -----------------------------------------------------------------------------


class Lighthouse(BaseModel):
    """A lighthouse."""

    builder: str


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("how", WAYS)
async def test_structured_predict(llm, monkeypatch, how, chat):
    """Programs fill the template themselves; question, context and re-rendering are exact all the same."""
    monkeypatch.setattr(FakeRASD, "has_chat_template", chat)
    engine = Scripted("m")
    engine.lines = ('{"builder": "Stevenson"}',)
    llm._rasd = engine
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

    (call,) = engine.calls
    assert out.builder == "Stevenson"
    assert_hints_are_exact(call, context="Stevenson built it.")


def test_structured_query_engine(index, llm):
    """A query engine with an output class goes the same way, and knows its nodes."""
    engine = Scripted("m")
    engine.lines = ('{"builder": "Stevenson"}',)
    llm._rasd = engine
    index.as_query_engine(llm=llm, output_cls=Lighthouse).query(QUESTION)

    (call,) = engine.calls
    assert_hints_are_exact(call)
    assert_chunks(call)


def test_another_structured_call_is_not_taken_for_this_one(llm):
    """A template counts only if it gives the very prompt that was sent."""
    engine = Scripted("m")
    engine.lines = ('{"builder": "Stevenson"}', "plain")
    llm._rasd = engine
    template = PromptTemplate("Context: {context_str}\nQuery: {query_str}")
    llm.structured_predict(Lighthouse, template, context_str="c", query_str="q")
    llm.complete("Something else.")

    assert engine.calls[1].hints is None


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

    (call,) = llm._rasd.calls
    assert (TEXT, ()) == (answer, call.hints.chunks)
    assert ["no node"] == [str(record.exc_info[1]) for record in caplog.records]


def test_nothing_is_noted_without_an_llm():
    """The observer of a process without our LLMs holds nothing."""
    trace = Trace()
    trace.enter("span", None, None)
    trace.handle(RetrievalEndEvent(str_or_query_bundle="q", nodes=[NodeWithScore(node=NODES[0])]))

    assert trace.retrieval_for(shown(NODES[0])) is None
    assert {} == trace._parents


def test_the_notes_are_bounded():
    """However many prompts are filled, only the last ones are kept."""
    capture = Capture()
    filled = Filled(PromptTemplate("{query_str}"), {}, "text")
    for number in range(100):
        capture.remember(str(number), filled)

    assert (None, filled) == (capture.recall("0"), capture.recall("99"))


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
