"""How LCEL chains and plain Python hand their prompt to the model: what the engine is told of it.

One test (or more) for each row of the table of shapes: the hints must name the question, the context as
it stands in the prompt, and the Documents, without any change to the chain.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cases_langchain import (
    ABOUT_ADA,
    ABOUT_PARIS,
    ADA,
    BREAD,
    HOWS,
    PARIS,
    PROMPT,
    call,
    hints_by_question,
    joined,
    memory_store,
    model,
    texts,
)
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough

from rasd_integrations.langchain import RASDLLM

pytestmark = pytest.mark.usefixtures("recording_engine")


@pytest.fixture
def llm(tiny_llm):
    return tiny_llm


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
