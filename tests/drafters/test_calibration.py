"""Estimates of nodes are set right by what was committed, each step by itself, without a bias by depth."""

from __future__ import annotations

import random

import pytest

from rasd_integrations.drafters.calibration import Calibration
from rasd_integrations.types import Draft

CHAIN = Draft((5, 6, 7), node_probs=(0.5, 0.25, 0.125))


def test_nobody_known_is_believed():
    """At first an estimate stands."""
    assert Calibration().node_probs(CHAIN) == pytest.approx(CHAIN.node_probs)
    assert Calibration().node_probs(Draft()) == []


@pytest.mark.parametrize("right", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("verified", [1, 4])
def test_what_is_said_of_each_step_becomes_what_is_seen_of_it(right, verified):
    """Whether only the next token is committed or all that was right, the estimate of a path is the product."""
    calibration, chance = Calibration(), random.Random(0)
    for _ in range(3000):
        length = next((n for n in range(3) if chance.random() >= right), 3)
        committed = [*CHAIN.token_ids[:length], 99][:verified]
        calibration.judge(CHAIN, committed)
    expected = [right, right**2, right**3]
    assert calibration.node_probs(CHAIN) == pytest.approx(expected, abs=0.06)


def test_a_node_behind_a_wrong_one_is_not_judged():
    """What would have followed is unknown; a sibling that was right opens its own children."""
    tree = Draft(
        (5, 6, 8, 9), parents=(-1, 0, -1, 2), node_probs=(0.95, 0.95 * 0.1, 0.01, 0.01 * 0.65)
    )
    calibration = Calibration()
    for _ in range(400):
        calibration.judge(tree, [8, 9, 4])
    sure, behind_wrong, unlikely, behind_right = calibration.node_probs(tree)
    assert sure < 0.05
    assert behind_wrong == pytest.approx(0.1 * sure)  # as it was said
    assert unlikely > 0.9
    assert behind_right > 0.9


def test_the_next_answer_goes_on_from_there():
    """What is known is handed on, and new text outweighs old."""
    calibration = Calibration()
    for _ in range(300):
        calibration.judge(CHAIN, [5, 6, 7])
    again = Calibration(calibration.known)
    assert again.node_probs(CHAIN) == calibration.node_probs(CHAIN)
    for _ in range(1500):
        again.judge(CHAIN, [1])
    assert again.node_probs(CHAIN)[0] < 0.3


def test_chances_of_nothing_are_no_division():
    """A parent called impossible leaves its child's own word."""
    draft = Draft((5, 6), node_probs=(0.0, 0.0))
    assert Calibration().node_probs(draft) == [0.0, 0.0]
