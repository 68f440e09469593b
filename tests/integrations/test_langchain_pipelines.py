"""Every shape in which a LangChain pipeline hands its prompt to the model: what the engine is told of it.

One test (or more) for each row of the table of shapes: the hints must name the question, the context as
it stands in the prompt, and the Documents, without any change to the chain.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
from typing import Any

import pytest
from fakes_langchain import RecordingRASD, WordEmbeddings
from langchain.agents import create_agent
from langchain.agents.middleware import dynamic_prompt
from langchain_classic.chains import (
    RetrievalQA,
    create_history_aware_retriever,
    create_retrieval_chain,
)
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.tools import create_retriever_tool, tool
from langchain_core.vectorstores import InMemoryVectorStore
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.langchain import RASDLLM, ChatRASD
from rasd_integrations.langchain.capture import _recent_roots

ADA = "Ada Lovelace wrote the first program in 1843."
BREAD = "Bread needs flour, water and salt.\n\nIt bakes for forty minutes."
PARIS = "Paris is the capital of France."
FACTS = (ADA, BREAD, PARIS, "The moon is far away.", "A triangle has three sides.")
ABOUT_ADA = "Who wrote the first program?"
ABOUT_PARIS = "What is the capital of France?"
HOWS = ("invoke", "stream", "ainvoke", "astream", "batch", "abatch")


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setattr("rasd_integrations.langchain.base.RASD", RecordingRASD)
    _recent_roots.set(())  # what other tests retrieved in this context


@functools.cache
def parts():
    return tiny_llama(max_position_embeddings=16_384), tiny_tokenizer()


def model(kind):
    return kind.from_model(*parts(), max_tokens=2)


@pytest.fixture
def llm():
    return model(ChatRASD)


def documents():
    return [Document(text, metadata={"source": f"{i}.txt"}) for i, text in enumerate(FACTS)]


def memory_store():
    store = InMemoryVectorStore(WordEmbeddings())
    store.add_documents(documents())
    return store


def chroma_store():
    import chromadb
    from langchain_chroma import Chroma

    client = chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False))
    name = f"facts-{uuid.uuid4().hex}"
    store = Chroma(name, WordEmbeddings(), client=client)
    store.add_documents(documents())
    return store


def faiss_store():
    from langchain_community.vectorstores import FAISS

    return FAISS.from_documents(documents(), WordEmbeddings())


STORES = {"memory": memory_store, "chroma": chroma_store, "faiss": faiss_store}


@pytest.fixture(params=STORES)
def store(request):
    return STORES[request.param]()


@pytest.fixture
def retriever():
    return memory_store().as_retriever(search_kwargs={"k": 2})


async def call(chain: Any, how: str, *inputs: Any) -> None:
    """Call ``chain`` with each input in the way that ``how`` names."""
    match how:
        case "invoke":
            for value in inputs:
                chain.invoke(value)
        case "stream":
            for value in inputs:
                list(chain.stream(value))
        case "ainvoke":
            for value in inputs:
                await chain.ainvoke(value)
        case "astream":
            for value in inputs:
                [_ async for _ in chain.astream(value)]
        case "batch":
            chain.batch(list(inputs))
        case "abatch":
            await chain.abatch(list(inputs))


def hints_by_question(llm):
    return {call.hints.question: call.hints for call in llm._rasd.calls}


def texts(hints):
    return [chunk.text for chunk in hints.chunks]


def joined(found):
    return "\n\n".join(document.page_content for document in found)


PROMPT = ChatPromptTemplate.from_template(
    "Answer from the context.\n\n{context}\n\nQuestion: {question}"
)


# --- LCEL ---


@pytest.mark.parametrize("how", HOWS)
async def test_lcel_with_formatted_documents(llm, store, how):
    """The usual chain: question and context by the template's variables, Documents by the retriever."""
    retriever = store.as_retriever(search_kwargs={"k": 2})
    chain = {"context": retriever | joined, "question": RunnablePassthrough()} | PROMPT | llm
    await call(chain, how, ABOUT_ADA, ABOUT_PARIS)
    for question, best in ((ABOUT_ADA, ADA), (ABOUT_PARIS, PARIS)):
        hints = hints_by_question(llm)[question]
        found = retriever.invoke(question)
        assert (best, joined(found)) == (texts(hints)[0], hints.context)
        assert [d.page_content for d in found] == texts(hints)
        assert [d.metadata for d in found] == [dict(c.metadata) for c in hints.chunks]
        assert ("template", "retriever", question) == (
            hints.question_source,
            hints.chunk_source,
            hints.search_query,
        )


@pytest.mark.parametrize("how", HOWS)
async def test_lcel_with_the_bare_retriever(llm, retriever, how):
    """Without a format step the prompt has Python's repr of the Documents: the context is that string."""
    chain = {"context": retriever, "question": RunnablePassthrough()} | PROMPT | llm
    question = "How long does bread bake?"
    await call(chain, how, question, ABOUT_PARIS)
    hints = hints_by_question(llm)[question]
    found = retriever.invoke(question)
    assert str(found) == hints.context
    assert BREAD in texts(hints)
    assert [d.page_content for d in found] == texts(hints)
    assert "template" == hints.chunk_source


@pytest.mark.parametrize("how", HOWS)
async def test_lcel_with_a_plain_text_model(store, how):
    """A completion model gets the prompt as a string; the hints are the same."""
    llm = model(RASDLLM)
    retriever = store.as_retriever(search_kwargs={"k": 1})
    prompt = PromptTemplate.from_template("{context}\nQ: {question}\nA:")
    chain = {"context": retriever | joined, "question": RunnablePassthrough()} | prompt | llm
    await call(chain, how, ABOUT_ADA, ABOUT_PARIS)
    hints = hints_by_question(llm)
    assert {ABOUT_ADA: [ADA], ABOUT_PARIS: [PARIS]} == {q: texts(h) for q, h in hints.items()}
    assert [ADA, PARIS] == [hints[q].context for q in (ABOUT_ADA, ABOUT_PARIS)]


async def test_a_chat_prompt_before_a_plain_text_model(retriever):
    """Chat templates reach a completion model as "Human: ..." text and are recognised in it."""
    llm = model(RASDLLM)
    chain = {"context": retriever | joined, "question": RunnablePassthrough()} | PROMPT | llm
    await call(chain, "invoke", ABOUT_ADA)
    assert llm._rasd.calls[0].prompt.startswith("Human: ")
    assert ABOUT_ADA == llm._rasd.calls[0].hints.question


@pytest.mark.parametrize("how", HOWS)
async def test_messages_changed_after_the_template(llm, retriever, how):
    """A step between template and model changes the messages' hash; the same run's template still counts."""
    trim = RunnableLambda(lambda value: [*value.to_messages(), HumanMessage("Be brief.")])
    chain = {"context": retriever | joined, "question": RunnablePassthrough()} | PROMPT | trim | llm
    await call(chain, how, ABOUT_ADA, ABOUT_PARIS)
    assert {ABOUT_ADA, ABOUT_PARIS} == set(hints_by_question(llm))


@pytest.mark.parametrize("how", HOWS)
async def test_parallel_branches_keep_their_own_questions(llm, how):
    """Two branches of one run ask different questions: each prompt gets its own."""
    store = memory_store()
    retriever = store.as_retriever(search_kwargs={"k": 1})

    def branch(question):
        ask = RunnableLambda(lambda _: question)
        return (
            ask | {"context": retriever | joined, "question": RunnablePassthrough()} | PROMPT | llm
        )

    chain = RunnableParallel(ada=branch(ABOUT_ADA), paris=branch(ABOUT_PARIS))
    await call(chain, how, "go")
    hints = hints_by_question(llm)
    assert {ABOUT_ADA: ADA, ABOUT_PARIS: PARIS} == {q: h.context for q, h in hints.items()}


async def test_a_question_under_another_name(llm):
    """Without a telling name, the shortest variable that is no context is the question."""
    prompt = ChatPromptTemplate.from_template("{wissen}\n\n{frage}")
    chain = prompt | llm
    chain.invoke({"wissen": "w" * 3000, "frage": "Wer war Ada?"})
    hints = llm._rasd.calls[0].hints
    assert ("Wer war Ada?", "w" * 3000) == (hints.question, hints.context)


async def test_a_long_input_is_not_the_question(llm):
    """A document that is called "input" is a context, however it is named."""
    document = "word " * 1000
    (ChatPromptTemplate.from_template("Sum up: {input}") | llm).invoke({"input": document})
    hints = llm._rasd.calls[0].hints
    assert (None, document) == (hints.question, hints.context)


async def test_a_nested_retriever_counts_once(llm, retriever):
    """Of a retriever that asks others, the outermost query and Documents are the pipeline's."""

    class Rewriting(BaseRetriever):
        inner: Any

        def _get_relevant_documents(self, query, *, run_manager):
            config = {"callbacks": run_manager.get_child()}
            return self.inner.invoke("rewritten " + query, config=config)[:1]

    outer = Rewriting(inner=retriever)
    chain = {"context": outer | joined, "question": RunnablePassthrough()} | PROMPT | llm
    chain.invoke(ABOUT_ADA)
    hints = llm._rasd.calls[0].hints
    assert (ABOUT_ADA, 1) == (hints.search_query, len(hints.chunks))


async def test_a_failing_retriever_leaves_nothing_behind(llm):
    """A fallback after a failed retriever still finds its own Documents."""

    class Broken(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            msg = "store is down"
            raise OSError(msg)

    retriever = Broken().with_fallbacks([memory_store().as_retriever(search_kwargs={"k": 1})])
    chain = {"context": retriever | joined, "question": RunnablePassthrough()} | PROMPT | llm
    chain.invoke(ABOUT_ADA)
    assert [ADA] == texts(llm._rasd.calls[0].hints)


# --- the classic chains ---


@pytest.mark.parametrize("how", HOWS)
async def test_create_retrieval_chain(llm, store, how):
    """The context stands in the system message, the question is the human one."""
    prompt = ChatPromptTemplate([("system", "Use this:\n\n{context}"), ("human", "{input}")])
    retriever = store.as_retriever(search_kwargs={"k": 2})
    chain = create_retrieval_chain(retriever, create_stuff_documents_chain(llm, prompt))
    await call(chain, how, {"input": ABOUT_ADA}, {"input": ABOUT_PARIS})
    for question in (ABOUT_ADA, ABOUT_PARIS):
        hints = hints_by_question(llm)[question]
        found = retriever.invoke(question)
        assert (joined(found), [d.page_content for d in found]) == (hints.context, texts(hints))


@pytest.mark.parametrize("how", HOWS)
async def test_history_aware_retriever(llm, retriever, how):
    """Two queries are kept: the raw follow-up that was asked, and the condensed one that was searched."""
    llm._rasd.answer = lambda prompt: (
        "Paris capital France" if "standalone" in prompt[0]["content"] else "Yes."
    )
    history = MessagesPlaceholder("chat_history")
    condense = ChatPromptTemplate(
        [("system", "Make it standalone."), history, ("human", "{input}")]
    )
    answer = ChatPromptTemplate([("system", "Use:\n{context}"), history, ("human", "{input}")])
    chain = create_retrieval_chain(
        create_history_aware_retriever(llm, retriever, condense),
        create_stuff_documents_chain(llm, answer),
    )
    past = [HumanMessage("Tell me of France."), AIMessage("With pleasure.")]
    await call(chain, how, {"input": "and its capital?", "chat_history": past})
    first, second = (c.hints for c in llm._rasd.calls)
    assert ("and its capital?", (), None) == (first.question, first.chunks, first.context)
    assert ("and its capital?", "Paris capital France", PARIS) == (
        second.question,
        second.search_query,
        texts(second)[0],
    )


def legacy(test):
    """Let a test use chains that LangChain has deprecated, as many pipelines still do."""
    for warning in (
        "ignore::langchain_core._api.deprecation.LangChainDeprecationWarning",
        "ignore:The a?apply_and_parse method is deprecated:UserWarning",
    ):
        test = pytest.mark.filterwarnings(warning)(test)
    return test


LEGACY_HOWS = ("invoke", "ainvoke", "batch", "abatch")


def retrieval_qa(llm, retriever, kind, **options):
    return RetrievalQA.from_chain_type(
        llm=llm, retriever=retriever, chain_type=kind, chain_type_kwargs=options or None
    )


@legacy
@pytest.mark.parametrize("how", LEGACY_HOWS)
async def test_retrieval_qa_stuff(llm, retriever, how):
    """No prompt run here: question and context come from the inputs of the enclosing LLMChain."""
    await call(
        retrieval_qa(llm, retriever, "stuff"), how, {"query": ABOUT_ADA}, {"query": ABOUT_PARIS}
    )
    for question in (ABOUT_ADA, ABOUT_PARIS):
        hints = hints_by_question(llm)[question]
        found = retriever.invoke(question)
        assert (joined(found), [d.page_content for d in found]) == (hints.context, texts(hints))


@legacy
@pytest.mark.parametrize("how", LEGACY_HOWS)
async def test_retrieval_qa_refine(llm, retriever, how):
    """Each step has one chunk as its context, and the question though it stands before the answer."""
    await call(retrieval_qa(llm, retriever, "refine"), how, {"query": ABOUT_ADA})
    found = [d.page_content for d in retriever.invoke(ABOUT_ADA)]
    assert [(ABOUT_ADA, text) for text in found] == [
        (c.hints.question, c.hints.context) for c in llm._rasd.calls
    ]


@legacy
@pytest.mark.parametrize("how", LEGACY_HOWS)
async def test_retrieval_qa_map_reduce(llm, retriever, how):
    """Each map step has its own chunk of the list; the summaries of the reduce step are no chunks."""
    llm._rasd.answer = lambda prompt: "A summary."
    await call(retrieval_qa(llm, retriever, "map_reduce"), how, {"query": ABOUT_ADA})
    *maps, reduce = (c.hints for c in llm._rasd.calls)
    found = [d.page_content for d in retriever.invoke(ABOUT_ADA)]
    assert sorted(found) == sorted(h.context for h in maps)
    assert {ABOUT_ADA} == {h.question for h in (*maps, reduce)}
    assert "A summary.\n\nA summary." == reduce.context


@legacy
@pytest.mark.parametrize("how", LEGACY_HOWS)
async def test_retrieval_qa_map_rerank(llm, retriever, how):
    """The few-shot examples' questions before the real one are not taken for it."""
    llm._rasd.answer = lambda prompt: "Ada.\nScore: 90"
    await call(retrieval_qa(llm, retriever, "map_rerank"), how, {"query": ABOUT_ADA})
    found = [d.page_content for d in retriever.invoke(ABOUT_ADA)]
    hints = [c.hints for c in llm._rasd.calls]
    assert sorted(found) == sorted(h.context for h in hints)
    assert {ABOUT_ADA} == {h.question for h in hints}


# --- agents ---


class ToolCallingRASD(ChatRASD):
    """Calls the one tool first, by script: calling tools is a later part of the package."""

    query: str = "Ada first program"

    def bind_tools(self, tools, *, tool_choice=None, **kwargs):
        name = tools[0].name
        return self.bind(tool_name=name)

    def _scripted(self, messages, kwargs):
        name = kwargs.pop("tool_name", None)
        if name is None or isinstance(messages[-1], ToolMessage):
            return None
        chunk = {"name": name, "args": f'{{"query": "{self.query}"}}', "id": "1", "index": 0}
        message = AIMessageChunk("", tool_call_chunks=[chunk], chunk_position="last")
        return ChatGenerationChunk(message=message)

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        scripted = self._scripted(messages, kwargs)
        yield from (
            [scripted] if scripted else super()._stream(messages, stop, run_manager, **kwargs)
        )

    async def _astream(self, messages, stop=None, run_manager=None, **kwargs):
        if scripted := self._scripted(messages, kwargs):
            yield scripted
            return
        async for chunk in super()._astream(messages, stop, run_manager, **kwargs):
            yield chunk


def asked(question):
    return {"messages": [HumanMessage(question)]}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("response_format", ["content", "content_and_artifact"])
async def test_agent_with_a_retriever_tool(retriever, how, response_format):
    """Documents come by event or artifact; question and query are the planner's to read in the history."""
    llm = model(ToolCallingRASD)
    search = create_retriever_tool(
        retriever, "search", "Search the facts.", response_format=response_format
    )
    await call(create_agent(llm, [search]), how, asked(ABOUT_ADA))
    (answer,) = llm._rasd.calls
    found = [d.page_content for d in retriever.invoke("Ada first program")]
    assert texts(answer.hints) == found
    assert [None, None] == [answer.hints.question, answer.hints.search_query]
    expected = "artifact" if response_format == "content_and_artifact" else "retriever"
    assert expected == answer.hints.chunk_source
    assert "tool" == answer.prompt[-1]["role"]


@pytest.mark.parametrize("how", HOWS)
async def test_agent_with_the_tutorials_own_tool(how):
    """A tool that calls `similarity_search` fires no retriever event; its artifact has the Documents."""
    store = memory_store()

    @tool(response_format="content_and_artifact")
    def retrieve_context(query: str):
        """Retrieve facts."""
        found = store.similarity_search(query, k=2)
        text = "\n\n".join(f"Source: {d.metadata}\nContent: {d.page_content}" for d in found)
        return text, found

    llm = model(ToolCallingRASD)
    await call(create_agent(llm, [retrieve_context]), how, asked(ABOUT_ADA))
    (answer,) = llm._rasd.calls
    found = [d.page_content for d in store.similarity_search("Ada first program", k=2)]
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


async def test_a_second_turn_has_the_documents_of_its_own_search(retriever):
    """An earlier turn's tool results stand in the prompt as well, but were not retrieved for this answer."""
    llm = model(ToolCallingRASD)
    llm.query = "capital of France"
    agent = create_agent(llm, [create_retriever_tool(retriever, "search", "Search.")])
    earlier = [
        HumanMessage(ABOUT_ADA),
        AIMessage("", tool_calls=[{"name": "search", "args": {"query": "old"}, "id": "0"}]),
        ToolMessage(ADA, tool_call_id="0"),
        AIMessage("Ada."),
    ]
    agent.invoke({"messages": [*earlier, HumanMessage(ABOUT_PARIS)]})
    (answer,) = llm._rasd.calls
    assert PARIS == texts(answer.hints)[0]


# --- plain Python ---


async def call_model(llm, how, value):
    await call(llm, how, value)
    return llm._rasd.calls[-1].hints


@pytest.mark.parametrize("how", HOWS)
async def test_plain_python_round_a_retriever(llm, retriever, how):
    """Retriever and model are separate runs; the Documents that stand in the prompt tie them."""
    if how.startswith("a"):
        other, found = await retriever.ainvoke(ABOUT_PARIS), await retriever.ainvoke(ABOUT_ADA)
    else:
        other, found = retriever.invoke(ABOUT_PARIS), retriever.invoke(ABOUT_ADA)
    found = found[:1]
    hints = await call_model(llm, how, f"{joined(found)}\n\n{ABOUT_ADA}")
    assert ("retriever", ABOUT_ADA) == (hints.chunk_source, hints.search_query)
    assert [ADA] == texts(hints)
    assert other[0].page_content == PARIS


@pytest.mark.parametrize("how", HOWS)
async def test_a_template_used_by_hand(llm, how):
    """A prompt made by `prompt.invoke` outside any chain is recognised by its content."""
    value = PROMPT.invoke({"context": ADA, "question": ABOUT_ADA})
    hints = await call_model(llm, how, value)
    assert (ABOUT_ADA, "template", ADA) == (hints.question, hints.question_source, hints.context)


@pytest.mark.parametrize("how", HOWS)
async def test_a_plain_question_has_no_hints(llm, how):
    """Nothing captured, nothing claimed."""
    assert None is await call_model(llm, how, ABOUT_ADA)


@pytest.mark.parametrize("how", HOWS)
async def test_a_chain_fed_by_an_earlier_retrieval(llm, retriever, how):
    """Documents found before the chain was called belong to it if they stand in its prompt."""
    found = retriever.invoke(ABOUT_ADA)
    await call(PROMPT | llm, how, {"context": joined(found), "question": ABOUT_ADA})
    hints = llm._rasd.calls[-1].hints
    assert [d.page_content for d in found] == texts(hints)


def test_an_earlier_question_is_not_asked_again(llm, retriever):
    """Documents of an earlier retrieval may stand in this prompt too; its query is another question."""
    retriever.invoke(ABOUT_ADA)
    llm.invoke(f"{ADA}\n\nIn which century was that?")
    hints = llm._rasd.calls[-1].hints
    assert ([ADA], None) == (texts(hints), hints.search_query)


def test_another_tasks_retrievals_stay_its_own(llm, retriever):
    """What one task retrieved is never offered to another task's prompt, though the text be the same."""

    async def search():
        await retriever.ainvoke(ABOUT_ADA)

    async def ask():
        await llm.ainvoke(ADA)

    async def both():
        await asyncio.create_task(search())
        await asyncio.create_task(ask())

    asyncio.run(both())
    assert llm._rasd.calls[-1].hints is None


async def test_explicit_hints_win_over_captured_ones(llm, retriever):
    """What the caller says outright goes before what was seen; the rest is still seen."""
    told = llm.bind(rasd={"question": "Who was first?"})
    chain = {"context": retriever | joined, "question": RunnablePassthrough()} | PROMPT | told
    chain.invoke(ABOUT_ADA)
    hints = llm._rasd.calls[-1].hints
    assert ("Who was first?", "explicit", "retriever") == (
        hints.question,
        hints.question_source,
        hints.chunk_source,
    )
