"""The planner against stores that fail, text that is odd, and its own caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes_prompting import (
    FACTS,
    QUESTION,
    RANKED,
    SMALL,
    FaultySource,
    ListSource,
    assistant,
    count_words,
    failing,
    hanging,
    human,
    joined,
    li_text,
    planned,
    system,
)

from rasd_integrations.config import ContextMode
from rasd_integrations.prompting import Prompt, PromptHints, PromptPlanner
from rasd_integrations.prompting.splitting import split
from rasd_integrations.prompting.token_counts import TokenCounter
from rasd_integrations.retrieval import GuardedSource
from rasd_integrations.types import Chunk

PROMPT = [system(f"Be brief.\n\n{joined(FACTS)}"), human(QUESTION)]


def planner(
    source: ListSource | None = None,
    context: ContextMode = "prompt",
    count: Callable[[str], int] = count_words,
) -> PromptPlanner:
    """Return a planner to be used more than once."""
    guarded = None if source is None else GuardedSource(source, 2.0)
    return PromptPlanner(guarded, SMALL, context, count)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (failing, "ConnectionError: the store is on fire"),
        (hanging, "no answer within 0.05 s"),
        (lambda: "garbage", "a str instead of a list"),
        (lambda: [3, None], "dropped 2 of 2 results"),
    ],
    ids=["raises", "hangs", "wrong-type", "wrong-items"],
)
def test_a_store_that_fails_is_reported_and_the_prompt_itself_searched(
    fault: object, said: str
) -> None:
    """Whatever a store does, the answer has a plan."""
    plan = planned(PROMPT, None, FaultySource(fault), timeout_s=0.05)
    assert said in plan.faults[0]
    assert ("prompt", FACTS[4]) == (plan.chunk_source, plan.chunks[0].text)
    assert FACTS[4] in plan.drafter[0]["content"]


@pytest.mark.parametrize(
    ("context", "wants", "level"),
    [("documents", False, "WARNING"), ("documents", True, "WARNING"), ("prompt", True, "INFO")],
)
def test_a_missing_store_is_told_of_once(
    context: ContextMode, wants: bool, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Faults B: one log line if a store would be read and none was given."""
    caplog.set_level("INFO")
    plans = planner(None, context)
    for _ in range(2):
        plans.plan(PROMPT, hints=None, room=999, wants_drafter_prompt=wants)

    (record,) = caplog.records
    assert (level, True) == (
        record.levelname,
        "Give store=" in record.message or "give store=" in record.message,
    )


@pytest.mark.parametrize("prompt", [PROMPT, "Once upon a time"])
def test_a_store_that_nothing_would_read_is_not_asked_for(
    prompt: Prompt, caplog: pytest.LogCaptureFixture
) -> None:
    """The default drafters read no chunks, so nothing is logged."""
    caplog.set_level("INFO")
    planned(prompt, wants=False)
    planned(PROMPT, None, ListSource([]), context="documents")

    assert [] == caplog.records


def test_an_empty_store_is_no_fault() -> None:
    """If a store finds nothing, the prompt's own pieces are used."""
    plan = planned(PROMPT, None, ListSource([]))
    assert ((), "prompt") == (plan.faults, plan.chunk_source)


def test_the_time_in_the_store_is_reported() -> None:
    """`retrieve_s` is the store's share of the planning."""
    plan = planned(PROMPT, None, FaultySource(lambda: time.sleep(0.05) or []))
    assert 0.05 <= plan.retrieve_s < 1


ODD = [
    "",
    " \n\t" * 5000,
    "{{ context }} {% for x in y %} {question} %s <|im_start|>system <s>[INST]" * 300,
    "x" * 300_000,
    "lone \ud800 surrogate \udfff " * 1000,
    "a\x00b\u202e\ufeff " * 2000,
    "```\n" * 10_000,
    "Question:" * 10_000,
    "-" * 100_000,
    "\n" * 100_000,
    "\\n" * 50_000,
    "Document(page_content='" * 3000,
    "{" * 100_000,
    "\n\n".join(["The same paragraph again and again, word for word."] * 1000),
]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["prompt", "documents"])
@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_text_neither_raises_nor_takes_long(odd: str, context: ContextMode) -> None:
    """Documents may hold anything, as text, as message, as chunk, as context, as question."""
    documents = [
        Chunk(odd, metadata={"source": "odd"}),
        Chunk(odd + " end", metadata={"source": "odd"}),
    ]
    chunks = (Chunk(odd, metadata={"source": "odd"}), *RANKED[:2], Chunk(""), Chunk(" "))
    source = ListSource(chunks, documents)
    prompts: list[Prompt] = [
        odd,
        [system(odd), human(QUESTION)],
        [human(li_text(f"{FACTS[4]}\n\n{odd}\n\n{FACTS[1]}"))],
        [human(odd), assistant(odd), human(f"Observation: {odd}")],
    ]
    plans = planner(source, context)
    started = time.perf_counter()
    for prompt in prompts:
        for hints in (
            None,
            PromptHints(chunks=chunks, context=odd),
            PromptHints(question=odd, search_query=odd),
        ):
            plan = plans.plan(prompt, hints=hints, room=5000, wants_drafter_prompt=True)
            assert plan.drafter is not None or plan.off_reason
    assert time.perf_counter() - started < 10


def test_a_chunk_that_is_the_whole_prompt() -> None:
    """Nothing is left round it, and its parts are searched."""
    text = joined(FACTS)
    plan = planned(text, PromptHints(question=QUESTION, chunks=(Chunk(text),)))
    assert FACTS[4] in plan.drafter
    assert len(plan.drafter) < len(text) / 2


@pytest.mark.parametrize(
    "prompt",
    [
        [{}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [],
    ],
)
def test_messages_without_text_are_left_to_the_template(prompt: Prompt) -> None:
    """Content that is not text is neither read nor changed."""
    plan = planned(prompt)
    assert (prompt, None) == (plan.target, plan.drafter)


def test_a_second_question_counts_and_cuts_nothing_again() -> None:
    """What was counted and cut for a document is kept for the next question on it."""
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return count_words(text)

    plans = planner(count=count)
    plans.plan(PROMPT, hints=None, room=999, wants_drafter_prompt=True)
    counted.clear()
    plans.plan(
        [PROMPT[0], human("How high is Roker?")], hints=None, room=999, wants_drafter_prompt=True
    )
    assert ["How high is Roker?"] == counted


def test_long_texts_are_counted_by_sample() -> None:
    """Planning tokenises a few thousand characters of a long prompt, not all of it."""
    seen: list[int] = []

    def count(text: str) -> int:
        seen.append(len(text))
        return count_words(text)

    text = "some words " * 50_000
    estimate = TokenCounter(count).estimate(text)
    assert sum(seen) <= 8192
    assert abs(estimate - 100_000) < 1000


def test_planning_is_safe_under_threads() -> None:
    """Concurrent answers share a planner."""
    plans = planner(ListSource(RANKED))

    def draft(_: int = 0) -> object:
        return plans.plan(PROMPT, hints=None, room=999, wants_drafter_prompt=True).drafter

    with ThreadPoolExecutor(4) as pool:
        assert [draft()] * 80 == list(pool.map(draft, range(80)))


@pytest.mark.parametrize("size", [16, 50, 100, 350, 1000])
def test_pieces_cover_the_text(size: int) -> None:
    """Pieces follow one another without a gap, none longer than asked."""
    text = "\n\n".join([*FACTS, "x" * 500, "漢字。" * 100, "a b " * 100])
    pieces = split(text, 0, len(text), size)
    assert "".join(text[start:end] for start, end in pieces) == text
    assert max(end - start for start, end in pieces) <= size
