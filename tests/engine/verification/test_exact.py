"""The exact rules: their output distribution is the target's, by enumeration of every branch."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict

import pytest
import torch
from fakes_distributions import Model, distance, outcomes, softmax

from rasd_integrations.engine.verification.exact import (
    Verdict,
    accept_probabilities,
    argmax_rows,
    block_ahead,
    block_verify,
    drawn_ahead,
    reach_probabilities,
    residual,
    sample_and_walk,
)
from rasd_integrations.engine.verification.sampling import sampling_distribution
from rasd_integrations.errors import DecodingError
from rasd_integrations.types import Draft


def paths(draft):
    """Return the tokens from the root to each node."""
    parents = draft.parents or range(-1, len(draft) - 1)
    found = []
    for parent, token in zip(parents, draft.token_ids, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def target_logits(model, draft):
    """Return the target's rows: after the root and after each node."""
    return torch.stack([model.logits(path) for path in [(), *paths(draft)]])


def emitted(draft, verdict):
    """Return the tokens that a verdict commits."""
    return (*(draft.token_ids[i] for i in verdict.accepted), verdict.token_id)


def random_tree(rng, vocab, size):
    """Return a tree with duplicate siblings allowed."""
    parents = [rng.randrange(-1, i) for i in range(size)]
    return Draft(tuple(rng.randrange(vocab) for _ in parents), tuple(parents))


TREES = {
    "empty": Draft(),
    "chain": Draft((1, 0, 2)),
    "duplicate siblings": Draft((1, 1, 0, 2), (-1, -1, 0, 1)),
    "all children": Draft((0, 1, 2, 0, 1), (-1, -1, -1, 2, 2)),
    "deep": Draft((2, 1, 0, 1, 2, 0), (-1, 0, 1, 1, 2, 4)),
} | {f"random {seed}": random_tree(random.Random(seed), 3, 7) for seed in range(12)}


LONG = {"long chain": Draft(tuple(i % 3 for i in range(40)))}


@pytest.mark.parametrize("draft", (TREES | LONG).values(), ids=(TREES | LONG).keys())
@pytest.mark.parametrize("seed", range(2))
def test_drawing_ahead_is_the_walk(draft, seed):
    """Drawn behind all nodes at once, tokens and what the generator draws next are those of the walk."""
    logits = target_logits(Model(len(draft), vocab=3), draft)
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    walked = sample_and_walk(logits, draft, softmax, generators[0])
    assert drawn_ahead(logits, draft, softmax, generators[1]) == walked
    later = [torch.rand(3, generator=generator) for generator in generators]
    assert torch.equal(*later)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 20])
@pytest.mark.parametrize("seed", range(5))
def test_ending_a_block_ahead_is_ending_it(n, seed):
    """Accepted length, last token and what the generator draws next are those of the verification step by step."""
    noise = torch.Generator().manual_seed(1000 * n + seed)
    p, q = (torch.randn(n + 1, 9, generator=noise).mul(2).softmax(-1) for _ in range(2))
    q = (0.7 * p + 0.3 * q)[:n]
    tokens = tuple(torch.multinomial(q, 1, generator=noise).flatten().tolist()) if n else ()
    draft = Draft(tokens, probs=q)
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    wanted = block_verify(p.log(), draft, softmax, generators[0])
    reach = reach_probabilities(p, q, tokens)
    holds = accept_probabilities(p, q, reach)
    assert block_ahead(p, q, reach, holds, generators[1]) == wanted
    later = [torch.rand(3, generator=generator) for generator in generators]
    assert torch.equal(*later)


def test_drawing_ahead_minds_visited_rows_only():
    """A row without a token is an error where the walk comes by, and nothing elsewhere."""
    logits = torch.zeros(3, 4)
    logits[0, 1:] = float("-inf")
    logits[2] = float("nan")
    generator = torch.Generator().manual_seed(0)
    assert drawn_ahead(logits, Draft((1, 1)), softmax, generator) == Verdict((), 0)
    with pytest.raises(DecodingError, match="No token"):
        drawn_ahead(logits.flip(0), Draft((1, 1)), softmax, generator)


@pytest.mark.parametrize("draft", TREES.values(), ids=TREES.keys())
def test_sample_and_walk_is_exact(oracle, draft):
    """The tokens follow the target's distribution; a step past the root has the mass of the root's children."""
    model = Model(len(draft), vocab=3)
    logits = target_logits(model, draft)
    distribution = outcomes(oracle, lambda: emitted(draft, sample_and_walk(logits, draft, softmax)))
    length = max((len(path) for path in distribution), default=1)
    assert distance(model.extend(distribution, length), model.extend({(): 1.0}, length)) < 1e-6
    moved = sum(weight for tokens, weight in distribution.items() if len(tokens) > 1)
    firsts = {path[0] for path in paths(draft) if len(path) == 1}
    assert moved == pytest.approx(sum(model.distribution(())[t] for t in firsts), abs=1e-6)


@pytest.mark.parametrize("draft", TREES.values(), ids=TREES.keys())
def test_greedy_walk_follows_the_arg_max_path(draft):
    """Greedy commits what step-by-step arg max would, as far as it was drafted, plus one."""
    model = Model(len(draft), vocab=3)
    verdict = sample_and_walk(target_logits(model, draft), draft, None)
    tokens, expected = emitted(draft, verdict), []
    for _ in tokens:
        expected.append(int(model.logits(tuple(expected)).argmax()))
    assert tokens == tuple(expected)
    assert tokens not in paths(draft)


def test_accepted_nodes_lead_from_the_root_to_the_last(oracle):
    """The accepted indices are a path: each node's parent stands before it."""
    draft = TREES["deep"]
    logits = target_logits(Model(0, vocab=3), draft)
    distribution = outcomes(oracle, lambda: sample_and_walk(logits, draft, softmax))
    for verdict in distribution:
        before = (-1, *verdict.accepted)
        assert all(draft.parents[n] == p for p, n in zip(before, verdict.accepted, strict=False))
    assert max(len(verdict.accepted) for verdict in distribution) == 5


def test_greedy_takes_the_first_of_equal_logits():
    """Ties go to the first token in every float type, as arg max does."""
    logits = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.bfloat16)
    assert sample_and_walk(logits, Draft(), None) == Verdict((), 1)


@pytest.mark.parametrize(
    "distribution", [None, sampling_distribution(1.0)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_a_row_without_a_token_is_an_error_only_if_visited(distribution, value):
    """A dead row beyond the accepted path does no harm; a visited one is refused."""
    row = torch.tensor([0.0, 50.0])
    logits = torch.stack([row, torch.full((2,), value)])
    assert sample_and_walk(logits, Draft((0,)), distribution).token_id == 1
    with pytest.raises(DecodingError, match="grammar"):
        sample_and_walk(logits, Draft((1,)), distribution)


def test_seeded_output_does_not_depend_on_the_draft():
    """With one seed, sample and walk emits the same tokens whatever is drafted."""
    model = Model(9, vocab=4)
    rng = random.Random(0)
    texts = set()
    for size in (0, 1, 3, 6, 9):
        generator = torch.Generator().manual_seed(11)
        tokens = ()
        while len(tokens) < 12:
            draft = random_tree(rng, 4, size)
            logits = torch.stack([model.logits(tokens + path) for path in [(), *paths(draft)]])
            tokens += emitted(draft, sample_and_walk(logits, draft, softmax, generator))
        texts.add(tokens[:12])
    assert len(texts) == 1


def sampled_chains(drafter, length):
    """Yield every chain that the drafter may sample, with its probability."""
    for tokens in itertools.product(range(drafter.vocab), repeat=length):
        weight = math.prod(drafter.distribution(tokens[:i])[t] for i, t in enumerate(tokens))
        if weight > 0:
            rows = [drafter.logits(tokens[:i]).softmax(-1) for i in range(length)]
            yield Draft(tokens, probs=torch.stack(rows)), weight


CASES = [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3), (8, 1)]


def block_distribution(oracle, target, drafter, length):
    """Return the distribution of the tokens that one block verification commits."""
    distribution = defaultdict(float)
    for draft, weight in sampled_chains(drafter, length):
        logits = target_logits(target, draft)
        got = outcomes(oracle, lambda d=draft, z=logits: emitted(d, block_verify(z, d, softmax)))
        for tokens, chance in got.items():
            distribution[tokens] += weight * chance
    return distribution


def token_wise(target, drafter, length):
    """Return the expected tokens of the token-wise rule: min(1, p / q) at each."""
    expected = 1.0
    for draft, weight in sampled_chains(drafter, length):
        kept = weight
        for i, token in enumerate(draft.token_ids):
            p, q = (model.distribution(draft.token_ids[:i])[token] for model in (target, drafter))
            kept *= min(1.0, p / q)
            expected += kept
    return expected


@pytest.mark.parametrize(("vocab", "length"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_block_verification_is_exact_and_never_shorter(oracle, vocab, length, seed):
    """Over every sampled draft and branch: the target's distribution, and at least the token-wise rule's tokens."""
    target, drafter = Model(seed, vocab), Model(seed + 100, vocab)
    distribution = block_distribution(oracle, target, drafter, length)
    expected = target.extend({(): 1.0}, length + 1)
    assert distance(target.extend(distribution, length + 1), expected) < 1e-6
    gain = sum(weight * len(tokens) for tokens, weight in distribution.items())
    gain -= token_wise(target, drafter, length)
    if length == 1:
        assert gain == pytest.approx(0, abs=1e-6)
    else:  # on some distributions the gain is real
        assert gain >= (0.005 if (vocab, length, seed) == (2, 3, 0) else -1e-6)


def test_equal_distributions_accept_everything():
    """A drafter that is the target loses nothing, whatever the seed."""
    model = Model(3, vocab=5)
    draft, _ = next(sampled_chains(model, 3))
    logits = target_logits(model, draft)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert block_verify(logits, draft, softmax, generator).accepted == (0, 1, 2)


def test_block_verification_samples_the_target_with_real_draws():
    """4 000 seeded runs: the first token's frequencies lie within five standard errors of p."""
    target, drafter = Model(5, 4), Model(105, 4)
    generator = torch.Generator().manual_seed(0)
    cases = [(d, target_logits(target, d), w) for d, w in sampled_chains(drafter, 2)]
    n, counts = 4_000, Counter()
    for draft, logits, _ in random.Random(0).choices(cases, [w for *_, w in cases], k=n):
        verdict = block_verify(logits, draft, softmax, generator)
        counts[emitted(draft, verdict)[0]] += 1
    for token, p in enumerate(target.distribution(())):
        assert abs(counts[token] / n - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-9


def test_a_token_the_drafter_could_not_draw_is_refused():
    """A drafted token of zero drafter probability stands with probability zero, not NaN."""
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    q = torch.tensor([[1.0, 0.0]])
    assert accept_probabilities(p, q, reach_probabilities(p, q, (1,))).tolist() == [0.0]


def test_residual_of_equal_distributions_falls_back():
    """Nothing left over gives the fallback distribution instead of a row of zeros."""
    p = torch.tensor([0.25, 0.75])
    assert residual(p, p, otherwise=p).tolist() == [0.25, 0.75]
    assert residual(p, torch.tensor([0.75, 0.25]), otherwise=p).tolist() == [0.0, 0.5]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("row", "best"),
    [
        ([-2.0, 3.0, 3.0, 1.0], 1),
        ([-2.0, -3.0, -0.5, -1.0], 2),
        ([-0.0, 0.0, -1.0, -INF], 0),
        ([1.0, INF, 2.0, -INF], 1),
        ([-INF, -INF, -INF, -INF], -1),
        ([1.0, NAN, 2.0, 0.0], -1),
        ([1.0, -NAN, 2.0, 0.0], -1),
        ([-1.0, -NAN, -2.0, -4.0], -1),
    ],
)
def test_the_best_of_each_row(dtype, row, best):
    """Whatever its sign: the first highest score, and none where all is masked or one is no number."""
    scores = torch.tensor([[5.0, 6.0, 7.0, 7.0], row], dtype=dtype)
    if math.copysign(1, row[1]) < 0 and math.isnan(row[1]):  # conversions drop its sign
        bits = scores.view({2: torch.int16, 4: torch.int32}[scores.element_size()])
        bits[1, 1] |= torch.iinfo(bits.dtype).min
        assert scores[1, 1].isnan()
        assert scores[1, 1].signbit()
    assert argmax_rows(scores) == [2, best]
    assert argmax_rows(scores[1:]) == [best]
    many = torch.randn(9, 4099, generator=torch.Generator().manual_seed(0)).to(dtype)
    for scores in (many, many - 9, many[:, ::3]):
        assert argmax_rows(scores) == [int((row == row.max()).nonzero()[0]) for row in scores]
