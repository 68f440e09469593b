"""`context="documents"`: the target reads the documents of the chunks, the drafter the prompt as sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes_prompting import (
    QUESTION,
    FaultySource,
    ListSource,
    count_words,
    failing,
    human,
    li_text,
    planned,
    system,
    tool,
    tool_call,
)

from rasd_integrations.prompting import Prompt, PromptHints, PromptPlan
from rasd_integrations.prompting.prompt_view import PromptView
from rasd_integrations.types import Chunk


def document(name: str, size: int = 30) -> list[Chunk]:
    return [
        Chunk(
            f"Paragraph {i} of {name} tells of {name} and of the number {i} at length.",
            id=f"{name}-{i}",
            metadata={"source": name},
        )
        for i in range(size)
    ]


ALPHA, BETA, GAMMA = document("alpha"), document("beta"), document("gamma")
STORE = [*GAMMA, *ALPHA, *BETA]
CHUNKS = tuple(replace(c, rank=rank) for rank, c in enumerate((BETA[7], ALPHA[3], BETA[9])))
SENT = "\n\n".join(chunk.text for chunk in CHUNKS)


def text_of(chunks: list[Chunk]) -> str:
    return "\n\n".join(chunk.text for chunk in chunks)


def expanded(
    prompt: Prompt,
    hints: PromptHints | None,
    source: ListSource | None = None,
    **options: Any,
) -> PromptPlan:
    source = source or ListSource(CHUNKS, STORE)
    return planned(prompt, hints, source, context="documents", gate_share=0.5, **options)


HINTS = PromptHints(question=QUESTION, chunks=CHUNKS, context=SENT)


def lcel(context: str, question: str = QUESTION) -> Prompt:
    return [system("Be brief."), human(f"Context:\n{context}\n\nQuestion: {question}")]


@pytest.mark.parametrize(
    "hints", [HINTS, PromptHints(chunks=CHUNKS), None], ids=["context", "chunks", "none"]
)
def test_documents_stand_where_their_chunks_stood(hints: PromptHints | None) -> None:
    """Whole documents, each once, in their own order; the drafter reads the prompt as sent."""
    prompt = lcel(SENT)
    plan = expanded(prompt, hints)
    assert lcel(text_of(ALPHA) + "\n\n" + text_of(BETA)) == plan.target
    assert prompt is plan.drafter
    assert [chunk.text for chunk in CHUNKS] == [chunk.text for chunk in plan.chunks]
    assert plan.omitted_tokens == 0


def test_the_order_does_not_depend_on_the_question() -> None:
    """Another question with other chunks of the same documents shares the whole prefix."""
    other = (ALPHA[20], BETA[1])
    hints = PromptHints(question="Why?", chunks=other, context="\n\n".join(c.text for c in other))
    one = expanded(lcel(SENT), HINTS).target[1]["content"]
    two = expanded(lcel(str(hints.context), "Why?"), hints).target[1]["content"]
    shared = len(f"Context:\n{text_of(ALPHA)}\n\n{text_of(BETA)}\n\nQuestion: ")
    assert one[:shared] == two[:shared]


def test_only_documents_with_a_chunk_in_the_prompt_are_read() -> None:
    """A chunk that the pipeline dropped opens no document."""
    plan = expanded(
        lcel(SENT), PromptHints(question=QUESTION, chunks=(*CHUNKS, GAMMA[0]), context=SENT)
    )
    assert "gamma" not in str(plan.target)


def test_the_retrievers_filter_is_passed_on() -> None:
    """Documents are fetched under the filter of the retriever, each document once."""
    source = ListSource(CHUNKS, STORE)
    expanded(
        lcel(SENT), PromptHints(question=QUESTION, chunks=CHUNKS, filter={"tenant": 7}), source
    )
    assert [{"tenant": 7}] * 2 == source.filters


def test_the_template_is_filled_again_with_the_documents() -> None:
    """LlamaIndex's own template gets the longer context."""
    hints = PromptHints(question=QUESTION, chunks=CHUNKS, context=SENT, rerender=lambda c: f"<{c}>")
    assert f"<{text_of(ALPHA)}\n\n{text_of(BETA)}>" == expanded(li_text(SENT), hints).target


def test_what_is_no_chunk_of_a_document_stays_behind_the_documents() -> None:
    """Facts of another source are not lost; headers of replaced chunks are."""
    fact = "A tool that is no store measured 12 degrees this morning"
    context = f"Source: alpha\n{ALPHA[3].text}\n\n{fact}\n\nSource: beta\n{BETA[7].text}"
    hints = PromptHints(question=QUESTION, chunks=CHUNKS[:2], context=context)
    expected = lcel(f"{text_of(ALPHA)}\n\n{text_of(BETA)}\n\n{fact}")
    assert expected == expanded(lcel(context), hints).target


def test_documents_in_a_list_of_documents() -> None:
    """What `str` writes round a list's texts goes with the chunks."""
    context = str(
        [
            {"metadata": {"source": "a"}, "page_content": ALPHA[3].text},
            {"page_content": BETA[7].text},
        ]
    )
    hints = PromptHints(question=QUESTION, chunks=CHUNKS[:2], context=context)
    assert lcel(text_of(ALPHA) + "\n\n" + text_of(BETA)) == expanded(lcel(context), hints).target


def test_two_tool_results_share_a_document() -> None:
    """A document replaces its first chunk; a later chunk of it stays a chunk."""
    call = tool_call({"query": "x"})
    prompt = [human(QUESTION), call, tool(ALPHA[3].text), call, tool(ALPHA[8].text)]
    plan = expanded(prompt, PromptHints(chunks=(ALPHA[8], ALPHA[3])))
    assert [*prompt[:2], tool(text_of(ALPHA)), *prompt[3:]] == plan.target


@pytest.mark.parametrize("room", [150, 200, 400, 500])
def test_over_the_window_the_surroundings_of_the_chunks_come_first(room: int) -> None:
    """The prompt fits its room, contains every chunk, and reports what was left out."""
    plan = expanded(lcel(SENT), HINTS, room=room)
    words = sum(map(count_words, PromptView.of(plan.target).texts))
    assert words <= room
    for chunk in CHUNKS:
        assert chunk.text in plan.target[1]["content"]
    whole = count_words(text_of(ALPHA)) + count_words(text_of(BETA))
    assert (
        abs(
            whole
            + count_words("Be brief. Context: Question: ")
            + count_words(QUESTION)
            - words
            - plan.omitted_tokens
        )
        <= 4
    )
    assert plan.omitted_tokens > 0


def test_a_chunks_neighbours_are_kept_before_the_rest() -> None:
    """A chunk's neighbours are read before the document's far end."""
    plan = expanded(
        lcel(ALPHA[15].text),
        PromptHints(question=QUESTION, chunks=(ALPHA[15],), context=ALPHA[15].text),
        room=80,
    )
    content = plan.target[1]["content"]
    assert ALPHA[14].text in content
    assert ALPHA[16].text in content
    assert ALPHA[0].text not in content
    assert ALPHA[29].text not in content


def test_small_documents_stay_whole() -> None:
    """The long document makes room, the short one is read whole."""
    note = document("a-note", 3)
    chunks = (note[1], BETA[7])
    context = text_of(list(chunks))
    source = ListSource(chunks, [*note, *STORE])
    plan = expanded(lcel(context), PromptHints(chunks=chunks, context=context), source, room=200)
    assert text_of(note) in plan.target[1]["content"]
    assert plan.omitted_tokens > 0


def test_no_room_leaves_the_prompt_as_sent() -> None:
    """A prompt that fills the window by itself is not made longer."""
    prompt = lcel(SENT)
    plan = expanded(prompt, HINTS, room=40)
    assert prompt is plan.target
    assert "No room for documents" in plan.faults[0]


@pytest.mark.parametrize(
    "source",
    [
        ListSource(CHUNKS),
        ListSource(
            CHUNKS,
            [
                Chunk("An altogether different text now.", metadata={"source": name})
                for name in ("alpha", "beta")
            ],
        ),
        FaultySource(failing),
        FaultySource(lambda: [None, 7, Chunk(" ")]),
    ],
    ids=["unknown", "changed", "failing", "garbage"],
)
def test_a_store_that_cannot_tell_leaves_the_prompt_as_sent(source: ListSource) -> None:
    """Without the document, or with another version or a fault, the prompt is unchanged."""
    prompt = lcel(SENT)
    assert prompt is expanded(prompt, HINTS, source).target


def test_condensing_reads_no_documents() -> None:
    """A call that only makes a question standalone is not expanded."""
    prompt = f"Chat:\n{SENT}\nRephrase the question to be a standalone question: and his?"
    assert prompt is expanded(prompt, None).target


def test_a_prompt_that_hardly_grows_has_no_drafter_prompt() -> None:
    """Where documents are no longer than their chunks, drafter and target read the same."""
    chunks = tuple(ALPHA)
    plan = expanded(lcel(text_of(ALPHA)), PromptHints(chunks=chunks, context=text_of(ALPHA)))
    assert plan.drafter is None
    assert "over gate_share=0.5" in str(plan.off_reason)


def test_documents_are_read_without_a_drafter() -> None:
    """What the target reads does not depend on who drafts."""
    plan = expanded(lcel(SENT), HINTS, wants=False)
    assert expanded(lcel(SENT), HINTS).target == plan.target
    assert (None, None) == (plan.drafter, plan.off_reason)
