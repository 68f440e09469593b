"""The drafter's prompt in LlamaIndex's pipelines: the pipeline's own template, filled with a shorter context.

A tiny random model in float32 drafts for itself from that prompt; the answers are those of plain decoding.
"""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import QUESTION, flat, history, make_index
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import ExactMatchFilter, MetadataFilters
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.config import RetrievalConfig
from rasd_integrations.llama_index import RASDLLM
from rasd_integrations.runtime import pipeline

WINDOW = 8192
KEY = "The lighthouse at Cape Wrath was built by Robert Stevenson."
EXPERT = """\
You are an expert Q&A system that is trusted around the world.
Always answer the query using the provided context information, and not prior knowledge.
Some rules to follow:
1. Never directly reference the given context in your answer.
2. Avoid statements like 'Based on the context, ...' or 'The context information ...' or anything along those lines."""
SOURCES = " from multiple sources"


def asked(sources=""):
    """Return what LlamaIndex writes before and after the context, as the model reads it."""
    before = (
        f"<|im_start|>system\n{EXPERT}<|im_end|>\n<|im_start|>user\n"
        f"Context information{sources} is below.\n---------------------\n"
    )
    given = f"information{sources}" if sources else "context information"
    after = (
        f"\n---------------------\nGiven the {given} and not prior knowledge, answer the query.\n"
        f"Query: {QUESTION}\nAnswer: <|im_end|>\n<|im_start|>assistant\n"
    )
    return before, after


def refined(before_answer):
    """Return the same of the prompt that refines an answer."""
    before = """\
<|im_start|>user
You are an expert Q&A system that strictly operates in two modes when refining existing answers:
1. **Rewrite** an original answer using the new context.
2. **Repeat** the original answer if the new context isn't useful.
Never reference the original answer or context directly in your answer.
When in doubt, just repeat the original answer.
New Context: """
    after = (
        f"\nQuery: {QUESTION}\nOriginal Answer: {before_answer}\n"
        f"New Answer: <|im_end|>\n<|im_start|>assistant\n"
    )
    return before, after


def fact_node(number, subject, tenant="ours"):
    """Return a node of a kilobyte; one of them answers the question."""
    lines = [
        f"Of the {subject} it is written in {1800 + 7 * line + number} that mason {chr(65 + line)} laid stone {line}."
        for line in range(14)
    ]
    key = [KEY] if subject == "lighthouse" else []
    return TextNode(
        id_=f"n{number}",
        text="\n".join([*lines, *key]),
        metadata={"tenant": tenant},
        excluded_llm_metadata_keys=["tenant"],
    )


NODES = [
    fact_node(i, name) for i, name in enumerate(["lighthouse", "harbour", "railway", "market"])
]


@pytest.fixture(scope="module")
def parts():
    """Return a model of a longer window and its tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = WINDOW
    return tiny_llama(max_position_embeddings=WINDOW), tokenizer


@pytest.fixture
def plain(parts):
    """Return an LLM that decodes plainly."""
    return RASDLLM.from_model(*parts, drafter=None, max_tokens=16)


@pytest.fixture
def llm(parts):
    """Return an LLM that drafts for itself from a short prompt."""
    retrieval = RetrievalConfig(gate_tokens=256, gate_share=0.9, chunk_tokens=64)
    return RASDLLM.from_model(
        *parts, drafter="self", max_tokens=16, retrieval=retrieval, num_draft_tokens=4
    )


@pytest.fixture
def drafted(monkeypatch, parts):
    """Return what target and drafter read and the chunks of the drafts, for each call with a drafter's prompt."""
    _, tokenizer = parts
    seen = []
    make = pipeline.draft_context

    def watched(template, plan, *args):
        context = make(template, plan, *args)
        if context.drafter_prompt_ids is None:  # plain decoding
            return context
        target = tokenizer.apply_chat_template(
            plan.target, add_generation_prompt=True, tokenize=False
        )
        short = tokenizer.decode(context.drafter_prompt_ids)
        seen.append((target, short, [tokenizer.decode(ids) for ids in context.chunk_ids]))
        return context

    monkeypatch.setattr(pipeline, "draft_context", watched)
    return seen


def short_context(target, drafter, frame):
    """Return the drafter's context; outside of it both prompts are the same, inside it is the shorter."""
    before, after = frame
    assert target.startswith(before)
    assert target.endswith(after)
    assert drafter.startswith(before)
    assert drafter.endswith(after)
    long, short = (text[len(before) : len(text) - len(after)] for text in (target, drafter))
    pieces = [piece for piece in short.split("\n\n") if piece.strip()]
    assert pieces
    assert all(piece in long for piece in pieces)
    assert len(short) < len(long) / 3
    return short


@pytest.mark.parametrize("store", ["chroma", "faiss"])
@pytest.mark.parametrize(
    ("mode", "sources", "calls"),
    [
        ("compact", "", 1),
        ("tree_summarize", SOURCES, 1),
        ("simple_summarize", "", 1),
        ("accumulate", "", 4),
        ("compact_accumulate", "", 1),
    ],
)
def test_the_drafter_reads_the_template_filled_again(
    tmp_path, llm, plain, drafted, store, mode, sources, calls
):
    """Rules, frame and question stand as they are, round the passage that answers; the answer is plain's."""
    index = make_index(store, tmp_path, NODES)
    options = {"response_mode": mode, "similarity_top_k": 4}
    answer = str(index.as_query_engine(llm=llm, **options).query(QUESTION))

    assert calls == len(drafted)
    contexts = [short_context(target, short, asked(sources)) for target, short, _ in drafted]
    assert [True] == [True for context in contexts if KEY in context]
    assert answer == str(index.as_query_engine(llm=plain, **options).query(QUESTION))
    assert llm.stats.drafted > 0


@pytest.mark.parametrize("store", ["chroma", "faiss"])
def test_the_drafter_reads_the_refining_template_filled_again(tmp_path, llm, plain, drafted, store):
    """The first call has the asking template, the next ones the refining one with the answer so far."""
    index = make_index(store, tmp_path, NODES)
    options = {"response_mode": "refine", "similarity_top_k": 4}
    answer = str(index.as_query_engine(llm=llm, **options).query(QUESTION))
    first, *others = drafted

    assert KEY in short_context(first[0], first[1], asked())
    assert len(others) == 3
    for target, short, _ in others:
        before = target.partition("\nOriginal Answer: ")[2].rpartition("\nNew Answer: ")[0]
        assert KEY not in short_context(target, short, refined(before))
    assert answer == str(index.as_query_engine(llm=plain, **options).query(QUESTION))


@pytest.mark.parametrize("store", ["chroma", "faiss"])
def test_the_drafter_reads_a_chat_with_its_history(tmp_path, llm, plain, drafted, store):
    """The context of a chat engine stands in the system message; the turns after it stay whole."""
    index = make_index(store, tmp_path, NODES)

    def ask(model):
        engine = ContextChatEngine.from_defaults(
            retriever=index.as_retriever(similarity_top_k=4), llm=model, memory=history()
        )
        return str(engine.chat(QUESTION))

    answer = ask(llm)
    ((target, short, _),) = drafted

    before, at, _ = target.partition("--------------------\n")
    turns = "".join(
        f"<|im_start|>{m.role.value}\n{m.content}<|im_end|>\n" for m in history().get_all()
    )
    after = target[target.index("\n--------------------\n", len(before) + len(at)) :]
    assert turns in after
    assert KEY in short_context(target, short, (before + at, after))
    assert answer == ask(plain)


@pytest.mark.parametrize("store", ["memory", "chroma"])
def test_a_metadata_filter_holds_for_the_drafter(tmp_path, llm, drafted, store):
    """What the pipeline's filter kept out of the prompt reaches no draft, though the store holds it."""
    theirs = [fact_node(10 + i, "lighthouse", tenant="theirs") for i in range(3)]
    index = make_index(store, tmp_path, [*NODES, *theirs])
    filters = MetadataFilters(filters=[ExactMatchFilter(key="tenant", value="ours")])
    index.as_query_engine(llm=llm, similarity_top_k=4, filters=filters).query(QUESTION)
    index.as_query_engine(llm=llm, similarity_top_k=4).query(QUESTION)

    (_, short, chunks), (unfiltered, *_) = drafted
    ours = "\n".join(node.text for node in NODES)
    foreign = {line for node in theirs for line in node.text.splitlines()} - {KEY}
    assert any(line in unfiltered for line in foreign)
    assert not any(line in short for line in foreign)
    assert chunks
    assert all(chunk in ours for chunk in chunks)


@pytest.mark.parametrize("store", ["memory", "chroma", "faiss"])
async def test_asynchronous_and_streamed_questions_draft_alike(tmp_path, llm, drafted, store):
    """All four ways to ask give the drafter one and the same prompt."""
    index = make_index(store, tmp_path, NODES)
    whole = index.as_query_engine(llm=llm, similarity_top_k=4)
    streaming = index.as_query_engine(llm=llm, similarity_top_k=4, streaming=True)
    answers = [
        str(whole.query(QUESTION)),
        str(await whole.aquery(QUESTION)),
        "".join(streaming.query(QUESTION).response_gen),
        "".join([d async for d in (await streaming.aquery(QUESTION)).async_response_gen()]),
    ]

    assert [answers[0]] * 4 == answers
    assert [drafted[0][1]] * 4 == [short for _, short, _ in drafted]
    assert KEY in flat(drafted[0][1])
