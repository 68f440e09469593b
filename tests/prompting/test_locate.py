"""Finding a chunk in a prompt: exactly, up to white space and escapes, nearly; never slowly."""

from __future__ import annotations

import json
import time

import pytest
from fakes_prompting import FACTS, assistant, human, system, tool
from hypothesis import given
from hypothesis import strategies as st

from rasd_integrations.prompting import Prompt, PromptHints
from rasd_integrations.prompting.locate import Located, PromptIndex
from rasd_integrations.prompting.prompt_view import PromptView, Span
from rasd_integrations.types import Chunk

TEXT = " ".join(FACTS[:3])


def located(prompt: Prompt, *texts: str, context: str | None = None) -> list[Located]:
    index = PromptIndex(PromptView.of(prompt), PromptHints(context=context))
    return index.locate(Chunk(text, rank=i) for i, text in enumerate(texts))[0]


def found_text(prompt: str, chunk: str) -> str | None:
    """Return the part of a plain prompt that is taken for the chunk."""
    found = located(prompt, chunk)
    return prompt[found[0].span.start : found[0].span.end] if found else None


words = st.lists(st.text("abcdeéß漢'\"{}%", min_size=1, max_size=6), min_size=6, max_size=60)
around = st.text(max_size=200)


@given(around, words, around)
def test_a_chunk_that_stands_in_the_prompt_is_found_exactly(
    before: str, chunk: list[str], after: str
) -> None:
    """A chunk's span has its text, whatever is around it."""
    text = "x" * 12 + " ".join(chunk) + "y" * 12
    assert text == found_text(before + text + after, text)


gaps = st.sampled_from([" ", "\n", "\n\n", "\t", "  ", "\\n", "\r\n"])


@given(words, st.lists(gaps, min_size=60, max_size=60))
def test_white_space_does_not_matter(chunk: list[str], gaps: list[str]) -> None:
    """A chunk is found with any other white space between its words, escaped newlines included."""
    end = "and-an-ending-of-some-length"
    written = "".join(word + gap for word, gap in zip(chunk, gaps, strict=False)) + end
    assert written == found_text(f"Before. {written} After.", " ".join([*chunk, end]))


@given(st.text(), st.lists(st.text(max_size=300), max_size=6))
def test_spans_lie_in_the_prompt(prompt: str, chunks: list[str]) -> None:
    """No input raises, and each span is a stretch of the prompt that is not empty."""
    for at in located(prompt, *chunks):
        assert 0 <= at.span.start < at.span.end <= len(prompt)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("repr", repr(FACTS[0] + "\n\n" + FACTS[1] + ' it\'s "so"')[1:-1]),
        ("json", json.dumps(FACTS[0] + "\n\n" + FACTS[1] + ' it\'s "so"')[1:-1]),
        ("list", str([FACTS[0] + "\n\n" + FACTS[1] + ' it\'s "so"'])[2:-2]),
        ("stripped lines", FACTS[0] + "\n" + FACTS[1] + '\n it\'s "so"'),
    ],
)
def test_rewritten_chunks_are_found(name: str, written: str) -> None:
    """A chunk is found as `repr`, JSON or another splitter writes it."""
    assert written == found_text(
        f"Context: ['{written}'] Question: why?", FACTS[0] + "\n\n" + FACTS[1] + ' it\'s "so"'
    ), name


def test_unicode_forms_do_not_matter() -> None:
    """Composed and decomposed letters are the same words."""
    decomposed = "Der Leuchtturm Scho\u0308nberg wurde 1900 von Magnus gebaut."
    composed = "Der Leuchtturm Schönberg wurde 1900 von Magnus gebaut."
    assert decomposed == found_text(f"Kontext: {decomposed} Frage?", composed)


def test_a_cut_chunk_is_found_by_its_rest() -> None:
    """If a splitter cut a chunk, its text is the part in the prompt."""
    words = TEXT.split()
    rest = " ".join(words[: int(len(words) * 0.8)])
    found = located(f"Context: {rest}\n\nQuestion: why?", TEXT)
    assert rest == found[0].chunk.text


def test_a_changed_chunk_is_found_without_what_the_prompt_does_not_say() -> None:
    """Secrets of the stored chunk that the prompt left out do not reach the drafter."""
    words = TEXT.split()
    stored = " ".join([*words[:20], "SECRET-A", "SECRET-B", *words[20:]])
    found = located(f"Context: {TEXT}\n\nQuestion: why?", stored)
    assert TEXT == found[0].chunk.text


def test_an_unlike_chunk_is_not_found() -> None:
    """Sharing eight words in a row is not enough."""
    stored = " ".join([*FACTS[0].split()[:9], *(f"word{i}" for i in range(40))])
    assert located(f"Context: {FACTS[0]}", stored) == []


def test_a_child_is_found_in_its_parent() -> None:
    """The prompt has parent documents, the store their children."""
    parent = " ".join(FACTS)
    assert FACTS[5] == found_text(f"Context: {parent}", FACTS[5])


def test_overlapping_chunks_are_both_found() -> None:
    """Two chunks may share a sentence."""
    found = located(TEXT, " ".join(FACTS[:2]), " ".join(FACTS[1:3]))
    assert found[0].span.end > found[1].span.start
    assert [0, len(TEXT)] == [found[0].span.start, found[1].span.end]


def test_short_chunks_fill_their_lines() -> None:
    """A chunk of one word is not found within the instructions."""
    prompt = "Say Yes or no.\n\nYes\n\nQuestion?"
    assert [Span(0, 16, 19)] == [at.span for at in located(prompt, "Yes")]
    assert located("Say Yes or no.", "Yes") == []


def test_the_context_is_looked_at_first() -> None:
    """A chunk that the history quotes too is located in the context."""
    prompt = [system(f"Rules.\n\n{TEXT}"), human(f"You said: {FACTS[1]}"), human("Why?")]
    assert located(prompt, FACTS[1], context=TEXT)[0].span.message == 0


def test_the_latest_message_wins_and_answers_are_no_context() -> None:
    """Of two tool results the newer one counts; assistant messages never do."""
    prompt = [tool(FACTS[0]), tool(FACTS[0]), assistant(FACTS[0])]
    assert located(prompt, FACTS[0])[0].span.message == 1
    assert located([assistant(FACTS[0])], FACTS[0]) == []


def test_each_text_counts_once() -> None:
    """A store that returns a text twice has found it once, at its better rank."""
    found = located(TEXT, FACTS[0], FACTS[1], FACTS[0])
    assert [0, 1] == [at.chunk.rank for at in found]


@pytest.mark.parametrize(
    ("prompt", "chunk"),
    [
        ("word " * 200_000, " ".join(["word"] * 400) + " end"),
        ("a" * 1_000_000, "a" * 5000 + "b"),
        (" \n" * 400_000, "some chunk " * 40),
        ("\\n" * 400_000, "\\n" * 300 + "x"),
        ("Yes " * 250_000, "Yes"),
        ("漢字" * 300_000, "漢" * 2000),
        (" ".join(FACTS) * 1000, " ".join([*FACTS[0].split(), *["other"] * 80])),
    ],
    ids=["repeats", "one-word", "blank", "escapes", "short", "no-spaces", "anchors"],
)
def test_huge_prompts_are_searched_in_linear_time(prompt: str, chunk: str) -> None:
    """A megabyte of anything takes no longer than a pass or two over it."""
    started = time.perf_counter()
    located(prompt, *[chunk + str(i) for i in range(8)])
    assert time.perf_counter() - started < 5
