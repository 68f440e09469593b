"""The classic chains: what the engine is told of the prompts that they make."""

from __future__ import annotations

import pytest
from cases_langchain import (
    ABOUT_ADA,
    ABOUT_PARIS,
    HOWS,
    PARIS,
    call,
    hints_by_question,
    joined,
    texts,
)
from langchain_classic.chains import (
    RetrievalQA,
    create_history_aware_retriever,
    create_retrieval_chain,
)
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder

pytestmark = pytest.mark.usefixtures("recording_engine")


@pytest.fixture
def llm(tiny_llm):
    return tiny_llm


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
