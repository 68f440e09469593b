"""What LlamaIndex's own pipelines hand to the LLM, and what the LLM makes of it for the engine.

Every shape of a LlamaIndex pipeline, through real engines over real stores.
"""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import (
    CONDENSED,
    FOLLOW_UP,
    METHODS,
    NODES,
    QUESTION,
    TEXT,
    WAYS,
    assert_chunks,
    assert_hints_are_exact,
    flat,
    history,
    shown,
)
from fakes_llama_index import FakeRASD
from llama_index.core import PromptTemplate
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
)


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
    llm._rasd.window, llm.max_tokens = 440, 210
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


def test_a_template_that_changes_its_context(index, llm):
    """A context that does not stand in the prompt as it was given is not named, but can be re-rendered."""
    template = PromptTemplate(
        "Read {context_str} and answer {query_str}",
        function_mappings={"context_str": lambda **given: given["context_str"].upper()},
    )
    index.as_query_engine(llm=llm, text_qa_template=template).query(QUESTION)

    (call,) = llm._rasd.calls
    assert call.hints.context is None
    assert flat(call.hints.rerender("short")) == f"Read SHORT and answer {QUESTION}"


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
