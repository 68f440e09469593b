"""The model drafter and its cascade: lossless for the target, token for token the drafter's own answer."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, VOCAB, tiny_llama

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import DraftContext, TokenBlock

NUM_TOKENS = 32
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT = random_ids(60, seed=1)
SHORT = PROMPT[30:]


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel(tiny_llama())


def drafters(model: TargetModel, **options: object) -> dict[str, object]:
    alone = ModelDrafter(model, **options)
    return {"model": alone, "cascade": CascadeDrafter(alone, SuffixDrafter())}


def decode(target, drafter=None, params=GREEDY, n=4, short=None, stats=None, config=None):
    config = config or SpeculationConfig(num_draft_tokens=n)
    decoder = SpeculativeDecoder(target, drafter, config=config)
    context = DraftContext(prompt_ids=(), drafter_prompt_ids=short)
    blocks = decoder.generate(PROMPT, params, context=context, stats=stats)
    return [t for b in blocks for t in b.token_ids]


@pytest.mark.parametrize("kind", ["model", "cascade"])
@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize("seed", [0, 7], ids=["self", "other"])
@pytest.mark.parametrize("short", [None, SHORT], ids=["same-prompt", "short-prompt"])
def test_greedy_ids_equal_plain_decoding(target, kind, n, seed, short):
    """Whatever model drafts from whatever prompt, the ids are the target's."""
    model = target if seed == 0 else TargetModel(tiny_llama(seed))
    assert decode(target, drafters(model)[kind], n=n, short=short) == decode(target)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_self_drafts_on_the_same_prompt_are_accepted_whole(family):
    """A drafter that reads what the target reads is always right."""
    target = TargetModel(FAMILIES[family]())
    stats = DecodingStats()
    decode(target, ModelDrafter(target, confidence=0.0), n=7, stats=stats)
    assert stats.acceptance_rate == 1.0
    assert stats.target_steps == 4


@pytest.mark.parametrize("kind", ["model", "cascade"])
def test_the_target_itself_needs_a_prompt_of_its_own(target, kind):
    """On the target's own prompt the target does not draft."""
    stats = DecodingStats()
    drafter = drafters(target, needs_own_prompt=True)[kind]
    assert decode(target, drafter, stats=stats) == decode(target)
    assert "model" not in stats.drafters


def proposals(drafter, context, answer, budget):
    """Return the drafts for an answer that is committed in blocks of 3."""
    session = drafter.start(context)
    out = []
    for start in range(0, len(answer) - 3, 3):
        out.append(session.propose(budget))
        session.observe(TokenBlock(tuple(answer[start : start + 3])))
    session.close()
    return out, getattr(session, "forwards", 0)


@pytest.mark.parametrize("right", [True, False], ids=["accepted", "rejected"])
def test_cascade_drafts_what_the_model_alone_drafts(right):
    """Greedy, the helper changes the number of forwards and nothing else."""
    model = TargetModel(tiny_llama(3))
    both = drafters(model, confidence=0.0)
    context = DraftContext(prompt_ids=SHORT * 3)
    answer = decode(model, params=SamplingParams(max_tokens=30, ignore_eos=True))
    answer = answer if right else random_ids(30, seed=9)
    alone, forwards_alone = proposals(both["model"], context, answer, 6)
    helped, forwards_helped = proposals(both["cascade"], context, answer, 6)
    assert [d.token_ids for d in alone] == [d.token_ids for d in helped]
    assert forwards_helped <= forwards_alone


def test_cascade_needs_fewer_forwards_on_repetitive_text():
    """Where the drafter copies, one forward checks several of its tokens."""
    model = TargetModel(tiny_llama(2))
    answer = decode(model, params=SamplingParams(max_tokens=90, ignore_eos=True))
    looping = [*PROMPT, *answer * 3]
    both = drafters(model, confidence=0.0)
    context = DraftContext(prompt_ids=PROMPT, chunk_ids=[looping])
    _, forwards_alone = proposals(both["model"], context, answer, 8)
    _, forwards_helped = proposals(both["cascade"], context, answer, 8)
    assert forwards_helped < 0.6 * forwards_alone


def test_confidence_stop_keeps_the_unlikely_token():
    """A token under the threshold ends the draft and stays in it."""
    model = TargetModel(tiny_llama())
    free = ModelDrafter(model, confidence=0.0).start(DraftContext(prompt_ids=PROMPT))
    chain = free.propose(12).token_ids
    strict = ModelDrafter(model, confidence=1.0).start(DraftContext(prompt_ids=PROMPT))
    assert strict.propose(12).token_ids == chain[:1]


def test_sampled_drafts_carry_their_distribution(target):
    """Each row of probs is a distribution, and the drafted token has mass in it."""
    context = DraftContext(prompt_ids=PROMPT, temperature=1.0, top_p=0.9, seed=4)
    draft = ModelDrafter(target, confidence=0.0).start(context).propose(6)
    assert draft.probs is not None
    assert draft.probs.shape == (6, VOCAB)
    torch.testing.assert_close(draft.probs.sum(-1), torch.ones(6))
    assert (draft.probs[torch.arange(6), torch.tensor(draft.token_ids)] > 0).all()


def test_padded_vocabularies_are_fitted(target):
    """A drafter with more or fewer rows drafts within the target's vocabulary."""
    for size in (VOCAB - 2, VOCAB + 13):
        model = TargetModel(tiny_llama(5, vocab_size=size))
        drafter = ModelDrafter(model, vocab_size=VOCAB, confidence=0.0)
        context = DraftContext(prompt_ids=PROMPT, temperature=1.0, seed=4)
        draft = drafter.start(context).propose(5)
        assert draft.probs is not None
        assert draft.probs.shape == (5, VOCAB)
        assert max(draft.token_ids) < VOCAB


def test_drafter_cache_is_true_after_rejections(target):
    """After blocks that contradict the draft, the next draft is that of a fresh session."""
    drafter = ModelDrafter(target, confidence=0.0)
    session = drafter.start(DraftContext(prompt_ids=PROMPT))
    answer: list[int] = []
    for block in (random_ids(1, 20), random_ids(4, 21), random_ids(9, 22)):
        session.propose(5)
        session.observe(TokenBlock(tuple(block)))
        answer += block
    fresh = drafter.start(DraftContext(prompt_ids=[*PROMPT, *answer]))
    assert session.propose(5).token_ids == fresh.propose(5).token_ids
