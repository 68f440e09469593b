"""Knowledge transfer follows its rule's distribution, whatever is drafted, and reports how far that is."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from functools import cache

import fakes
import pytest
import torch
from drafting import filled, random_ids
from fakes import ScriptedDrafter
from fakes_distributions import distance, outcomes
from fakes_grammar import TableGrammar, banded
from fakes_transfer import NAMES, gain, stated, teacher_of
from tiny import FAMILIES, VOCAB, tiny_llama

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.decoding.steps import FixedSteps
from rasd_integrations.drafters import (
    CascadeDrafter,
    FusedDrafter,
    ModelDrafter,
    RecyclingDrafter,
    SuffixDrafter,
)
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError, DecodingError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.transfer import Mixture
from rasd_integrations.types import Draft, DraftContext

N = 24
GREEDY = SamplingParams(max_tokens=N, ignore_eos=True)
PROMPT = [*random_ids(60, seed=1), *random_ids(60, seed=1)[10:40]]
OWN = PROMPT[-30:]
CONTEXT = DraftContext(prompt_ids=(), drafter_prompt_ids=OWN)


@cache
def target_of(family: str = "llama") -> TargetModel:
    return TargetModel(FAMILIES[family]())


@cache
def other(vocab: int = VOCAB) -> TargetModel:
    return TargetModel(tiny_llama(9, vocab_size=vocab, eos_token_id=None))


def decoder_of(rule, target=None, drafter=None, n=4, *, teacher=None, **options):
    target = target or target_of()
    config = SpeculationConfig(num_draft_tokens=n, max_draft_tokens=64, knowledge_transfer=rule)
    return SpeculativeDecoder(
        target, drafter, config=config,
        teacher=teacher_of(target) if teacher is None else teacher, **options,
    )  # fmt: skip


def decode(rule, target=None, drafter=None, n=4, *, ids=PROMPT, params=GREEDY, context=CONTEXT,
           teacher=None, grammar=None, stats=None, **options):  # fmt: skip
    decoder = decoder_of(rule, target, drafter, n, teacher=teacher, **options)
    blocks = decoder.generate(ids, params, context=context, grammar=grammar, stats=stats)
    return [token for block in blocks for token in block.token_ids]


def logits_after(model: TargetModel, ids: list[int]) -> torch.Tensor:
    """Return the logits after the last of ``ids``, by one forward of the model itself."""
    return model.model(torch.tensor([ids])).logits[0, -1].double()


@torch.no_grad()
def expected_greedy(name: str, target: TargetModel, teacher: TargetModel, ids=PROMPT, own=OWN):
    """Return the answer token by token, and how many tokens the target would have chosen otherwise."""
    answer, gains, changed = [], [], 0
    for _ in range(N):
        p, q = (
            logits_after(model, [*prompt, *answer]).softmax(-1)
            for model, prompt in ((target, ids), (teacher, own))
        )
        token = int(stated(name, p, q, greedy=True, gains=gains).argmax())
        changed += token != int(p.argmax())
        answer.append(token)
        gains.append(gain(p, q, token))
    return answer, changed


@cache
def known(name: str, family: str = "llama") -> tuple[list[int], int]:
    return expected_greedy(name, target_of(family), target_of(family))


def drafters(truth):
    """Yield drafters of every kind for an answer that is known."""
    yield "none", None
    yield "oracle", ScriptedDrafter(fakes.oracle(truth))
    yield "wrong", ScriptedDrafter(fakes.always_wrong(truth, VOCAB))
    yield "empty", ScriptedDrafter(fakes.empty())
    yield "too long", ScriptedDrafter(fakes.too_long(truth))
    yield "random", ScriptedDrafter(fakes.random_tokens(VOCAB))
    yield "tree", ScriptedDrafter(fakes.as_tree(fakes.partly_right(truth, VOCAB), VOCAB))
    yield "auto", FusedDrafter([SuffixDrafter(tree=True), RecyclingDrafter(prompt=False)])
    yield "self", CascadeDrafter(ModelDrafter(target_of(), confidence=0.0), SuffixDrafter())


@pytest.mark.parametrize("n", [0, 1, 4, 16, None])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_the_rules_whatever_is_drafted(name, n):
    """The arg max of the stated distribution at each token, for every drafter, chains and trees."""
    truth, changed = known(name)
    assert changed > 0
    for kind, drafter in drafters(truth):
        stats = DecodingStats()
        got = decode(name, drafter=drafter, n=n, stats=stats)
        assert (kind, got) == (kind, truth)
        assert (stats.tv_bound, stats.mode) == (changed, "knowledge_transfer")
        assert stats.changed_share == pytest.approx(changed / N)
        assert (stats.faults, stats.transfer_off_reason) == ((), None)
        assert stats.accepted > 0 or kind != "oracle" or n in (0, None)


@pytest.mark.parametrize("family", ["gemma3", "mistral", "gpt2"])
def test_other_families_follow_the_rule_too(family):
    """Windows and learned positions, with trees."""
    truth, _ = known("cautious", family)
    tree = ScriptedDrafter(fakes.as_tree(fakes.partly_right(truth, VOCAB), VOCAB))
    assert decode("cautious", target_of(family), tree) == truth


@pytest.mark.parametrize("vocab", [VOCAB - 3, VOCAB, VOCAB + 13])
def test_another_model_teaches(vocab):
    """Of another size of vocabulary, which is cropped or padded; without a prompt of its own it reads the target's."""
    model = other(vocab)
    teacher = teacher_of(model, VOCAB, own_prompt=False)

    @torch.no_grad()
    def rows(ids):
        row = logits_after(model, ids)[:VOCAB]
        return torch.nn.functional.pad(row, (0, VOCAB - len(row)), value=float("-inf"))

    for context, own in ((CONTEXT, OWN), (DraftContext(prompt_ids=()), PROMPT)):
        answer: list[int] = []
        with torch.no_grad():
            for _ in range(N):
                p = logits_after(target_of(), [*PROMPT, *answer]).softmax(-1)
                joint = stated("mixture", p, rows([*own, *answer]).softmax(-1), greedy=True)
                answer.append(int(joint.argmax()))
        drafter = ScriptedDrafter(fakes.partly_right(answer, VOCAB))
        assert decode("mixture", drafter=drafter, teacher=teacher, context=context) == answer


@pytest.mark.slow
def test_a_hundred_answers_for_every_draft_length():
    """Random prompts; draft lengths 0, 1, 4 and 16, trees and chains, all the same text."""
    for seed in range(100):
        ids, own = random_ids(40, seed=seed), random_ids(25, seed=1000 + seed)
        name = NAMES[seed % len(NAMES)]
        context = DraftContext(prompt_ids=(), drafter_prompt_ids=own)
        short = replace(GREEDY, max_tokens=12)
        truth = decode(name, n=0, ids=ids, params=short, context=context)
        plain = decode(None, n=0, ids=ids, params=short, context=context)
        for n in (1, 4, 16):
            tree = ScriptedDrafter(fakes.as_tree(fakes.partly_right(truth, VOCAB, seed), VOCAB))
            for drafter in (tree, ScriptedDrafter(fakes.random_tokens(VOCAB, seed))):
                assert (
                    seed,
                    decode(name, None, drafter, n, ids=ids, params=short, context=context),
                ) == (seed, truth)
                assert decode(None, None, drafter, n, ids=ids, params=short, context=context) == plain  # fmt: skip


# --- sampled answers ---

SMALL = random_ids(40, seed=3, vocab=3)
TEMPERATURE = 1.5


@cache
def small(seed: int) -> TargetModel:
    return TargetModel(tiny_llama(seed, vocab_size=3, eos_token_id=None))


@cache
@torch.no_grad()
def sampled_distribution(name: str, temperature: float) -> dict[tuple[int, ...], float]:
    """Return the probabilities of all answers of three tokens; the temperature applies to the joint distribution."""
    expected = {}
    for ids in itertools.product(range(3), repeat=3):
        chance, gains = 1.0, []
        for i, token in enumerate(ids):
            p, q = (
                logits_after(small(seed), [*prompt, *ids[:i]]).softmax(-1)
                for seed, prompt in ((4, SMALL), (5, SMALL[-12:]))
            )
            joint = stated(name, p, q, greedy=False, gains=gains) ** (1 / temperature)
            chance *= float(joint[token] / joint.sum())
            gains.append(gain(p, q, token))
        expected[ids] = chance
    return expected


SAMPLED_DRAFTERS = {
    "none": lambda: None,
    "tree": lambda: ScriptedDrafter(lambda answer, budget: Draft((1, 2, 0), (-1, -1, 0))),
    "a chain that is drawn": lambda: ModelDrafter(small(6), confidence=0.0),
}


SAMPLED = [
    pytest.param(name, kind, temperature, marks=[pytest.mark.slow] if "drawn" in kind else [])
    for name in ("confidence", "cautious", "agreement:1", "mixture:0.75", "rapid")
    for kind in SAMPLED_DRAFTERS
    for temperature in (1.0, TEMPERATURE)
    if "drawn" not in kind
    or (name in ("confidence", "agreement:1", "rapid") and temperature == TEMPERATURE)
]


@pytest.mark.parametrize(("name", "kind", "temperature"), SAMPLED)
def test_sampled_answers_follow_the_rule(name, kind, temperature, oracle):
    """By enumeration of every draw, the drafter's own included: three tokens, exactly."""
    expected = sampled_distribution(name, temperature)
    teacher = teacher_of(small(5), own_prompt=True)
    context = DraftContext(prompt_ids=(), drafter_prompt_ids=SMALL[-12:])
    params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=temperature, seed=1)
    cached = PrefixCache(1 << 22)

    def answer():
        ids = decode(
            name, small(4), SAMPLED_DRAFTERS[kind](), 2, ids=SMALL, params=params,
            context=context, teacher=teacher, prefix_cache=cached,
        )  # fmt: skip
        return tuple(ids)

    found = defaultdict(float, outcomes(oracle, answer))
    assert min(expected.values()) > 1e-4
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["confidence", "agreement:1", "rapid"])
def test_the_reported_distance_is_the_total_variation(name):
    """Of the distributions that are drawn from, summed over the answer's tokens."""
    params = SamplingParams(
        max_tokens=6, ignore_eos=True, temperature=0.7, top_k=5, top_p=0.9, seed=5
    )
    stats = DecodingStats()
    ids = decode(name, n=3, params=params, drafter=SuffixDrafter(), stats=stats)
    total, gains = 0.0, []
    for i, token in enumerate(ids):
        with torch.no_grad():
            p, q = (
                logits_after(target_of(), [*prompt, *ids[:i]]).softmax(-1)
                for prompt in (PROMPT, OWN)
            )
        drawn = [truncated(d) for d in (stated(name, p, q, greedy=False, gains=gains), p)]
        gains.append(gain(p, q, token))
        total += 0.5 * float((drawn[0] - drawn[1]).abs().sum())
    assert stats.tv_bound == pytest.approx(total, abs=1e-4)
    assert 0 < stats.changed_share < 1


def truncated(probs: torch.Tensor) -> torch.Tensor:
    """Return ``probs`` at temperature 0.7, of the 5 most likely, of those the nucleus of 0.9."""
    probs = probs ** (1 / 0.7)
    probs = torch.where(probs >= probs.topk(5).values[-1], probs, 0.0)
    probs = probs / probs.sum()
    ranked, order = probs.sort(descending=True)
    probs[order[(ranked.cumsum(0) - ranked) >= 0.9]] = 0.0
    return probs / probs.sum()


# --- at the edges ---


@pytest.mark.parametrize("rule", [None, "none", Mixture(1.0), "rapid:0"])
def test_nothing_transferred_is_plain_decoding(rule):
    """No rule, and rules of no strength."""
    stats = DecodingStats()
    assert decode(rule, drafter=SuffixDrafter(), stats=stats) == decode(None)
    assert stats.tv_bound == (None if rule in (None, "none") else 0.0)


def test_without_a_prompt_of_its_own_the_answer_is_the_targets():
    """On the target's own prompt the target says what it says; the reason is given."""
    stats = DecodingStats(transfer_off_reason="the prompt asks no question that could be found")
    got = decode("cautious", context=DraftContext(prompt_ids=()), stats=stats)
    assert got == decode(None)
    assert stats.tv_bound == 0.0
    assert (
        stats.as_dict()["transfer_off_reason"] == "the prompt asks no question that could be found"
    )


def test_a_prompt_beyond_the_teachers_window_is_not_read():
    """Said with both numbers."""
    small_window = TargetModel(tiny_llama(9, max_position_embeddings=20))
    stats = DecodingStats()
    assert decode("mixture", teacher=teacher_of(small_window), stats=stats) == decode(None)
    assert "30 tokens, and its window 20" in stats.transfer_off_reason


@pytest.mark.parametrize("n", [0, 1, 4, 16])
def test_a_full_window_ends_the_transfer_at_the_same_token(n):
    """Whatever the draft length: afterwards the answer is the target's."""
    model = TargetModel(tiny_llama(9, max_position_embeddings=40))
    truth = decode("mixture", n=0, teacher=teacher_of(model))
    stats = DecodingStats()
    drafter = ScriptedDrafter(fakes.partly_right(truth, VOCAB))
    assert decode("mixture", drafter=drafter, n=n, teacher=teacher_of(model), stats=stats) == truth
    assert stats.transfer_off_reason == "the teacher's window is full"
    assert truth[:11] == decode("mixture", n=0, teacher=teacher_of(other()))[:11]
    rest = decode(None, ids=[*PROMPT, *truth[:11]], params=replace(GREEDY, max_tokens=N - 11))
    assert truth[11:] == rest


def test_the_teachers_cache_equals_a_fresh_one():
    """At the end its keys and values are those of one forward over its prompt and the answer."""
    teacher = teacher_of(other(), cache=1 << 24)
    truth = decode("mixture", n=0, teacher=teacher_of(other()))
    tree = ScriptedDrafter(fakes.as_tree(fakes.partly_right(truth, VOCAB), VOCAB))
    assert decode("mixture", drafter=tree, n=9, teacher=teacher) == truth
    (entry,) = teacher.cache._entries
    ids = [*OWN, *truth][: entry.buffer.length]
    assert len(ids) == len(OWN) + N - 1
    fresh = filled(other(), ids)
    for layer in range(fresh.num_layers):
        pairs = zip(
            entry.buffer.rows(layer, 0, len(ids)), fresh.rows(layer, 0, len(ids)), strict=True
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
    assert decode("mixture", teacher=teacher) == truth  # from the cache


def test_two_streams_take_turns():
    """Each gives what it gives alone, with one teacher's cache for both."""
    decoder = decoder_of("mixture", drafter=SuffixDrafter(), prefix_cache=PrefixCache(1 << 22))
    prompts = [PROMPT, random_ids(50, seed=8)]
    alone = [decode("mixture", ids=ids) for ids in prompts]
    seen: list[list[int]] = [[], []]
    streams = [decoder.generate(ids, GREEDY, context=CONTEXT) for ids in prompts]
    for blocks in itertools.zip_longest(*streams):
        for block, out in zip(blocks, seen, strict=True):
            out += block.token_ids if block is not None else ()
    assert seen == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_grammar_is_kept(temperature):
    """Neither model's forbidden tokens are written; forced ones come with the draft."""
    params = replace(GREEDY, temperature=temperature, seed=3)
    make = lambda: TableGrammar(banded, VOCAB)  # noqa: E731
    truth = decode("mixture", n=0, params=params, grammar=make())
    assert all(token in banded(tuple(truth[:i])) for i, token in enumerate(truth))
    for drafter in (SuffixDrafter(), FusedDrafter([SuffixDrafter(tree=True)])):
        assert decode("mixture", drafter=drafter, params=params, grammar=make()) == truth
    assert truth != decode(None, params=params, grammar=make())


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_penalties_apply_to_both_models(penalty):
    """As without transfer: each model's logits are processed before they are joined."""
    params = replace(GREEDY, **penalty)
    truth = decode("mixture", n=0, params=params)
    tree = ScriptedDrafter(fakes.as_tree(fakes.partly_right(truth, VOCAB), VOCAB))
    assert decode("mixture", drafter=tree, n=6, params=params) == truth
    assert truth != decode("mixture", n=0)
    pairs_seen = list(itertools.pairwise([*PROMPT, *truth]))[len(PROMPT) - 1 :]
    assert len(set(pairs_seen)) == len(pairs_seen) or "repetition_penalty" in penalty


def test_a_rule_of_ones_own_sees_the_context():
    """Distributions of each row, what was answered, and what was drafted before the row."""
    truth, _ = known("mixture")
    seen = []

    def rule(p, q, state):
        assert p.shape == q.shape == (len(state.drafted), VOCAB)
        seen.extend((*state.answer, *path) for path in state.drafted)
        assert state.temperature == 0
        return (p + q) / 2

    tree = ScriptedDrafter(fakes.as_tree(fakes.oracle(truth), VOCAB))
    assert decode(rule, drafter=tree) == truth
    assert {tuple(truth[:i]) for i in range(N)} <= set(seen)


def test_a_rule_sees_how_likely_both_models_thought_the_last_tokens():
    """The last 32 on the way to each row, whatever was drafted there."""
    params, seen = replace(GREEDY, max_tokens=44), {}

    def rule(p, q, state):
        for path, gains in zip(state.drafted, state.gains, strict=True):
            seen[(*state.answer, *path)] = gains
        return p

    truth = decode(None, n=0, params=params)
    tree = ScriptedDrafter(fakes.as_tree(fakes.partly_right(truth, VOCAB), VOCAB))
    assert decode(rule, drafter=tree, params=params) == truth
    wrong = [ids for ids in seen if ids != tuple(truth[: len(ids)])]
    assert len(wrong) > 5
    for ids in [*wrong, *(tuple(truth[:i]) for i in range(44))]:
        with torch.no_grad():
            p, q = (
                target_of().model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
                for prompt in (PROMPT, OWN)
            )
        ratio = p.double().log_softmax(-1) - q.double().log_softmax(-1)
        expected = ratio[range(len(ids)), list(ids)][-32:]
        torch.testing.assert_close(
            torch.tensor(seen[ids], dtype=torch.float64), expected, atol=1e-3, rtol=0
        )
    assert known("agreement:1") != known("confidence")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda p, q, state: p[:, :5], "returned shape"),
        (lambda p, q, state: p - 1, "negative or NaN"),
        (lambda p, q, state: p * float("nan"), "negative or NaN"),
        (lambda p, q, state: 1 / 0, "failed: ZeroDivisionError"),
        (lambda p, q, state: "p", "failed: AttributeError"),
        (lambda p, q, state: p * 0, "No token"),
    ],
    ids=["shape", "negative", "NaN", "raises", "no tensor", "empty"],
)
def test_a_broken_rule_is_an_error_of_ours(rule, said):
    """It says what is wrong; the decoder goes on with other answers."""
    decoder = decoder_of("mixture", drafter=SuffixDrafter(), prefix_cache=PrefixCache(1 << 22))
    broken = replace(decoder.config, knowledge_transfer=rule)
    with pytest.raises(DecodingError, match=said):
        list(decoder.generate(PROMPT, GREEDY, context=CONTEXT, config=broken))
    blocks = decoder.generate(PROMPT, GREEDY, context=CONTEXT)
    assert [t for b in blocks for t in b.token_ids] == known("mixture")[0]


def test_a_decoder_without_a_teacher_refuses_the_option():
    """At the call, not in its middle."""
    config = SpeculationConfig(knowledge_transfer="cautious")
    with pytest.raises(ConfigurationError, match="no teacher"):
        SpeculativeDecoder(target_of(), config=config).generate(PROMPT, GREEDY)


def test_a_teacher_that_is_not_a_number_is_ignored():
    """NaN in its logits leaves the target's own distribution, at distance 0."""
    model = tiny_llama(9)
    teacher, stats = teacher_of(TargetModel(model)), DecodingStats()
    model.model.norm.weight.data[:] = float("nan")
    assert decode("mixture", teacher=teacher, stats=stats) == decode(None)
    assert stats.tv_bound == 0.0


@pytest.mark.parametrize("rule", ["cautious", "agreement:1"])
def test_fixed_steps_give_the_same_bits(rule):
    """With deterministic steps of both models a draft changes no bit, in bfloat16 either."""
    target = TargetModel(tiny_llama().to(torch.bfloat16))
    steps = FixedSteps(target)
    teacher = replace(teacher_of(target), steps=steps)
    params = replace(GREEDY, temperature=0.8, seed=2)
    texts = [
        decode(rule, target, drafter, n, params=params, teacher=teacher, steps=steps)
        for n in (0, 1, 7)
        for drafter in (SuffixDrafter(), ScriptedDrafter(fakes.random_tokens(VOCAB)))
    ]
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("limit", [1, 64])
def test_a_step_without_a_draft_is_one_forward(limit, monkeypatch):
    """Of both texts, where one model reads both and may batch; the answer is the same."""
    target = TargetModel(tiny_llama())
    target.max_batch_rows = limit
    forwards, run = [], target._turns._run
    monkeypatch.setattr(target._turns, "_run", lambda turns: forwards.append(turns) or run(turns))
    assert decode("mixture", target, n=0) == known("mixture")[0]
    widths = [[work.segment.rows for work in works] for turns in forwards for works in turns]
    prefills, steps = widths[:2], widths[2:]
    assert prefills == [[len(PROMPT) - 1], [len(OWN) - 1]]
    assert steps == ([[1, 1]] * N if limit > 1 else [[1]] * 2 * N)


def test_a_batch_that_fails_is_run_one_by_one():
    """As the queue does with the steps of several answers."""
    target = TargetModel(tiny_llama())
    run = target._turns._run

    def fails(turns):
        if any(len(works) > 1 for works in turns):
            msg = "no"
            raise RuntimeError(msg)
        return run(turns)

    target._turns._run = fails
    assert decode("mixture", target, n=0) == known("mixture")[0]


def test_an_answer_that_is_left_returns_the_teachers_buffer():
    """Closing the stream releases both leases."""
    decoder = decoder_of("mixture", prefix_cache=PrefixCache(1 << 22))
    stream = decoder.generate(PROMPT, GREEDY, context=CONTEXT)
    next(block for block in stream if block.token_ids)
    stream.close()
    caches = decoder.prefix_cache, decoder.teacher.cache
    assert [entry.in_use for cached in caches for entry in cached._entries] == [False, False]
