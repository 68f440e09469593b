"""Transfer rules are the distributions that they are named for, and the option says what it takes."""

from __future__ import annotations

import pytest
import torch
from fakes_transfer import NAMES, stated

from rasd_integrations.config import SpeculationConfig
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.transfer import (
    Agreement,
    Confidence,
    Mixture,
    Rapid,
    TransferState,
    rule_name,
    transfer_rule,
)

GREEDY, SAMPLED = TransferState(), TransferState(temperature=1.0)


def pairs(vocab: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distributions of target and teacher, with zeros here and there."""
    logits = torch.randn(2, 40, vocab, generator=torch.Generator().manual_seed(vocab)) * 2.5
    logits = logits.masked_fill(
        (logits < -2) & (logits < logits.amax(-1, keepdim=True)), float("-inf")
    )
    return tuple(logits.softmax(-1))


@pytest.mark.parametrize("state", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("vocab", [2, 3, 7, 300])
@pytest.mark.parametrize("name", NAMES)
def test_a_rule_is_the_distribution_that_its_source_states(name, vocab, state):
    """In float64, row by row, and it sums to one."""
    p, q = pairs(vocab)
    joint = transfer_rule(name)(p, q, state)
    expected = stated(name, p, q, greedy=state is GREEDY).float()
    torch.testing.assert_close(joint, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(joint.sum(-1), torch.ones(len(p)), atol=1e-5, rtol=0)
    assert (joint >= 0).all()


@pytest.mark.parametrize("state", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_two_models_that_agree_change_nothing(name, state):
    """The joint distribution of p and p is p."""
    p, _ = pairs()
    torch.testing.assert_close(transfer_rule(name)(p, p, state), p, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", [Mixture(1.0), Confidence(1.0), Rapid(0.0)], ids=str)
def test_a_neutral_strength_is_the_target(rule):
    """RAPID's acceptance keeps p as well: it recovers what it refuses."""
    p, q = pairs()
    for state in (GREEDY, SAMPLED):
        torch.testing.assert_close(rule(p, q, state), p, atol=1e-6, rtol=0)


def test_the_surer_model_has_the_larger_weight():
    """Equal entropies share; a uniform teacher of many tokens has next to nothing."""
    sure, unsure = torch.tensor([[0.99, 0.01, 0.0, 0.0]]), torch.full((1, 4), 0.25)
    with_target_sure = Confidence()(sure, unsure, GREEDY)[0, 0]
    with_teacher_sure = Confidence()(unsure, sure, GREEDY)[0, 0]
    torch.testing.assert_close(with_target_sure, with_teacher_sure)
    assert with_target_sure > 0.75
    flipped = sure[:, [1, 0, 2, 3]]
    torch.testing.assert_close(Confidence()(sure, flipped, GREEDY), (sure + flipped) / 2)
    cautious = Confidence(0.5)(unsure, flipped, GREEDY)
    assert (cautious - unsure).abs().sum() <= 0.5 * (flipped - unsure).abs().sum() + 1e-6


def test_the_model_that_foresaw_the_last_tokens_has_the_larger_weight():
    """Each row by its own tokens, the last of them most; without any as "confidence"."""
    p, q = (d[:4] for d in pairs())
    told = [(), (2.0,), (2.0, 0.0), (2.0, -3.0)]
    joint = Agreement(0.5, 0.5)(p, q, TransferState(gains=told))
    rows = [
        stated("agreement:0.5", p[i], q[i], greedy=True, gains=[past])
        for i, past in enumerate([0.0, 2.0, 1.0, -2.0])
    ]
    torch.testing.assert_close(joint, torch.stack(rows).float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(Agreement()(p, q, GREEDY), Confidence()(p, q, GREEDY))
    with pytest.raises(ConfigurationError, match=r"decay is 1.5, but must be in \[0, 1\]"):
        Agreement(decay=1.5)


@pytest.mark.parametrize("spec", [None, "none"])
def test_no_rule_is_lossless(spec):
    """Both ways to say so."""
    assert transfer_rule(spec) is None
    assert rule_name(spec) is None
    assert SpeculationConfig(knowledge_transfer=spec).lossless


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("confidence", Confidence(0.0)),
        ("cautious", Confidence(0.5)),
        ("cautious:0.6", Confidence(0.6)),
        ("agreement", Agreement(0.25, 0.8)),
        ("agreement:1", Agreement(1.0, 0.8)),
        ("mixture", Mixture(0.5)),
        ("mixture:0.75", Mixture(0.75)),
        ("rapid", Rapid(10.0)),
        ("rapid:20", Rapid(20.0)),
        (Rapid(3.0), Rapid(3.0)),
    ],
)
def test_a_rule_is_named(spec, rule):
    """By a text or an object; what settings hold names it again."""
    assert transfer_rule(spec) == rule == transfer_rule(rule_name(spec))
    assert not SpeculationConfig(knowledge_transfer=spec).lossless


@pytest.mark.parametrize("rule", [Rapid(10.0, guard=0.05), Agreement(decay=0.5), Mixture(1 / 3)])
def test_numbers_that_no_name_says_are_told_apart(rule):
    """Else a cache would give the answer of another rule."""
    assert rule_name(rule) == f"<transfer rule: {rule!r}>"
    with pytest.raises(ConfigurationError, match="<transfer rule: "):
        transfer_rule(rule_name(rule))


def mine(p, q, state):
    return q


def test_a_function_is_a_rule_and_settings_mark_it():
    """It cannot be read back, which the error then says by its text."""
    assert transfer_rule(mine) is mine
    assert rule_name(mine) == "<transfer rule: mine>"
    with pytest.raises(ConfigurationError, match="<transfer rule: mine>"):
        transfer_rule(rule_name(mine))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("cautios", "'confidence', 'cautious', 'agreement', 'mixture', 'rapid'"),
        (10.0, "give 'rapid:10.0'"),
        (0, "knowledge_transfer is 0, but must be None"),
        (True, "knowledge_transfer is True"),
        ("", "knowledge_transfer is ''"),
        (["rapid"], "knowledge_transfer is"),
        (Rapid, "knowledge_transfer is <class"),
        ("rapid:much", "behind the colon must be a number"),
        ("rapid:-1", "eta is -1.0, but must be at least 0"),
        ("rapid:nan", "eta is nan"),
        ("mixture:1.5", r"weight is 1.5, but must be in \[0, 1\]"),
        ("cautious:2", "least is 2.0"),
        ("agreement:-1", "strength is -1.0"),
        ("agreement:inf", "strength is inf"),
    ],
)
def test_what_is_no_rule_is_refused(spec, said):
    """With the value, what it may be, and what to give for RAPID's eta."""
    with pytest.raises(ConfigurationError, match=said):
        SpeculationConfig(knowledge_transfer=spec)


def test_guard_keeps_the_shift_from_tokens_the_teacher_thinks_little_of():
    """Where q is under a tenth of its maximum the odds to another such token stay those of p."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.9, 0.08, 0.02]])
    guarded = Rapid(10.0)(p, q, GREEDY)[0]
    assert guarded[1] / guarded[2] == pytest.approx(1.5)
    loose = Rapid(10.0, guard=0.05)(p, q, GREEDY)[0]
    assert loose[1] / loose[2] < 0.5
