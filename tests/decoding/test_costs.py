"""Costs of steps are found from their times, and hold for the next answer."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from rasd_integrations.decoding.costs import CostShape, StepCosts
from rasd_integrations.decoding.schedule import Experience, Schedule
from rasd_integrations.engine.executors.eager import rows_at
from rasd_integrations.types import Draft


def measured(costs: StepCosts, rows: list[int], *, plain: float, change: float = 0.0) -> StepCosts:
    """Show steps of a machine on which a wide one takes half a plain step more, and a tenth of one for each row."""
    last = 0
    for n in rows:
        seconds = plain * (1 + (0.5 + 0.1 * (n - 1)) * (n > 1)) + plain * change * (n != last)
        costs.add(n, seconds)
        last = n
    return costs


def test_rows_are_filled_up():
    """A step of one row stays one; others are the next of ``1 + k * row_multiple``."""
    assert [rows_at(n, 4) for n in (1, 2, 5, 6, 17)] == [1, 5, 5, 9, 17]
    assert [rows_at(n, 1) for n in (1, 2, 17)] == [1, 2, 17]


def test_a_jump_and_a_slope_are_found():
    """One line through all widths would miss both ends."""
    costs = measured(StepCosts(CostShape()), [1, 1, 3, 9, 5, 1, 17, 3] * 5, plain=0.02)
    assert costs.at(1) == pytest.approx(0.02)
    for rows in (3, 9, 17):
        assert costs.at(rows) == pytest.approx(0.02 * (1.5 + 0.1 * (rows - 1)), rel=0.1)


def test_a_change_of_rows_is_told_from_the_rows():
    """Where graphs are fitted to rows, the first step of a number is not what its steps cost."""
    rows = [n for n in (1, 5, 1, 9, 5) for _ in range(4)] * 4
    costs = measured(StepCosts(CostShape(), changes=True), rows, plain=0.02, change=0.4)
    assert costs.change == pytest.approx(0.4 * 0.02, rel=0.15)
    assert costs.at(5) == pytest.approx(0.02 * 1.9, rel=0.1)


def test_the_shape_holds_for_an_answer_over_another_length():
    """Shares of a plain step are known before the next answer has seen one, from whatever it saw first."""
    first = measured(StepCosts(CostShape()), [1, 1, 3, 9, 5] * 8, plain=0.02)
    second = StepCosts(first.shape)
    assert second.at(9) / second.at(1) == pytest.approx(2.3, rel=0.1)
    second.add(9, 0.1)
    assert second.at(1) == pytest.approx(0.1 / 2.3, rel=0.1)


def test_prompts_of_another_length_are_measured_anew():
    """What wide steps cost over a short prompt is forgotten after a few over a long one, by a plain step of its own."""
    short = Schedule(8, row_multiple=4, prefix=900)
    settled(short, 60, [0.9], change=0.0)
    found = short.experience
    same, long = (Schedule(8, row_multiple=4, prefix=n, experience=found) for n in (1000, 7200))
    assert same.next_budget() > 0
    assert long.next_budget() == 0  # the plain step is timed first
    costs = StepCosts(found.costs, elsewhere=True)
    assert costs.at(5) / costs.at(1) == pytest.approx(1.45, rel=0.15)
    measured(costs, [1, 1, 9, 5, 9], plain=0.02)
    assert costs.at(9) / costs.at(1) == pytest.approx(2.3, rel=0.15)
    assert not costs.wants_plain


def test_a_step_that_was_held_up_says_little():
    """A hundredfold step moves nothing far."""
    costs = measured(StepCosts(CostShape()), [1] * 10, plain=0.02)
    costs.add(1, 2.0)
    assert costs.at(1) < 0.025
    wide = measured(costs, [1, 5] * 10, plain=0.02).at(5)
    costs.add(5, 2.0)
    assert costs.at(5) < 1.3 * wide


def test_the_plain_step_is_timed_again():
    """All others are measured by it, so it must not be an old one."""
    costs = measured(StepCosts(CostShape()), [1, 5, 1, 5], plain=0.02)
    assert not costs.wants_plain
    measured(costs, [5] * 200, plain=0.02)
    assert costs.wants_plain
    costs.add(1, 0.02)
    assert not costs.wants_plain


def settled(schedule: Schedule, steps: int, yields: list[float], change: float) -> list[int]:
    """Run steps of which every ``len(yields)`` ones have so likely a token of four; return their rows."""
    seen, last = [], 0
    chance = random.Random(0)
    for step in range(steps):
        share = yields[step % len(yields)]
        node_probs = tuple(share ** (1 + depth) for depth in range(4))
        budget = schedule.next_budget()
        proposed = Draft((0, 1, 2, 3)[:budget], node_probs=node_probs[:budget])
        n = schedule.head(proposed) if budget else 0
        rows = max(rows_at(1 + n, 4), schedule.rows)
        seconds = {1: 1.0}.get(rows, 1.2 + 0.05 * rows) + change * (rows != last)
        draw = chance.random()
        right = sum(draw < share for share in node_probs)
        stood = min(n, right)
        how = {"proposed": proposed, "committed": [*range(stood), stood if right > stood else -1]}
        schedule.record(n, stood, 0.001, seconds, **how)
        seen.append(rows)
        last = rows
    return seen


def changes(rows: list[int]) -> int:
    return sum(a != b for a, b in pairwise(rows))


def test_rows_change_where_the_step_pays_for_it():
    """A dear change is made for what lasts, a cheap one for a single good draft; hopeless drafts are run as one row."""
    cheap = settled(Schedule(8, row_multiple=4), 200, [0.9, 0.1, 0.1], change=0.0)[100:]
    dear = settled(Schedule(8, row_multiple=4), 200, [0.9, 0.1, 0.1], change=0.9)[100:]
    assert changes(cheap) > 40
    assert changes(dear) < 10
    good = settled(Schedule(8, row_multiple=4), 200, [0.9] * 3, change=0.5)[100:]
    assert set(good) == {1, 5}
    assert good.count(1) == 2  # the plain step is timed again: the second of these two
    assert set(settled(Schedule(8, row_multiple=4), 200, [0.05] * 3, change=0.5)[100:]) == {1}


def test_rows_are_not_wider_than_without_drafts():
    """Nothing drafted, nothing added."""
    schedule = Schedule(8, row_multiple=4)
    assert schedule.head(Draft()) == 0
    assert schedule.rows == 1


def asked_of(lost: float) -> int:
    """Return the steps that are drafted in of 60 whose dear drafts are empty, after an answer that lost so much."""
    schedule, asked = Schedule(8, experience=Experience(CostShape(), lost=lost)), 0
    for _ in range(60):
        asked += (budget := schedule.next_budget()) > 0
        schedule.record(0, 0, 0.5 * (budget > 0), 1.0, proposed=Draft(node_probs=()))
    return asked


def test_each_answer_tries_a_drafter_for_a_while():
    """Longer where it won in the last answer, and as long where it lost as where nothing is known."""
    assert asked_of(9.0) == asked_of(0.0) <= 16
    assert asked_of(0.0) < asked_of(-80.0) <= 32
