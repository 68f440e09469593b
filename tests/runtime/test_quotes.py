"""Quotes of a whole answer: which chunks count, when they are searched, and what it does not cost."""

from __future__ import annotations

import pytest
from fakes_prompting import FACTS, RANKED, ListSource, human
from scripted import scripted_model

from rasd_integrations import RASD, Chunk, PromptHints, RetrievalConfig, SamplingParams
from rasd_integrations.prompting import PromptPlan

ANSWER = f"As the text has it, {FACTS[4]} So it was Magnus, I think."
PROMPT = [human("\n\n".join([*FACTS, "Who planned the Kullen lighthouse?"]))]
HINTS = PromptHints(chunks=RANKED, chunk_source="retriever")
PARAMS = SamplingParams(max_tokens=400)
QUOTE = (20, 20 + len(FACTS[4]) - 1, FACTS[4][:-1], "fact-4", 0)


def saying(answer=ANSWER, **options):
    return RASD.from_model(*scripted_model(lambda prompt: answer), **options)


def facts(stats):
    return [(q.start, q.end, q.text, q.chunk_id, q.chunk_start) for q in stats.quotes]


@pytest.mark.parametrize("drafter", ["auto", "self", None])
def test_an_answer_names_what_it_quotes(drafter):
    """With every drafter and with none, of the chunks that the caller handed over."""
    found = saying(drafter=drafter).generate(PROMPT, PARAMS, hints=HINTS)
    assert facts(found.stats) == [QUOTE]
    assert found.stats.quotes[0].metadata == {"source": "towers.txt", "start_index": 4}
    plain = saying(drafter=drafter).generate(
        PROMPT, SamplingParams(max_tokens=400, drafting=False), hints=HINTS
    )
    assert facts(plain.stats) == [QUOTE]


async def test_the_last_piece_of_a_stream_has_the_quotes():
    """Only the last one, in both forms; the running sum of a model holds those of its last answer."""
    rasd = saying()
    deltas = list(rasd.stream(PROMPT, PARAMS, hints=HINTS))
    assert [bool(d.stats and d.stats.quotes) for d in deltas] == [False] * (len(deltas) - 1) + [
        True
    ]
    assert facts(deltas[-1].stats) == facts(rasd.stats) == [QUOTE]
    last = [d async for d in rasd.astream(PROMPT, PARAMS, hints=HINTS)][-1]
    assert facts(last.stats) == [QUOTE]


def test_an_answer_that_is_left_has_none():
    """A stream that is closed is not searched."""
    rasd = saying()
    stream = rasd.stream(PROMPT, PARAMS, hints=HINTS)
    next(stream)
    stream.close()
    assert rasd.stats.quotes == ()


@pytest.mark.parametrize("drafter", ["auto", None])
def test_a_chunk_that_the_model_has_not_read_is_not_named(drafter):
    """What was retrieved and left out of the prompt (a reranker, a budget) is no source."""
    chunks = (Chunk(FACTS[4], id="unread"), Chunk(FACTS[1], id="read"))
    found = saying(f"{FACTS[4]} {FACTS[1]}", drafter=drafter).generate(
        f"{FACTS[1]}\n\nWho planned what?", PARAMS, hints=PromptHints(chunks=chunks)
    )
    assert {quote.chunk_id for quote in found.stats.quotes} == {"read"}


def test_a_chunk_that_the_prompt_shows_otherwise_is_quoted_as_stored():
    """With line breaks that the template removed and other words in the middle; positions are the store's."""
    words = [f"word{i}" for i in range(40)]
    stored = "\n".join(words)
    shown = " ".join([*words[:20], "changed", *words[21:]])
    quoted = " ".join(words[2:9]) + " and " + "\n".join(words[30:36])
    hints = PromptHints(chunks=(Chunk(stored, id="c"),))
    found = saying(quoted).generate(f"{shown}\n\nWhat is said?", PARAMS, hints=hints)
    assert facts(found.stats) == [
        (len(quoted) - len("\n".join(words[30:36])), len(quoted), "\n".join(words[30:36]), "c", stored.index("word30"))
    ]  # fmt: skip


def test_thoughts_are_not_quoted():
    """Positions are those of the text that the reader sees."""
    answer = f"<think>\n{FACTS[1]}\n</think>\n\n{FACTS[4]}"
    model, tokenizer = scripted_model(lambda prompt: answer)
    tokenizer.chat_template += "{# <think></think> #}"
    found = RASD.from_model(model, tokenizer).generate(PROMPT, PARAMS, hints=HINTS)
    assert FACTS[1] in found.reasoning
    assert [(q.chunk_id, found.text[q.start : q.end]) for q in found.stats.quotes] == [
        ("fact-4", FACTS[4][:-1])
    ]


@pytest.mark.parametrize("policy", ["prompt", "any"])
def test_nothing_is_searched_for_quotes(policy):
    """Without a drafter the store is not asked, whatever it may be asked for drafts."""
    source = ListSource(RANKED)
    rasd = saying(drafter=None, store=source, retrieval=RetrievalConfig(store_policy=policy))
    for hints in (None, PromptHints(question="Who?"), HINTS):
        rasd.generate(PROMPT, PARAMS, hints=hints)
    assert source.queries == []
    assert facts(rasd.stats) == [QUOTE]


def test_what_the_store_was_searched_for_is_quoted():
    """Chunks found for a drafter's prompt count like those that a framework hands over."""
    small = RetrievalConfig(gate_tokens=60, chunk_tokens=16, gate_share=0.7)
    rasd = saying(drafter="self", store=ListSource(RANKED), retrieval=small)
    assert facts(rasd.generate(PROMPT, PARAMS).stats) == [QUOTE]


def test_pieces_of_a_prompt_are_no_source():
    """What a plan cut from the prompt itself was not retrieved, and nothing is claimed of it."""
    pieces = PromptPlan(target="", chunks=RANKED, chunk_source="prompt")
    assert pieces.quotable == ()
    assert PromptPlan(target="", chunks=RANKED, chunk_source="store").quotable == RANKED


def test_whole_documents_are_quoted_by_their_chunks():
    """With ``context="documents"`` the model reads more than the prompt's chunks, and may quote it."""
    parts = [Chunk(f, id=f"part-{i}", metadata={"source": "towers.txt", "start_index": 100 * i}) for i, f in enumerate(FACTS)]  # fmt: skip
    source = ListSource(parts[:1], documents=parts)
    rasd = saying(drafter=None, store=source, context="documents")
    found = rasd.generate([human(f"{FACTS[0]}\n\nWho planned the Kullen lighthouse?")], PARAMS)
    assert [quote.chunk_id for quote in found.stats.quotes] == ["part-4"]


def test_a_plan_without_a_drafter_tokenises_no_chunk(monkeypatch):
    """Chunks are token ids for drafters; quotes are found in their text."""
    rasd = saying(drafter=None)
    encoded = []
    template = rasd._engine.template()
    inner = type(template).encode_chunk
    monkeypatch.setattr(
        type(template), "encode_chunk", lambda self, text: encoded.append(text) or inner(self, text)
    )
    rasd.generate(PROMPT, PARAMS, hints=HINTS)
    assert not set(FACTS) & set(encoded)
