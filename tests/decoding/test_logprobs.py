"""Log-probabilities are those of the stock model's own forward over prompt and answer, whatever was drafted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import fakes
import pytest
import torch
from fakes import ScriptedDrafter
from fakes_grammar import TableGrammar, banded
from fakes_transfer import teacher_of
from steps import random_ids, shared_target
from tiny import FAMILIES, VOCAB, tiny_llama
from transformers import RepetitionPenaltyLogitsProcessor

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.decoding.steps import FixedSteps
from rasd_integrations.drafters import ModelDrafter
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import DraftContext

N, TOP = 24, 3
PROMPT = random_ids(24, 3)
GREEDY = SamplingParams(max_tokens=N, ignore_eos=True, top_logprobs=TOP)
SAMPLED = replace(GREEDY, temperature=0.8, top_k=20, seed=11)


def decoded(target, params=GREEDY, drafter=None, n=5, stats=None, rule=None, **options):
    """Return the tokens of an answer and what is reported of each."""
    steps, grammar = options.pop("steps", None), options.pop("grammar", None)
    config = SpeculationConfig(num_draft_tokens=n, max_draft_tokens=64, knowledge_transfer=rule)
    decoder = SpeculativeDecoder(
        target, drafter, config=config, steps=steps and steps(target), **options
    )
    context = DraftContext(prompt_ids=(), drafter_prompt_ids=PROMPT[-10:])
    blocks = list(decoder.generate(PROMPT, params, context=context, stats=stats, grammar=grammar))
    assert [len(b.token_ids) for b in blocks] == [len(b.logprobs) for b in blocks]
    ids = [token for block in blocks for token in block.token_ids]
    found = [one for block in blocks for one in block.logprobs]
    assert [one.token_id for one in found] == ids
    return ids, found


def forced(ids, family="llama"):
    """Return the stock model's log-probabilities at each place of an answer."""
    with torch.no_grad():
        rows = FAMILIES[family]()(torch.tensor([[*PROMPT, *ids]])).logits[0]
    return rows[len(PROMPT) - 1 : -1].log_softmax(-1)


def check(found, table, top=TOP):
    """Assert that what is reported is what ``table`` says."""
    for one, row in zip(found, table, strict=True):
        ids = [i for i, _ in one.top]
        best = row.topk(min(top, int((row > float("-inf")).sum()))).values.tolist()
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        assert [c for _, c in one.top] == pytest.approx(row[ids].tolist(), abs=1e-4)
        assert [c for _, c in one.top] == pytest.approx(best, abs=1e-4)
        assert len(set(ids)) == len(best)


@pytest.mark.parametrize(
    ("shape", "n"), [("chain", None), ("chain", 1), ("chain", 5), ("tree", None), ("tree", 6)]
)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_they_are_the_stock_models_own(family, params, shape, n):
    """Accepted drafts, the target's own tokens and the prefill's first one; temperature and top-k do not count."""
    target, stats = shared_target(family), DecodingStats()
    truth, plain = decoded(target, params, n=0)
    check(plain, forced(truth, family))
    propose = fakes.partly_right(truth, VOCAB)
    if shape == "tree":
        propose = fakes.as_tree(propose, VOCAB)
    ids, found = decoded(target, params, ScriptedDrafter(propose), n, stats)
    check(found, forced(ids, family))
    if n is not None:
        assert ids == truth
        assert 0 < stats.accepted < stats.drafted


@pytest.mark.parametrize("n", [2, 6])
def test_so_are_those_of_sampled_drafts(n):
    """A chain that a model sampled is verified as a block; the target's own distribution is reported."""
    drafter, stats = ModelDrafter(TargetModel(tiny_llama(seed=0))), DecodingStats()
    ids, found = decoded(shared_target(), SAMPLED, drafter, n, stats)
    check(found, forced(ids))
    assert stats.accepted > 0


def test_so_are_those_of_reproducible_steps():
    """They run tokens of a window again, which are reported once."""
    ids, found = decoded(TargetModel(tiny_llama()), steps=FixedSteps)
    check(found, forced(ids))


def test_a_step_that_ends_the_answer_reports_what_is_kept_of_it():
    """Drafted tokens behind the end token are neither reported nor summed."""
    truth, _ = decoded(shared_target())
    end = next(at for at in range(7, N) if truth.index(truth[at]) == at)
    target = TargetModel(tiny_llama(eos_token_id=truth[end]))
    params = replace(GREEDY, ignore_eos=False, scored=True)
    stats = DecodingStats()
    ids, found = decoded(target, params, ScriptedDrafter(fakes.oracle(truth)), N, stats)
    assert ids == truth[: end + 1]
    check(found, forced(ids))
    assert stats.logprob == pytest.approx(sum(one.logprob for one in found))


def test_penalties_count():
    """The distribution is the one that the answer follows, before temperature, top-k and top-p."""
    ids, found = decoded(shared_target(), replace(GREEDY, repetition_penalty=1.5))
    penalty = RepetitionPenaltyLogitsProcessor(1.5)
    with torch.no_grad():
        rows = tiny_llama()(torch.tensor([[*PROMPT, *ids]])).logits[0]
    whole = torch.tensor([[*PROMPT, *ids]])
    seen = range(len(PROMPT), len(PROMPT) + N)
    table = torch.cat([penalty(whole[:, :at], rows[None, at - 1]) for at in seen])
    check(found, table.log_softmax(-1))
    assert ids != decoded(shared_target())[0]


@pytest.mark.parametrize("n", [0, 5])
def test_what_a_grammar_forbids_is_no_alternative(n):
    """What it allows is shared out again; a forced token is certain and alone."""
    target, params = shared_target(), replace(GREEDY, top_logprobs=20)
    truth, _ = decoded(target, params, grammar=TableGrammar(banded, VOCAB))
    drafter = ScriptedDrafter(fakes.oracle(truth))
    ids, found = decoded(target, params, drafter, n, grammar=TableGrammar(banded, VOCAB))
    table = forced(ids)
    for place, row in enumerate(table):
        allowed = torch.zeros(VOCAB, dtype=torch.bool)
        allowed[banded(tuple(ids[:place]))] = True
        row[~allowed] = float("-inf")
    check(found, table.log_softmax(-1), top=20)
    assert Counter(len(one.top) for one in found) == {20: 20, 1: 4}
    assert [one.logprob for one in found if len(one.top) == 1] == [0.0] * 4


def test_knowledge_transfer_reports_the_joint_distribution():
    """The same whatever is drafted, and not the target's own."""
    target = shared_target()
    truth, plain = decoded(target, rule="mixture", n=0, teacher=teacher_of(target))
    drafter = ScriptedDrafter(fakes.oracle(truth))
    ids, found = decoded(target, drafter=drafter, rule="mixture", teacher=teacher_of(target))
    assert ids == truth
    assert [one.top[0][0] for one in found] == ids  # greedy by the joint distribution
    chances = [one.logprob for one in plain]
    assert [one.logprob for one in found] == pytest.approx(chances, abs=1e-4)
    own = forced(ids)[range(N), ids].tolist()
    assert chances != pytest.approx(own, abs=1e-2)


@pytest.mark.parametrize("top", [0, 1, 20])
def test_as_many_alternatives_as_asked_for(top):
    """None of them, or up to twenty."""
    ids, found = decoded(shared_target(), replace(GREEDY, top_logprobs=top))
    assert {len(one.top) for one in found} == {top}
    check(found, forced(ids), top)


def test_nothing_is_reported_unasked():
    """No distribution is computed for it."""
    blocks = SpeculativeDecoder(shared_target()).generate(
        PROMPT, replace(GREEDY, top_logprobs=None)
    )
    assert {block.logprobs for block in blocks} == {()}
