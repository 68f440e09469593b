"""Modes choose among prompts and answers; what they return is one of a pipeline's own answers."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from fakes_prompting import FACTS, QUESTION, RANKED, ListSource
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, PromptHints, SamplingParams
from rasd_integrations.config import RetrievalConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.decoding.scoring import scores
from rasd_integrations.decoding.steps import FixedSteps
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError, DecodingError
from rasd_integrations.langchain import ChatRASD
from rasd_integrations.response_format import Grammar
from rasd_integrations.runtime.modes import (
    Mode,
    Plain,
    RewardGuided,
    Route,
    SpeculativeRAG,
    mode_name,
    mode_of,
)
from rasd_integrations.stats import DecodingStats

DOCUMENT = " ".join(FACTS) + " " + "The list was printed in the harbour office of Arkona. " * 20
STORE = ListSource(RANKED, [replace(RANKED[0], text=DOCUMENT, id="whole")])
CONTEXT = "\n\n".join(FACTS[:6])
PROMPT = f"Answer from the context.\n\n{CONTEXT}\n\nQuestion: {QUESTION}\nAnswer:"
HINTS = PromptHints(question=QUESTION, chunks=RANKED[:6], context=CONTEXT)
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)


def made(**options):
    model = tiny_llama(max_position_embeddings=16384)
    return RASD.from_model(model, tiny_tokenizer(), store=STORE, memory=False, **options)


@pytest.fixture(scope="module")
def short():
    """The answer to the prompt as sent."""
    return made().generate(PROMPT, PARAMS, hints=HINTS)


@pytest.fixture(scope="module")
def whole():
    """The answer to the whole document."""
    answer = made(context="documents").generate(PROMPT, PARAMS, hints=HINTS)
    assert answer.stats.prompt_tokens > 2000
    return answer


def asked(rasd, question=QUESTION, params=PARAMS):
    prompt = PROMPT.replace(QUESTION, question)
    return rasd.generate(prompt, params, hints=replace(HINTS, question=question))


# --- route ---


def test_an_answer_that_is_trusted_is_that_of_the_prompt_as_sent(short, whole):
    """No document is read."""
    answer = asked(made(mode=Route(least_probability=0.0)))
    assert (answer.text, answer.token_ids) == (short.text, short.token_ids)
    assert answer.text != whole.text
    assert answer.stats.prompt_tokens == short.stats.prompt_tokens
    assert (answer.stats.route, answer.stats.generated_tokens) == ("prompt", 16)
    assert json.loads(json.dumps(answer.stats.as_dict()))["route_reason"].endswith("is likely")


def test_an_answer_in_doubt_is_made_again_from_the_documents(short, whole):
    """What the first one cost is counted, its tokens are not."""
    answer = asked(made(mode=Route(least_probability=1.0)))
    assert (answer.text, answer.stats.route) == (whole.text, "documents")
    assert "under least_probability=1" in answer.stats.route_reason
    assert answer.stats.prompt_tokens == short.stats.prompt_tokens + whole.stats.prompt_tokens
    assert answer.stats.generated_tokens == 16
    assert answer.stats.target_steps > 16 - answer.stats.accepted


def test_the_probability_is_the_geometric_mean_of_the_tokens(short):
    """By the model's own forward; just above it the answer is in doubt, just below it is not."""
    model = tiny_llama(max_position_embeddings=16384)
    prompt = tiny_tokenizer()(PROMPT)["input_ids"]
    ids = [*prompt, *short.token_ids]
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    chosen = rows[torch.arange(16), torch.tensor(short.token_ids)]
    mean = math.exp(float(chosen.mean()))
    assert asked(made(mode=Route(mean - 1e-3))).stats.route == "prompt"
    assert asked(made(mode=Route(mean + 1e-3))).stats.route == "documents"


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Summarise the list of lighthouses.", "Summarise"),
        ("How many of the lighthouses are older than Roker?", "How many of the"),
        ("Compare Kullen to Roker.", "Compare"),
        ("What is the difference between Kullen and Roker?", "difference between"),
        ("How does Kullen differ from Roker?", "differ from"),
        ("Who planned it?", None),
    ],
)
def test_questions_about_the_whole_go_to_the_documents(question, word):
    """Without an answer from the chunks first."""
    stats = asked(made(mode=Route(0.0)), question).stats
    assert stats.route == ("documents" if word else "prompt")
    assert word is None or repr(word) in stats.route_reason


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("The context does not mention who planned it.", "do not tell"),
        ("There is no information about Kullen.", "do not tell"),
        ("I don't know.", "do not tell"),
        ("It was planned by Magnus Dahlander, who did not live to see it.", None),
        ("Nothing came of it.", None),
    ],
)
def test_an_answer_that_refuses_is_in_doubt(text, says):
    """Whatever its probability."""
    told = DecodingStats(logprob=0.0, generated_tokens=5)
    doubt = Route().doubt("Who?", text, told)
    assert doubt is None if says is None else says in doubt


def test_without_documents_the_prompt_is_read():
    """A store that knows chunks only; a grammar too."""
    bare = RASD.from_model(
        tiny_llama(), tiny_tokenizer(), store=ListSource(RANKED), mode="route", memory=False
    )
    assert asked(bare).stats.route_reason == "no documents were found to read"
    bound = replace(PARAMS, grammar=Grammar("regex", "[a-z]{12}"))
    assert asked(made(mode="route"), params=bound).stats.route_reason == "a grammar or tools"


def test_a_stream_that_is_left_closes_both_answers():
    """Also before its first piece."""
    rasd = made(mode=Route(1.0))
    for pieces in (0, 1):
        stream = rasd.stream(PROMPT, PARAMS, hints=HINTS)
        for _ in range(pieces):
            next(stream)
        stream.close()
        cache = rasd._engine.decoder().prefix_cache
        assert [entry.in_use for entry in cache._entries if entry.in_use] == []


@pytest.mark.parametrize("mode", [Route(1.0), SpeculativeRAG(3)], ids=["route", "ranked"])
def test_a_consumer_that_leaves_ends_the_answers_that_are_not_shown(mode):
    """Within a step, also while nothing is to be seen of them yet."""
    rasd = made(mode=mode)
    steps, run = [], rasd._engine.decoder().target._turns._run
    rasd._engine.decoder().target._turns._run = lambda turns: steps.append(1) or run(turns)

    async def leave():
        stream = rasd.astream(PROMPT, replace(PARAMS, max_tokens=4000), hints=HINTS)
        async for delta in stream:
            assert delta.text == ""
            break
        await stream.aclose()

    asyncio.run(leave())
    time.sleep(0.2)
    seen = len(steps)
    time.sleep(0.3)
    assert len(steps) == seen < 1000


# --- Speculative RAG ---


def test_the_best_of_several_answers_is_returned():
    """Each is that of a prompt with its part of the chunks; scores are the model's own."""
    rasd = made(mode=SpeculativeRAG(subsets=3))
    answer = asked(rasd)
    candidates = answer.stats.candidates
    assert len(candidates) == 3
    assert answer.text == candidates[0].text
    assert [c.score for c in candidates] == sorted((c.score for c in candidates), reverse=True)
    parts = rasd._prompts("prompt").parts(PROMPT, HINTS, 3)
    plain = made()
    expected = {}
    for prompt, chunks in parts:
        assert [chunk.text in prompt for chunk in RANKED[:6]] == [c in chunks for c in RANKED[:6]]
        assert prompt.startswith("Answer from the context.")
        assert prompt.endswith(f"Question: {QUESTION}\nAnswer:")
        found = plain.generate(prompt, replace(PARAMS, scored=True))
        expected[found.text] = found.stats.logprob / 16
    assert {c.text: pytest.approx(c.own, abs=1e-4) for c in candidates} == expected
    assert json.loads(json.dumps(answer.stats.as_dict()))["candidates"][0]["text"] == answer.text
    assert answer.stats.prompt_tokens == sum(len(prompt.encode()) for prompt, _ in parts)


def test_one_chunk_is_one_answer(short):
    """Nothing to choose from: the prompt is answered."""
    rasd = made(mode="speculative-rag")
    answer = rasd.generate(PROMPT, PARAMS, hints=replace(HINTS, chunks=RANKED[:1], context=None))
    assert answer.text == short.text
    assert answer.stats.candidates == ()
    assert "fewer than two chunks" in answer.stats.route_reason


@pytest.mark.parametrize("steps", [None, FixedSteps])
def test_scores_are_those_of_the_models_own_forward(steps):
    """Of answers of different lengths that share a beginning, and an empty one."""
    model = tiny_llama()
    target = TargetModel(model)
    decoder = SpeculativeDecoder(target, steps=steps and steps(target))
    prompt, answers = list(range(5, 150)), [[7, 8, 9], [7, 8], [200] * 20, []]
    found = scores(decoder, prompt, answers)
    for answer, score in zip(answers, found, strict=True):
        if not answer:
            assert score == float("-inf")
            continue
        with torch.no_grad():
            rows = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        chosen = rows.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
        assert score == pytest.approx(float(chosen.mean()), abs=1e-4)
    assert scores(decoder, prompt, answers) == found  # with the prompt cached


@pytest.mark.parametrize(
    "mode",
    [
        Route(least_probability=0.0),
        Route(least_probability=1.0),
        SpeculativeRAG(subsets=3),
        RewardGuided(lambda step: 0.0, ends="e"),
        RewardGuided(lambda step: 1.0, ends="e"),
    ],
    ids=["prompt", "documents", "subsets", "target", "teacher"],
)
def test_the_answer_that_is_returned_has_its_log_probabilities(mode):
    """Of each of its tokens, and of no other answer's."""
    answer = asked(made(mode=mode), params=replace(PARAMS, top_logprobs=1))
    assert [one.token_id for one in answer.logprobs] == [*answer.token_ids]
    assert [one.top[0][0] for one in answer.logprobs] == [*answer.token_ids]  # greedy


# --- reward-guided steps ---

LONG = replace(PARAMS, max_tokens=40)


def endings(rasd, params=LONG):
    """Return a character that ends several steps of the plain answer."""
    text = asked(rasd, params=params).text
    counted = Counter(c for c in text[1:-1] if c.isascii() and c.isprintable() and c != " ")
    return next(c for c, n in counted.most_common() if 2 <= n <= 12)


def written(mode, **options):
    soon = RetrievalConfig(gate_tokens=64, chunk_tokens=64, max_share=0.3)
    return asked(made(mode=mode, retrieval=soon, **options), params=LONG)


def test_steps_that_are_never_kept_are_the_targets_answer():
    """Step by step the target writes what it writes in one go."""
    plain = asked(made(), params=LONG)
    ends = endings(made())
    answer = written(RewardGuided(lambda step: 0.0, ends=ends))
    assert (answer.text, answer.token_ids) == (plain.text, plain.token_ids)
    assert len(answer.stats.rewards) == plain.text[:-1].count(ends) + 1 > 2
    assert not any(reward.kept for reward in answer.stats.rewards)
    assert (answer.stats.mode, answer.stats.generated_tokens) == ("reward-guided", 40)


def test_steps_that_are_always_kept_are_the_teachers_answer():
    """What the model says on the short prompt of the chunks."""
    plain = asked(made(), params=LONG)
    answer = written(RewardGuided(lambda step: 1.0, ends=endings(made())))
    assert all(reward.kept for reward in answer.stats.rewards)
    assert answer.text != plain.text
    assert len(answer.token_ids) == 40
    seen = []
    again = written(RewardGuided(lambda step: seen.append(step) or 1.0, ends="\x00"))
    assert again.text == answer.text  # in one step
    assert (len(seen), seen[0].before, seen[0].prompt) == (1, "", PROMPT)


def test_each_step_goes_on_from_what_was_kept():
    """The next step, by either model, continues the text."""
    both = [written(RewardGuided(lambda step, n=n: n, ends="\x00")).text for n in (0.0, 1.0)]
    shared = Counter(both[0][2:-8]) & Counter(both[1][2:-8])
    ends, seen = next(c for c, _ in shared.most_common() if c.isprintable() and c != " "), []

    def scorer(step):
        seen.append((step.before, str(step)))
        return 1.0 if len(seen) % 2 else 0.0

    answer = written(RewardGuided(scorer, ends=ends))
    kept = [reward.kept for reward in answer.stats.rewards]
    assert kept == [n % 2 == 0 for n in range(len(kept))]
    assert len(kept) > 2
    for (before, step), (after, _) in pairwise(seen):
        assert after.startswith(before)
        assert after != before
        if after.startswith(before + step):
            assert ends in step
    assert answer.text.startswith(seen[-1][0])


def test_steps_of_the_target_follow_the_transfer_rule():
    """Written in steps, the answer is that of knowledge transfer; its bound counts tokens behind a step's end too."""
    soon = RetrievalConfig(gate_tokens=64, chunk_tokens=64, max_share=0.3)
    joined = asked(made(knowledge_transfer="mixture", retrieval=soon), params=LONG)
    ends = next(
        c
        for c, n in Counter(joined.text[1:-1]).most_common()
        if c.isprintable() and c != " " and n >= 2
    )
    answer = written(RewardGuided(lambda step: 0.0, ends=ends), knowledge_transfer="mixture")
    assert len(answer.stats.rewards) > 1
    assert answer.text == joined.text != asked(made(), params=LONG).text
    assert answer.stats.tv_bound >= joined.stats.tv_bound > 0


@pytest.mark.parametrize("drafting", [True, False])
def test_after_the_most_steps_the_target_writes(drafting):
    """The rest of the answer; scorers are asked no more. Without drafts too."""
    plain = asked(made(), params=LONG)
    mode = RewardGuided(lambda step: 0.0, ends=endings(made()), most_steps=1)
    options = {} if drafting else {"drafter": None}
    answer = written(mode, **options)
    assert (answer.text, len(answer.stats.rewards)) == (plain.text, 1)


def test_a_drafter_model_writes_the_steps():
    """Another model of the vocabulary, also on the target's own prompt where there are no chunks."""
    model = tiny_llama(max_position_embeddings=16384)
    rasd = RASD.from_model(
        model, tiny_tokenizer(), drafter_model=tiny_llama(9), mode=RewardGuided(lambda step: 1), memory=False,
    )  # fmt: skip
    alone = RASD.from_model(tiny_llama(9), tiny_tokenizer(), memory=False)
    assert rasd.generate("Once upon", LONG).text == alone.generate("Once upon", LONG).text


def test_a_runnable_scores():
    """A number, a text with one, or a message."""
    for said in (0.9, "reward: 0.9", AIMessage("0.9")):
        answer = written(RewardGuided(RunnableLambda(lambda step, said=said: said), ends="\x00"))
        assert [reward.value for reward in answer.stats.rewards] == [0.9]


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        (lambda step: 1 / 0, "failed: ZeroDivisionError"),
        (lambda step: "good", "must return a number"),
        (lambda step: None, "must return a number"),
    ],
    ids=["raises", "text", "nothing"],
)
def test_a_broken_scorer_is_an_error_of_ours(scorer, said):
    """With what it returned."""
    with pytest.raises(DecodingError, match=said):
        written(RewardGuided(scorer))


def test_without_chunks_there_is_nothing_to_judge():
    """The target would read twice what it reads; said in the statistics."""
    rasd = made(mode=RewardGuided(lambda step: 1.0))
    answer = rasd.generate("Once upon", PARAMS)
    assert answer.text == made().generate("Once upon", PARAMS).text
    assert "gate_tokens" in answer.stats.route_reason


# --- the option ---


def test_a_mode_is_named():
    """By a text or an object; settings name it, and mark an object."""
    assert mode_of("route", "prompt") == Route()
    assert mode_of(SpeculativeRAG(2), "prompt") == SpeculativeRAG(2)
    assert mode_of(None, "documents") == Plain("documents")
    assert [mode_name(mode) for mode in (None, "route", Plain("prompt"))] == [None, "route", None]
    assert mode_name(Route(0.7)) == "<mode: Route(least_probability=0.7)>"
    assert ChatRASD(model="m", mode=Route(0.7)).model_dump()["mode"] == mode_name(Route(0.7))
    assert RASD("a").identity != RASD("a", mode="route").identity


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "rout"}, "'route', 'speculative-rag'"),
        ({"mode": Route}, "mode is <class"),
        ({"mode": "<mode: Route(least_probability=0.7)>"}, "or a Mode"),
        ({"mode": "route", "context": "documents"}, "Leave context out"),
    ],
)
def test_what_is_no_mode_is_refused(options, said):
    """At construction."""
    with pytest.raises(ConfigurationError, match=said):
        RASD("a", **options)


@pytest.mark.parametrize(
    "make", [lambda: Route(1.5), lambda: SpeculativeRAG(1)], ids=["route", "subsets"]
)
def test_numbers_of_a_mode_have_ranges(make):
    """Named in the error."""
    with pytest.raises(ConfigurationError, match=r"is 1\.?5?, but must be"):
        make()


def test_explain_is_of_one_answer():
    """With a mode it is refused."""
    with pytest.raises(ConfigurationError, match="makes several answers"):
        made(mode="route").explain(PROMPT, PARAMS)


def test_a_mode_of_ones_own():
    """It gets pipelines and a request, and returns a pipeline's answer."""

    class Twice(Mode):
        def answer(self, pipelines, request, stats, gate):
            first = pipelines("prompt").answer(request, DecodingStats(), None)
            list(first)
            return pipelines("prompt").answer(request, stats, gate)

    assert asked(made(mode=Twice())).stats.cached_prompt_tokens > 0


def test_chains_of_both_frameworks_say_which_way_they_went():
    """In the metadata of the answer, streamed too."""
    llm = ChatRASD.from_model(
        tiny_llama(max_position_embeddings=16384), tiny_tokenizer(), store=STORE, mode="route",
        max_tokens=4, memory=False,
    )  # fmt: skip
    known = {"question": QUESTION, "chunks": list(FACTS[:6])}
    said = llm.invoke(PROMPT, rasd=known).response_metadata["rasd"]
    assert said["route"] in ("prompt", "documents")
    last = list(llm.stream(PROMPT, rasd=known))[-1]
    assert last.response_metadata["rasd"]["route"] == said["route"]
    from rasd_integrations.llama_index import RASDLLM

    other = RASDLLM.from_model(
        tiny_llama(), tiny_tokenizer(), store=STORE, mode="speculative-rag", max_tokens=4, memory=False,
    )  # fmt: skip
    raw = other.complete(PROMPT, rasd=known).raw["rasd"]
    assert len(raw["candidates"]) == 3
