"""The model drafter and its cascade: lossless for the target, token for token the drafter's own answer."""

from __future__ import annotations

import pytest
from drafting import decode, random_ids
from tiny import FAMILIES, VOCAB, tiny_llama

from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import DraftContext, TokenBlock

PROMPT = random_ids(60, seed=1)


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel(tiny_llama())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_self_drafts_on_the_same_prompt_are_accepted_whole(family):
    """A drafter that reads what the target reads is always right."""
    target = TargetModel(FAMILIES[family]())
    stats = DecodingStats()
    decode(target, ModelDrafter(target, confidence=0.0), n=7, ids=PROMPT, stats=stats)
    assert stats.acceptance_rate == 1.0
    assert stats.target_steps == 4


@pytest.mark.parametrize("helped", [False, True])
def test_the_target_itself_needs_a_prompt_of_its_own(target, helped):
    """On the target's own prompt the target does not draft."""
    drafter, stats = ModelDrafter(target, needs_own_prompt=True), DecodingStats()
    if helped:
        drafter = CascadeDrafter(drafter, SuffixDrafter())
    assert decode(target, drafter, ids=PROMPT, stats=stats) == decode(target, ids=PROMPT)
    assert "model" not in stats.drafters


def test_an_end_token_ends_the_draft():
    """Nothing is drafted behind a token that ends an answer; it stays in the draft."""
    model = TargetModel(tiny_llama())
    context = DraftContext(prompt_ids=PROMPT)
    chain = ModelDrafter(model, confidence=0.0).start(context).propose(9).token_ids
    model.eos_ids = frozenset([chain[3]])
    ended = ModelDrafter(model, confidence=0.0).start(context).propose(9).token_ids
    assert ended == chain[: chain.index(chain[3]) + 1]


def test_confidence_stop_keeps_the_unlikely_token():
    """A token under the threshold ends the draft and stays in it."""
    model = TargetModel(tiny_llama())
    free = ModelDrafter(model, confidence=0.0).start(DraftContext(prompt_ids=PROMPT))
    chain = free.propose(12).token_ids
    strict = ModelDrafter(model, confidence=1.0).start(DraftContext(prompt_ids=PROMPT))
    assert strict.propose(12).token_ids == chain[:1]


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
