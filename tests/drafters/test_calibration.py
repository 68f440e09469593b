"""Drafted probabilities are calibrated by what was committed, each step by itself, without a bias by depth."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest

from rasd_integrations.drafters.calibration import Allowance, Calibration
from rasd_integrations.types import Draft

CHAIN = Draft((5, 6, 7), node_probs=(0.5, 0.25, 0.125))
UNRATED = Draft((5, 6, 7))


@pytest.mark.parametrize("draft", [CHAIN, UNRATED], ids=["rated", "unrated"])
def test_nothing_counted_is_believed(draft):
    """At first a probability is as drafted, half a token if none is."""
    assert Calibration().node_probs(draft) == pytest.approx(CHAIN.node_probs)
    assert Calibration().node_probs(Draft()) == []


@pytest.mark.parametrize("right", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("verified", [1, 4])
@pytest.mark.parametrize("draft", [CHAIN, UNRATED], ids=["rated", "unrated"])
def test_each_step_becomes_what_is_seen_of_it(right, verified, draft):
    """If only the next token is committed or all that was right, the estimate of a path is the product."""
    calibration, chance = Calibration(), random.Random(0)
    for _ in range(3000):
        length = next((n for n in range(3) if chance.random() >= right), 3)
        committed = [*CHAIN.token_ids[:length], 99][:verified]
        assert calibration.count(draft, committed) == min(length, verified)
    expected = [right, right**2, right**3]
    assert calibration.node_probs(draft) == pytest.approx(expected, abs=0.06)


def test_a_node_behind_a_wrong_one_is_not_counted():
    """What would have followed is unknown; a sibling that was right opens its own children."""
    tree = Draft(
        (5, 6, 8, 9), parents=(-1, 0, -1, 2), node_probs=(0.95, 0.95 * 0.1, 0.01, 0.01 * 0.65)
    )
    calibration = Calibration()
    for _ in range(400):
        assert calibration.count(tree, [8, 9, 4]) == 2
    sure, behind_wrong, unlikely, behind_right = calibration.node_probs(tree)
    assert sure < 0.05
    assert behind_wrong == pytest.approx(0.1 * sure)  # as it was drafted
    assert unlikely > 0.9
    assert behind_right > 0.9


def test_new_text_outweighs_old():
    """A copy goes on from what is known, and leaves the original alone."""
    calibration = Calibration()
    for _ in range(300):
        calibration.count(CHAIN, [5, 6, 7])
    known, copied = calibration.node_probs(CHAIN), deepcopy(calibration)
    for _ in range(1500):
        copied.count(CHAIN, [1])
    assert copied.node_probs(CHAIN)[0] < 0.3
    assert calibration.node_probs(CHAIN) == known


def test_zero_probabilities_are_no_division():
    """A parent called impossible leaves its child's own probability."""
    draft = Draft((5, 6), node_probs=(0.0, 0.0))
    assert Calibration().node_probs(draft) == [0.0, 0.0]


@pytest.mark.parametrize("loss", [0.05, 0.5, 3.0])
def test_an_allowance_bounds_what_trials_lose(loss):
    """Cheap trials go on often, dear ones seldom, and all lose less than 1 % of the time."""
    allowance, trials = Allowance(), 0
    for _ in range(1000):
        trials += (trial := allowance.allows)
        allowance.step(-loss if trial else 0.0)
    assert 6 <= trials * loss <= 11 + loss


def test_what_was_saved_may_be_tried_with():
    """Not all of it in the next answer; and a loss is not carried on."""
    allowance = Allowance()
    for _ in range(100):
        allowance.step(1.0)
    later = Allowance(allowance)
    assert Allowance().balance < later.balance < allowance.balance
    before = later.balance
    later.step()
    assert later.balance - before > 0.02
    for _ in range(20):
        later.step(-1.0)
    assert not later.allows
    assert Allowance(later).balance == Allowance().balance
