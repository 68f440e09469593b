"""One golden test for each way in which a pipeline hands its prompt to the LLM, with hints and without."""

from __future__ import annotations

import pytest
from fakes_prompting import (
    BEST,
    FACTS,
    LI_SYSTEM,
    QUESTION,
    RANKED,
    SHAPES,
    ListSource,
    Shape,
    assistant,
    human,
    li_text,
    planned,
    system,
    tool,
    tool_call,
)

from rasd_integrations.prompting import Prompt, PromptHints
from rasd_integrations.types import Chunk

by_name = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


@by_name
def test_captured_chunks_make_the_drafter_prompt_the_same_template_with_the_best_of_them(
    shape: Shape,
) -> None:
    """With hints the drafter reads the pipeline's own template, filled with the two best chunks."""
    plan = planned(shape.prompt, shape.hints)
    assert shape.short == plan.drafter
    assert (shape.known.get("question") or QUESTION) == plan.question
    assert (RANKED if shape.has_chunks else FACTS[4]) == (
        plan.chunks if shape.has_chunks else plan.chunks[0].text
    )


@by_name
def test_a_store_makes_the_same_drafter_prompt_without_hints(shape: Shape) -> None:
    """Without hints the question is read off the prompt, and the store's chunks are found in it."""
    plan = planned(shape.prompt, source=ListSource(RANKED))
    assert shape.short == plan.drafter
    assert shape.asked == (plan.question, plan.question_source)
    assert ("store", RANKED) == (plan.chunk_source, plan.chunks)


@by_name
def test_a_prompt_alone_is_searched_itself(shape: Shape) -> None:
    """Without hints and store the drafter reads the part of the prompt that answers the question."""
    plan = planned(shape.prompt)
    text = plan.drafter if isinstance(plan.drafter, str) else str(plan.drafter)
    if shape.asked[0] == QUESTION:
        assert FACTS[4] in text
    assert plan.chunk_source == "prompt"
    assert len(text) < 0.7 * len(str(shape.prompt))


@by_name
def test_the_target_reads_what_was_sent(shape: Shape) -> None:
    """Compressing never touches the target's prompt."""
    prompt = shape.prompt
    assert planned(prompt, shape.hints).target is prompt
    assert shape.prompt == prompt


def test_lcel_with_a_bare_retriever() -> None:
    """`str([Document(...)])` in a prompt: chunks are found behind repr's escapes."""
    facts = [fact.replace(" and ", "\nand ") for fact in FACTS]
    context = str([{"page_content": fact} for fact in facts])
    prompt = [human(f"Context: {context}\n\nQuestion: {QUESTION}")]
    chunks = tuple(Chunk(facts[i], rank=rank) for rank, i in enumerate([4, 1, *range(5, 12)]))
    hints = PromptHints(question=QUESTION, chunks=chunks, context=context)
    escaped = [repr(facts[i])[1:-1] for i in (1, 4)]
    expected = [human(f"Context: {escaped[0]}\n\n{escaped[1]}\n\nQuestion: {QUESTION}")]
    assert expected == planned(prompt, hints).drafter
    assert chunks == planned(prompt, hints).chunks


def test_simple_summarize() -> None:
    """A context that is `str(list)` is cut like any other, with hints and without."""
    nodes = [f"file: towers.txt\n\n{fact}" for fact in FACTS]
    context = str(nodes)
    prompt = [system(LI_SYSTEM), human(li_text(context))]
    chunks = tuple(Chunk(nodes[i], rank=rank) for rank, i in enumerate([4, 1, 0]))
    escaped = [repr(nodes[i])[1:-1] for i in (1, 4)]
    hints = PromptHints(question=QUESTION, chunks=chunks, context=context)
    expected = [system(LI_SYSTEM), human(li_text("\n\n".join(escaped)))]
    assert expected == planned(prompt, hints).drafter
    without = planned(prompt, source=ListSource(RANKED))
    assert (QUESTION, RANKED) == (without.question, without.chunks)


def test_map_reduce_searches_a_chunk_that_is_a_document() -> None:
    """One long chunk a call: the drafter reads its best part."""
    text = "\n\n".join(FACTS)
    rules = "Use the following portion of a long document.\n______________________\n"
    prompt = [system(rules + text), human(QUESTION)]
    plan = planned(prompt, PromptHints(question=QUESTION, chunks=(Chunk(text),), context=text))
    assert plan.drafter is not None
    assert FACTS[4] in plan.drafter[0]["content"]
    assert plan.drafter[0]["content"].startswith(rules)
    assert (Chunk(text),) == plan.chunks


def test_map_reduce_summaries_are_no_chunks() -> None:
    """The reduce step's summaries are in no store: the prompt itself is searched."""
    summaries = "\n\n".join(
        f"Summary {i}: {' '.join(fact.split()[1:])}" for i, fact in enumerate(FACTS)
    )
    far = [Chunk(f"Some other passage number {i} about quite different things.") for i in range(4)]
    prompt = [system(f"Create a final answer.\n___________\n{summaries}"), human(QUESTION)]
    hints = PromptHints(question=QUESTION, context=summaries, chunks=tuple(far))
    plan = planned(prompt, hints)
    assert plan.drafter is not None
    assert "Summary 4: Kullen" in plan.drafter[0]["content"]
    assert plan.chunk_source == "prompt"


def test_map_rerank_keeps_its_examples_and_asks_the_last_question() -> None:
    """Few-shot examples carry the same markers as the real question."""
    examples = (
        "Example #1\n\nContext:\n---------\nApples are red\n---------\nQuestion: what color are apples?\n"
        "Helpful Answer: red\nScore: 100\n\nBegin!\n\n"
    )
    context = "\n\n".join(FACTS)
    head = f"{examples}Context:\n---------\n"
    tail = f"\n---------\nQuestion: {QUESTION}\nHelpful Answer:"
    prompt = [human(f"{head}{context}{tail}")]
    best = [human(head + "\n\n".join(BEST) + tail)]
    for plan in (
        planned(prompt, PromptHints(question=QUESTION, chunks=RANKED, context=context)),
        planned(prompt, source=ListSource(RANKED)),
    ):
        assert best == plan.drafter
        assert plan.question == QUESTION


@pytest.mark.parametrize(
    "prompt",
    [
        [
            system(
                "Given a chat history and the latest user question, formulate a standalone question which can be "
                "understood without the chat history. Do NOT answer it."
            ),
            human("Which lighthouse stands on Kullaberg? " + " ".join(FACTS)),
            assistant("Kullen."),
            human("And who planned it?"),
        ],
        "\n  Given the following conversation between a user and an AI assistant and a follow up question from "
        "user,\n  rephrase the follow up question to be a standalone question.\n\n  Chat History:\n"
        + " ".join(FACTS)
        + "\n  Follow Up Input: And who planned it?\n  Standalone question:",
        "Given a conversation (between Human and Assistant) and a follow up message from Human, rewrite the "
        "message to be a standalone question that captures all relevant context from the conversation.\n\n"
        "<Chat History>\n" + " ".join(FACTS) + "\n\n<Follow Up Message>\nAnd who planned it?\n",
    ],
    ids=["history-aware", "condense-plus-context", "condense-question"],
)
def test_condensing_calls_are_left_alone(prompt: Prompt) -> None:
    """A call that only makes a question standalone searches nothing and drafts from the same prompt."""
    source = ListSource(RANKED)
    plan = planned(prompt, source=source)
    assert (None, "the call only makes a question standalone") == (plan.drafter, plan.off_reason)
    assert source.queries == []


def test_function_agent_with_a_query_engine_tool_sees_only_a_short_answer() -> None:
    """The outer call of a query-engine tool has nothing to shorten."""
    prompt = [human(QUESTION), tool_call({"input": "kullen"}), tool("Magnus Dahlander planned it.")]
    plan = planned(prompt)
    assert plan.drafter is None
    assert "fewer than gate_tokens=60" in str(plan.off_reason)


def test_tool_decisions_search_nothing() -> None:
    """A new question in an agent's conversation has no tool result of its own yet."""
    source = ListSource(RANKED)
    old = [human("Which towers?"), tool_call({"query": "towers"}), tool(" ".join(FACTS))]
    plan = planned([*old, assistant("Twelve."), human(QUESTION)], source=source)
    assert (None, []) == (plan.drafter, source.queries)
    assert "decides on a tool" in str(plan.off_reason)
