"""Where the question is found, and the kinds of calls."""

from __future__ import annotations

import pytest
from fakes_prompting import FACTS, assistant, human, system, tool, tool_call

from rasd_integrations.prompting import Prompt, PromptHints
from rasd_integrations.prompting.prompt_view import PromptView
from rasd_integrations.prompting.question import Question, classify, find_question
from rasd_integrations.types import Chunk

LONG = " ".join(FACTS * 3)


def question(prompt: Prompt, **hints: object) -> Question | None:
    return find_question(PromptView.of(prompt), PromptHints(**hints))


def test_explicit_hints_win() -> None:
    """Explicit hints are used unchanged, with their own search query."""
    asked = question([human("Hello?")], question="Why?", search_query="reasons")
    assert Question("Why?", "reasons", "explicit") == asked


def test_the_source_of_a_captured_question_is_passed_on() -> None:
    """The edge's name for where it found the question is kept."""
    assert question("x", question="Why?", question_source="template") == Question(
        "Why?", "Why?", "template"
    )


def test_the_retrievers_query_comes_before_the_prompt() -> None:
    """A standalone query is better for searching than a raw follow-up."""
    asked = question([human("and his age?")], search_query="\ninput is how old is Bob\n")
    assert Question("how old is Bob", "how old is Bob", "retriever") == asked


@pytest.mark.parametrize(
    "arguments",
    [{"query": "towers"}, '{"query": "towers"}', "towers", {"limit": 3, "topic": "towers"}],
    ids=["dict", "json", "bare", "other-name"],
)
def test_tool_calls_tell_what_to_search_for(arguments: object) -> None:
    """The asked question is the first human message of the turn, the query the tool's argument."""
    prompt = [human("Old?"), assistant("Yes."), human("New?"), tool_call(arguments), tool(LONG)]
    assert Question("New?", "towers", "tool_call") == question(prompt)


@pytest.mark.parametrize("arguments", [None, 7, [], "", {"query": 3}, {"query": " "}])
def test_odd_tool_arguments_are_passed_over(arguments: object) -> None:
    """Arguments without text are ignored."""
    asked = question([human("New?"), tool_call(arguments), tool(LONG)])
    assert Question("New?", "New?", "message") == asked


def test_the_last_human_message_is_the_question() -> None:
    """Earlier turns and the assistant's words do not count."""
    prompt = [system(LONG), human("Old?"), assistant("Yes."), human("New?")]
    assert Question("New?", "New?", "message") == question(prompt)


def test_a_message_with_a_captured_chunk_is_no_question() -> None:
    """A short message that holds the context is read by its marker."""
    asked = question([human(f"{FACTS[0]}\nQuestion: Why?")], chunks=(Chunk(FACTS[0]),))
    assert Question("Why?", "Why?", "marker") == asked


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("Question: Why?\nHelpful Answer:", "Why?"),
        ("Query: Why\nand how?\n\nAnswer: ", "Why\nand how?"),
        ("**User question:** Why?", "Why?"),
        ("QUESTION:\nWhy?\n=========\nFINAL ANSWER:", "Why?"),
        ("Human: Why?\nAI:", "Why?"),
    ],
)
def test_markers_near_the_end(end: str, expected: str) -> None:
    """The last marker counts, up to the next label, rule or blank line."""
    asked = question(f"Question: what color are apples?\nAnswer: red\n\n{LONG}\n\n{end}")
    assert (expected, "marker") == (asked.text, asked.source)


def test_markers_far_from_the_end_are_examples() -> None:
    """Without a marker near the end the end itself is the question."""
    asked = question(f"Question: what color are apples?\n\n{LONG}\n\nPourquoi le phare?")
    assert asked.source == "tail"
    assert asked.text.endswith("Pourquoi le phare?")
    assert "apples" not in asked.text


@pytest.mark.parametrize(
    "prompt", ["", "  \n", [], [system("")], [human(None)], [{"role": "user"}], [{}]]
)
def test_no_question_in_nothing(prompt: Prompt) -> None:
    """An empty prompt has no question."""
    assert question(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "hints", "kind"),
    [
        ([human("Hi?")], {}, "plain"),
        ([human("Hi?")], {"context": "Hi"}, "rag_answer"),
        ([human("q"), assistant("a"), human("refine the original answer")], {}, "refine"),
        ([human("q"), tool_call({}), tool("r")], {}, "agent_answer"),
        ([human("q"), assistant("Thought"), human("Observation: r")], {}, "agent_answer"),
        ([human("q"), tool_call({}), tool("r"), assistant("a"), human("q2")], {}, "tool_decision"),
        ("Rephrase the question to be a standalone question: and his?", {}, "condense"),
        ("Rephrase it as a standalone question.", {"chunks": (Chunk("x"),)}, "rag_answer"),
    ],
)
def test_calls_are_told_apart(prompt: Prompt, hints: dict[str, object], kind: str) -> None:
    """Shape and the frameworks' own phrases tell what kind of call it is."""
    assert kind == classify(PromptView.of(prompt), PromptHints(**hints))
