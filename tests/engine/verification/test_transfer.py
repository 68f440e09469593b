"""Knowledge transfer follows its stated distribution, and reports how far that is from the target's."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import pytest
import torch
from fakes_distributions import Model, distance, outcomes, softmax

from rasd_integrations.engine.verification import transfer
from rasd_integrations.engine.verification.exact import Verdict
from rasd_integrations.engine.verification.transfer import (
    guarded_shift,
    mixture_verify,
    one_step_distribution,
    rapid_verify,
)
from rasd_integrations.errors import DecodingError
from rasd_integrations.types import Draft

PLAIN = (1.0, 1.0, 0)  # temperature, top_p, top_k
GREEDY = (0.0, 1.0, 0)
RULES = {
    "rapid 2": (rapid_verify, 2.0),
    "rapid 20": (rapid_verify, 20.0),
    "mixture 0.7": (mixture_verify, 0.7),
    "mixture 0.2": (mixture_verify, 0.2),
}


@pytest.fixture(params=RULES.values(), ids=RULES.keys())
def rule(request):
    """A rule and its strength."""
    return request.param


def stated_distribution(rule, p, drawn):
    """Return the one-step distribution as RAPID and the mixture state it, in float64.

    `drawn` is the distribution that drafts are sampled from; the teacher is its part that the target's mask
    leaves. (The tests' models give every token that is not masked a probability above zero.)
    """
    verify, strength = rule
    p, drawn = p.double(), drawn.double()
    q = drawn * (p > 0)
    q /= q.sum()
    if verify is mixture_verify:
        return strength * p + (1 - strength) * q
    shift = strength * (q - p)
    shift[q < 0.1 * q.max()] = 0
    p_hat = p * shift.exp()
    p_hat /= p_hat.sum()
    m = torch.minimum(drawn, p_hat)
    rest = (p - m).clamp(min=0)
    return m + (1 - m.sum()) * rest / rest.sum()


def pair(seed, vocab):
    """Return a target and a drafter; masked tokens are the target's, as a grammar's are."""
    target, drafter = Model(seed, vocab), Model(seed + 50, vocab)
    drafter.logits = lambda prefix, base=drafter.logits: base(prefix).clamp(min=-3.0)
    return target, drafter


def rows(model, tokens, count):
    """Return the logits after the first 0, 1, ... tokens."""
    return torch.stack([model.logits(tokens[:i]) for i in range(count)])


def chains(drafter, length):
    """Yield every chain that the drafter may sample, with its probability and the bonus row."""
    for tokens in itertools.product(range(drafter.vocab), repeat=length):
        logits = rows(drafter, tokens, length + 1)
        probs = logits[:length].softmax(-1)
        weight = math.prod(probs[i, t].item() for i, t in enumerate(tokens))
        yield Draft(tokens, probs=probs, logits=logits), weight


def emitted(draft, verdict):
    """Return the tokens that a verdict commits."""
    return (*(draft.token_ids[i] for i in verdict.accepted), verdict.token_id)


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "length"), [(2, 0), (2, 2), (2, 3), (3, 2), (4, 1), (8, 1)])
def test_sampled_rule_follows_its_stated_distribution(oracle, rule, vocab, length):
    """Over every draft and branch, tokens up to and with the bonus follow the one-step distribution."""
    target, drafter = pair(vocab + length, vocab)
    distribution = defaultdict(float)
    for draft, weight in chains(drafter, length):
        z = rows(target, draft.token_ids, length + 1)
        got = outcomes(oracle, lambda d=draft, z=z: emitted(d, rule[0](z, d, *PLAIN, rule[1])[0]))
        for tokens, chance in got.items():
            distribution[tokens] += weight * chance

    def step(prefix):
        p, q = softmax(target.logits(prefix)), softmax(drafter.logits(prefix))
        return stated_distribution(rule, p, q).tolist()

    stated = Model(0, vocab)
    stated.distribution = step
    expected = stated.extend({(): 1.0}, length + 1)
    assert distance(stated.extend(distribution, length + 1), expected) < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_reported_distance_is_the_total_variation(rule, seed):
    """The reported number is TV(out, p) of the stated distribution at the emitted position."""
    generator = torch.Generator().manual_seed(seed)
    z, z_q = torch.randn(2, 1, 6, generator=generator) * 3
    draft = Draft((), logits=z_q)
    _, bound = rule[0](z, draft, *PLAIN, rule[1], generator)
    p, q = softmax(z[0]), softmax(z_q[0])
    expected = 0.5 * (stated_distribution(rule, p, q) - p.double()).abs().sum().item()
    assert bound == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_total_variation_identities(seed):
    """TV(out, p) is sum (min(q, p_hat) - p)+ for RAPID and (1 - w) TV(p, q) for the mixture."""
    p, q = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)
    p_hat = (p.log() + guarded_shift(p, q, 10.0)).softmax(-1)
    out, _ = one_step_distribution(q, p_hat, p)
    identity = (torch.minimum(q, p_hat) - p).clamp(min=0).sum()
    torch.testing.assert_close((out - p).abs().sum() / 2, identity, atol=1e-6, rtol=0)
    mixed = 0.3 * p + 0.7 * q
    out, _ = one_step_distribution(q, mixed, mixed)
    torch.testing.assert_close(out, mixed, atol=1e-6, rtol=0)
    torch.testing.assert_close((out - p).abs().sum() / 2, 0.7 * (q - p).abs().sum() / 2)


def test_distance_adds_up_over_the_emitted_positions(rule):
    """Each emitted position adds its own distance; positions after the last one add nothing."""
    target, drafter = pair(4, 5)
    tokens = (2, 1, 2)
    z, z_q = rows(target, tokens, 4), rows(drafter, tokens, 4)
    draft = Draft(tokens, probs=z_q[:3].softmax(-1), logits=z_q)
    single = [
        rule[0](z[i : i + 1], Draft((), logits=z_q[i : i + 1]), *PLAIN, rule[1])[1]
        for i in range(4)
    ]
    lengths = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        verdict, bound = rule[0](z, draft, *PLAIN, rule[1], generator)
        count = len(verdict.accepted) + 1
        lengths.add(count)
        assert bound == pytest.approx(sum(single[:count]), abs=1e-6)
    assert len(lengths) > 1


@pytest.mark.parametrize(("verify", "strength"), [(rapid_verify, 0.0), (mixture_verify, 1.0)])
def test_neutral_strength_is_the_targets_distribution(oracle, verify, strength):
    """RAPID at eta 0 and the mixture at weight 1 move nothing."""
    target, drafter = pair(8, 3)
    distribution = defaultdict(float)
    for draft, weight in chains(drafter, 2):
        z = rows(target, draft.token_ids, 3)
        got = outcomes(
            oracle,
            lambda d=draft, z=z: (emitted(d, (r := verify(z, d, *PLAIN, strength))[0]), r[1]),
        )
        for (tokens, bound), chance in got.items():
            distribution[tokens] += weight * chance
            assert bound == pytest.approx(0.0, abs=1e-6)
    assert distance(target.extend(distribution, 3), target.extend({(): 1.0}, 3)) < 1e-6


def test_deterministic_draft_follows_the_same_distribution(oracle, rule):
    """Without probs the tokens are drawn from the same one-step distribution."""
    z, z_q = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(3)) * 2
    draft = Draft((1,), logits=z_q)
    distribution = outcomes(
        oracle, lambda: emitted(draft, rule[0](z, draft, *PLAIN, rule[1])[0])[0]
    )
    for token, chance in enumerate(
        stated_distribution(rule, softmax(z[0]), softmax(z_q[0])).tolist()
    ):
        assert distribution[token] == pytest.approx(chance, abs=1e-6)


def test_the_token_after_the_draft_follows_p_where_q_is_unknown(oracle, rule):
    """Without a drafter row after the last token the bonus is the target's, at distance 0."""
    z = torch.tensor([[1.0, 0.5, -1.0]])
    draft = Draft((), logits=torch.empty(0, 3))
    distribution = outcomes(
        oracle, lambda: (emitted(draft, (r := rule[0](z, draft, *PLAIN, rule[1]))[0])[0], r[1])
    )
    for token, p in enumerate(softmax(z[0]).tolist()):
        assert distribution[token, 0] == pytest.approx(p, abs=1e-6)


def test_greedy_after_the_draft_is_the_targets_where_q_is_unknown():
    """Without a drafter row after the last token the bonus is the target's arg max."""
    z = torch.tensor([[0.0, 4.0], [1.0, 2.0]])
    draft = Draft((1,), logits=torch.tensor([[0.0, 1.0]]))
    assert rapid_verify(z, draft, *GREEDY, 5.0) == (Verdict((0,), 1), 0.0)


def test_truncated_distributions_shape_both_p_and_q(oracle, rule):
    """Top-k and temperature act on target and drafter alike before the rule."""
    z, z_q = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(5)) * 2
    draft = Draft((), logits=z_q)
    distribution = outcomes(oracle, lambda: rule[0](z, draft, 0.7, 1.0, 3, rule[1])[0].token_id)
    p = transfer.sampling_distribution(0.7, 1.0, 3)
    for token, chance in enumerate(stated_distribution(rule, p(z[0]), p(z_q[0])).tolist()):
        assert distribution.get(token, 0.0) == pytest.approx(chance, abs=1e-6)


def greedy_scores(rule, z, z_q):
    """Return what greedy decoding maximises, as DESIGN states it."""
    p, q = softmax(z), softmax(z_q) * (z > float("-inf"))
    q = q / q.sum()
    if rule[0] is mixture_verify:
        return rule[1] * p + (1 - rule[1]) * q
    return z + torch.where(q < 0.1 * q.amax(-1, keepdim=True), 0.0, rule[1] * (q - p))


def test_greedy_output_does_not_depend_on_the_draft(rule):
    """Any draft, of any length, leads to the arg max of the shifted scores, token by token."""
    target, drafter = pair(21, 4)
    expected = []
    for _ in range(12):
        prefix = tuple(expected)
        scores = greedy_scores(rule, target.logits(prefix), drafter.logits(prefix))
        expected.append(
            int(scores.masked_fill(target.logits(prefix) == float("-inf"), -math.inf).argmax())
        )
    generator = torch.Generator().manual_seed(0)
    for length in range(5):
        tokens, accepted = (), 0
        while len(tokens) < 12:
            right = expected[len(tokens) : len(tokens) + length]
            guess = [t if torch.rand((), generator=generator) < 0.8 else (t + 1) % 4 for t in right]
            path = [tokens + tuple(guess[:i]) for i in range(len(guess) + 1)]
            z, z_q = (torch.stack([m.logits(p) for p in path]) for m in (target, drafter))
            draft = Draft(tuple(guess), logits=z_q)
            verdict, _ = rule[0](z, draft, *GREEDY, rule[1])
            accepted += len(verdict.accepted)
            tokens += emitted(draft, verdict)
        assert tokens[:12] == tuple(expected)
        assert accepted > 0 or length == 0


def test_greedy_reports_how_many_tokens_were_changed():
    """The distributions are one-hot, so the distance is the count of tokens that differ from the target's."""
    z = torch.tensor([[1.0, 0.9], [5.0, 0.0]])
    z_q = torch.tensor([[0.0, 9.0], [0.0, 0.1]])
    verdict, bound = rapid_verify(z, Draft((1,), logits=z_q), *GREEDY, 3.0)
    assert (verdict, bound) == (Verdict((0,), 0), 1.0)


def test_guard_keeps_the_shift_from_tokens_the_drafter_thinks_little_of():
    """Where q is under a tenth of its maximum nothing moves, up or down."""
    p = torch.tensor([0.5, 0.3, 0.2])
    q = torch.tensor([0.9, 0.08, 0.02])
    assert guarded_shift(p, q, 10.0).tolist() == pytest.approx([4.0, 0.0, 0.0])
    assert guarded_shift(p, q, 10.0, alpha=0.05).tolist() == pytest.approx([4.0, -2.2, 0.0])


@pytest.mark.parametrize("sampling", [PLAIN, GREEDY], ids=["sampled", "greedy"])
def test_a_token_that_a_grammar_masks_is_never_emitted(rule, sampling):
    """A drafter sure of a masked token cannot bring it in, drafted or not."""
    z = torch.tensor([[0.0, float("-inf"), 0.2], [0.0, float("-inf"), 0.2]])
    z_q = torch.tensor([[0.0, 30.0, 0.0], [0.0, 30.0, 0.0]])
    probs = z_q[:1].softmax(-1) if sampling is PLAIN else None
    draft = Draft((1,), probs=probs, logits=z_q)
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        verdict, _ = rule[0](z, draft, *sampling, rule[1], generator)
        assert verdict.accepted == ()
        assert verdict.token_id != 1


@pytest.mark.parametrize("sampling", [PLAIN, GREEDY], ids=["sampled", "greedy"])
def test_a_drafter_that_is_not_a_number_is_ignored(rule, sampling):
    """NaN in the drafter's logits leaves the target's own distribution, at distance 0."""
    z = torch.tensor([[0.0, 60.0, 0.0]])
    draft = Draft((), logits=torch.full((1, 3), float("nan")))
    assert rule[0](z, draft, *sampling, rule[1]) == (Verdict((), 1), 0.0)


@pytest.mark.parametrize("sampling", [PLAIN, GREEDY], ids=["sampled", "greedy"])
def test_a_target_without_a_token_is_an_error(rule, sampling):
    """A wholly masked row is refused, whatever the drafter says."""
    z = torch.full((1, 3), float("-inf"))
    with pytest.raises(DecodingError, match="masked"):
        rule[0](z, Draft((), logits=torch.zeros(1, 3)), *sampling, rule[1])


@pytest.mark.slow
def test_real_draws_follow_the_stated_distribution(rule):
    """4 000 seeded runs: the first token lies within five standard errors of the stated distribution."""
    z, z_q = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(9)) * 1.5
    generator = torch.Generator().manual_seed(0)
    n, counts = 4_000, Counter()
    probs = z_q[:1].softmax(-1)
    for token in probs[0].multinomial(n, replacement=True, generator=generator).tolist():
        draft = Draft((token,), probs=probs, logits=z_q)
        counts[emitted(draft, rule[0](z, draft, *PLAIN, rule[1], generator)[0])[0]] += 1
    for token, p in enumerate(stated_distribution(rule, softmax(z[0]), softmax(z_q[0])).tolist()):
        assert abs(counts[token] / n - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-9
