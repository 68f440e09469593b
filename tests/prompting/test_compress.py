"""The drafter's short prompt: what is kept, in which order, and when there is none."""

from __future__ import annotations

import copy

import pytest
from fakes_prompting import (
    FACTS,
    QUESTION,
    RANKED,
    ListSource,
    assistant,
    human,
    joined,
    planned,
    system,
    tool,
    tool_call,
)

from rasd_integrations.prompting import Prompt, PromptHints
from rasd_integrations.types import Chunk

CONTEXT = joined(FACTS)
PROMPT = [system(f"Be brief.\n\n{CONTEXT}"), human(QUESTION)]


def told(**known: object) -> PromptHints:
    return PromptHints(**{"question": QUESTION, "chunks": RANKED, "context": CONTEXT, **known})


def test_the_template_is_filled_again_where_that_is_possible() -> None:
    """LlamaIndex's own template gets the shorter context."""
    plan = planned(PROMPT, told(rerender=lambda context: f"<{context}>"))
    assert f"<{joined([FACTS[1], FACTS[4]])}>" == plan.drafter


def test_a_template_that_cannot_be_filled_again_is_edited() -> None:
    """A template that raises is reported in the faults, and the prompt is edited."""

    def rerender(context: str) -> Prompt:
        msg = f"no variable for {len(context)} characters"
        raise KeyError(msg)

    plan = planned(PROMPT, told(rerender=rerender))
    assert [system(f"Be brief.\n\n{joined([FACTS[1], FACTS[4]])}"), human(QUESTION)] == plan.drafter
    assert "could not be filled again: KeyError" in plan.faults[0]


def test_the_budget_decides_how_many_chunks_are_read() -> None:
    """Chunks are chosen by rank and keep the prompt's order."""
    taken = {
        share: [
            i
            for i, fact in enumerate(FACTS)
            if fact in planned(PROMPT, told(), max_share=share).drafter[0]["content"]
        ]
        for share in (0.1, 0.3, 0.4)
    }
    assert {0.1: [1, 4], 0.3: [0, 1, 4], 0.4: [0, 1, 2, 3, 4]} == taken


def test_overlapping_chunks_are_said_once() -> None:
    """A sentence that two chunks share is in the drafter's prompt once."""
    text = " ".join(FACTS)
    chunks = tuple(Chunk(" ".join(FACTS[i : i + 2]), rank=i) for i in (3, 4))
    plan = planned(
        [human(f"{text}\n\nQuestion: {QUESTION}")],
        told(chunks=chunks, context=text),
        max_share=0.5,
        k=2,
    )
    assert 1 == plan.drafter[0]["content"].count(FACTS[4])
    assert " ".join(FACTS[3:6]) in plan.drafter[0]["content"]


def test_instructions_history_and_the_last_turn_stay_word_for_word() -> None:
    """Only the context is shortened."""
    turns = [
        human("Which towers are old? " * 3),
        assistant("All of them are. " * 5),
        human(QUESTION),
    ]
    plan = planned([*PROMPT[:1], *turns], told())
    assert turns == plan.drafter[1:]
    assert plan.drafter[0]["content"].startswith("Be brief.\n\n")


def test_each_long_tool_result_is_shortened() -> None:
    """An agent's earlier tool results are context, too; its calls stay."""
    log = "\n".join(
        f"Line {i} of a log that says nothing of interest to anyone." for i in range(40)
    )
    call = tool_call({"query": "Kullen"})
    prompt = [human(QUESTION), call, tool(log), call, tool(CONTEXT)]
    plan = planned(prompt, PromptHints(question=QUESTION, chunks=RANKED))
    assert [prompt[0], call] == plan.drafter[:2]
    assert len(plan.drafter[2]["content"]) < len(log) / 2
    assert FACTS[4] in plan.drafter[4]["content"]
    assert FACTS[9] not in plan.drafter[4]["content"]


def test_a_chunk_of_the_store_must_stand_in_the_prompt() -> None:
    """Another tenant's chunk never reaches the drafter."""
    foreign = Chunk("The vault code of another tenant is 1234 and opens everything.", rank=0)
    plan = planned(PROMPT, source=ListSource([foreign, *RANKED]))
    assert RANKED == tuple(Chunk(c.text, c.id, c.rank - 1, c.metadata) for c in plan.chunks)
    assert "vault" not in str(plan.drafter)


def test_store_policy_any_lets_chunks_in_that_the_prompt_does_not_have() -> None:
    """Asked for outright, the store's own chunks are read as well."""
    extra = Chunk("Kullen was planned in Copenhagen, says another book.", rank=0)
    plan = planned(PROMPT, source=ListSource([extra, *RANKED]), store_policy="any")
    assert extra.text in plan.drafter[0]["content"]
    assert extra == plan.chunks[0]


def test_the_store_is_asked_with_the_search_query_and_the_retrievers_filter() -> None:
    """The standalone query and the pipeline's own filter reach the store; `k` is the configured one."""
    source = ListSource(RANKED)
    planned(
        PROMPT,
        PromptHints(question="And he?", search_query="Kullen", filter={"tenant": 7}),
        source,
        k=12,
    )
    assert [("Kullen", 12, {"tenant": 7})] == source.queries


def test_captured_chunks_are_not_searched_for_again() -> None:
    """What the pipeline retrieved is taken as it is."""
    source = ListSource(RANKED)
    planned(PROMPT, told(), source)
    assert source.queries == []


def test_a_store_ranks_the_parts_of_captured_documents() -> None:
    """Where the pipeline stuffs whole documents, the store's chunks tell which parts to read."""
    source = ListSource(RANKED)
    plan = planned(PROMPT, told(chunks=(Chunk(CONTEXT),)), source)
    assert [system(f"Be brief.\n\n{joined([FACTS[1], FACTS[4]])}"), human(QUESTION)] == plan.drafter
    assert "store" == plan.chunk_source


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gate_tokens": 4096}, "fewer than gate_tokens=4096"),
        ({"gate_share": 0.1}, "over gate_share=0.1"),
    ],
)
def test_the_gates_say_why_there_is_no_drafter_prompt(
    options: dict[str, object], reason: str
) -> None:
    """A prompt that is too short, or hardly gets shorter, is drafted from as it is."""
    plan = planned(PROMPT, told(), **options)
    assert plan.drafter is None
    assert reason in str(plan.off_reason)


def test_many_short_messages_have_nothing_to_shorten() -> None:
    """A long chat of short turns stays whole."""
    plan = planned([human("How are you?"), assistant("Fine, thank you.")] * 40 + [human(QUESTION)])
    assert (None, "the prompt has no long part that could be shortened") == (
        plan.drafter,
        plan.off_reason,
    )


def test_a_short_prompt_is_not_searched_for() -> None:
    """Behind a closed gate no time is spent in the store."""
    source = ListSource(RANKED)
    planned(PROMPT, source=source, gate_tokens=4096)
    assert source.queries == []


def test_without_a_reader_there_is_no_drafter_prompt() -> None:
    """Without a drafter that reads prompts there is no search, no prompt and no reason."""
    source = ListSource(RANKED)
    plan = planned(PROMPT, source=source, wants=False)
    assert ([], None, None) == (source.queries, plan.drafter, plan.off_reason)


def test_code_fences_stay_whole() -> None:
    """A code block in a long prompt is read whole or not at all."""
    code = "```python\ndef kullen_planner():\n\n    return 'Magnus'\n\n```\n"
    prose = "\n\n".join(
        f"Paragraph {i} tells a long story about something else entirely." for i in range(30)
    )
    plan = planned(f"{prose}\n\n{code}\n{prose}\n\nQuestion: what does kullen_planner return?")
    assert code.strip() in plan.drafter


def test_the_input_is_not_changed() -> None:
    """Neither the messages nor their order are touched."""
    prompt = copy.deepcopy(PROMPT)
    plan = planned(prompt, told())
    assert PROMPT == prompt
    assert plan.drafter is not prompt
    assert prompt[1] is plan.drafter[1]


def test_unknown_fields_of_messages_are_kept() -> None:
    """Names, ids and tool calls travel along."""
    prompt = [{**PROMPT[0], "name": "rules", "cache": True}, PROMPT[1]]
    plan = planned(prompt, told())
    assert ("rules", True) == (plan.drafter[0]["name"], plan.drafter[0]["cache"])


def test_the_pieces_of_the_prompt_are_its_chunks() -> None:
    """Without a store, the pieces that the drafter reads are reported, best first."""
    plan = planned(PROMPT)
    assert "prompt" == plan.chunk_source
    assert FACTS[4] == plan.chunks[0].text
    assert list(range(len(plan.chunks))) == [c.rank for c in plan.chunks]
