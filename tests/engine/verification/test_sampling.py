"""The distribution of a row of logits, and draws from it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rasd_integrations.engine.verification import sampling
from rasd_integrations.engine.verification.sampling import (
    bernoulli,
    draw,
    process_logits,
    sampling_distribution,
)
from rasd_integrations.errors import DecodingError


def transformers_distribution(logits, temperature, top_p, top_k, min_p=0.0):
    """Return what `generate` samples from."""
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        (1.0, 1.0, 0),
        (0.7, 1.0, 0),
        (1.0, 1.0, 5),
        (1.3, 0.9, 0),
        (0.8, 0.37, 0),
        (0.6, 0.8, 7),
        (2.0, 0.01, 3),
        (1.0, 1.0, 0, 0.2),
        (0.9, 0.9, 20, 0.05),
    ],
)
def test_distribution_equals_transformers_warpers(options):
    """Temperature, top-p, top-k and min-p give the distribution that transformers' generate samples from."""
    logits = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)) * 3
    logits[logits < -6] = float("-inf")
    actual = process_logits(logits, *options)
    torch.testing.assert_close(actual, transformers_distribution(logits, *options))


@pytest.mark.parametrize("top_k", [0, 6])
def test_as_many_equal_tokens_stay_as_in_transformers(top_k):
    """At the edge of the nucleus as many of equal logits stay as in transformers."""
    logits = torch.randint(0, 3, (200, 40), generator=torch.Generator().manual_seed(1)).float()
    actual = process_logits(logits, 1.0, 0.613, top_k).sort(-1).values
    torch.testing.assert_close(
        actual, transformers_distribution(logits, 1.0, 0.613, top_k).sort(-1).values
    )


def test_the_first_of_equal_tokens_stay():
    """Ties at the edge of the nucleus go to the first tokens, on every device."""
    assert process_logits(torch.zeros(4), 1.0, 0.6, 0).tolist() == pytest.approx([1 / 3] * 3 + [0])


def test_nucleus_wider_than_the_candidates_equals_transformers(monkeypatch):
    """A flat distribution whose nucleus exceeds the searched candidates is still the right one."""
    monkeypatch.setattr(sampling, "_NUCLEUS_CANDIDATES", 4)
    logits = torch.randn(50, 60, generator=torch.Generator().manual_seed(2)) * 0.1
    logits[0, 0] = 30.0  # one row fits in the candidates, the others do not
    torch.testing.assert_close(
        process_logits(logits, 1.0, 0.9, 0), transformers_distribution(logits, 1.0, 0.9, 0)
    )


def test_temperature_zero_is_one_hot_at_the_first_arg_max():
    """Greedy puts all mass on the first of equal maxima."""
    distribution = process_logits(
        torch.tensor([[1.0, 3.0, 3.0]], dtype=torch.bfloat16), 0.0, 0.5, 2
    )
    assert distribution.tolist() == [[0.0, 1.0, 0.0]]


def test_tiny_temperature_is_finite():
    """Dividing by a tiny temperature neither overflows nor loses the maximum."""
    assert process_logits(torch.tensor([1e4, 2e4, -1e4]), 1e-38, 1.0, 0).tolist() == [0.0, 1.0, 0.0]


def test_masked_tokens_keep_no_mass_under_every_processor():
    """Tokens that a grammar masked stay at zero, also when top-k asks for more than are left."""
    logits = torch.tensor([0.0, float("-inf"), 1.0, float("-inf")])
    distribution = process_logits(logits, 1.0, 0.99, 3)
    assert [distribution[1].item(), distribution[3].item()] == [0.0, 0.0]
    assert distribution.sum().item() == pytest.approx(1.0)


def test_sampling_distribution_of_temperature_zero_is_none():
    """Greedy is told by None, so that no probabilities are computed for it."""
    assert sampling_distribution(0.0, 0.9, 5) is None
    distribution = sampling_distribution(0.5, 0.9, 5)
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(3))
    assert distribution is not None
    torch.testing.assert_close(distribution(logits), process_logits(logits, 0.5, 0.9, 5))


def test_draws_follow_the_distribution():
    """Frequencies of 40 000 seeded draws lie within five standard errors of the distribution."""
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    n = 40_000
    tokens = draw(probs.expand(n, -1), torch.Generator().manual_seed(4))
    counts = torch.bincount(tokens, minlength=5).double() / n
    for p, frequency in zip(probs.tolist(), counts.tolist(), strict=True):
        assert abs(p - frequency) <= 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("mass", [0.1, 1 / 3, 0.5, 0.5 + 2**-24, 1.5])
@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_draw_never_returns_a_token_without_mass(monkeypatch, uniform, token, mass):
    """The ends of the unit interval meet the first and the last token of positive mass."""
    monkeypatch.setattr(
        torch, "rand", lambda *a, **k: torch.full((1,), uniform, dtype=torch.float64)
    )
    assert draw(torch.tensor([0.0, mass, 0.0, mass, 0.0]), None).item() == token


def test_draw_is_reproducible_and_takes_one_number_a_row():
    """The same seed gives the same tokens, drawn together or one after the other."""
    probs = torch.rand(6, 11, generator=torch.Generator().manual_seed(5))
    together = draw(probs, torch.Generator().manual_seed(6)).tolist()
    generator = torch.Generator().manual_seed(6)
    assert [draw(row, generator).item() for row in probs] == together


@pytest.mark.parametrize("row", [[0.0, 0.0], [float("nan"), 1.0]])
def test_draw_refuses_a_row_without_mass(row):
    """A dead grammar or an overflow is an error that says so, never a silent token 0."""
    with pytest.raises(DecodingError, match="masked or not a number"):
        draw(torch.tensor([[0.5, 0.5], row]), None)


def test_flips_follow_their_chances():
    """Chances 0 and 1 are certain; others come at their rate, within five standard errors."""
    n = 20_000
    flips = bernoulli([0.0, 1.0] + [0.3] * n, torch.Generator().manual_seed(7))
    assert flips[:2] == [False, True]
    assert abs(sum(flips[2:]) / n - 0.3) <= 5 * math.sqrt(0.3 * 0.7 / n)
