"""The draft length follows what was measured."""

from __future__ import annotations

import random

import pytest

from rasd_integrations.engine.schedule import Schedule


def after(
    schedule: Schedule, steps: int, *, share: float, draft_s: float, slope: float
) -> Schedule:
    """Run steps in which the given share of each draft is accepted and each token costs ``slope``."""
    for _ in range(steps):
        n = schedule.next_budget()
        schedule.record(n, int(share * n), draft_s * n, 1.0 + slope * n)
    return schedule


def test_free_and_right_drafts_grow_to_the_limit():
    """Where every token is accepted and steps cost the same, drafts are as long as allowed."""
    assert after(Schedule(16), 30, share=1.0, draft_s=0.0, slope=0.0).next_budget() == 16


def test_dear_and_wrong_drafts_are_switched_off():
    """Where drafts are dear and rejected, most steps draft nothing."""
    schedule = after(Schedule(16), 40, share=0.0, draft_s=0.5, slope=0.3)
    assert sum(schedule.next_budget() > 0 for _ in range(64)) <= 2


def test_off_is_tried_again():
    """A text that becomes easy is noticed."""
    schedule = after(Schedule(16), 40, share=0.0, draft_s=0.5, slope=0.3)
    assert after(schedule, 400, share=1.0, draft_s=0.0, slope=0.01).next_budget() > 4


@pytest.mark.parametrize("cost", [0.0, 0.1])
def test_dearer_drafts_are_shorter(cost):
    """The draft length falls as a drafted token costs more."""
    cheap = after(Schedule(16), 30, share=0.7, draft_s=cost, slope=0.02).next_budget()
    dear = after(Schedule(16), 30, share=0.7, draft_s=cost + 0.3, slope=0.02).next_budget()
    assert dear <= cheap


def test_fixed_length_is_kept():
    """A fixed length is not negotiated."""
    assert after(Schedule(16, fixed=5), 20, share=0.0, draft_s=1.0, slope=1.0).next_budget() == 5


def judged(schedule: Schedule, steps: int, likely: list[float], *, kept: float, slope: float):
    """Run steps whose drafts promise ``likely``, of which the target keeps the share ``kept``."""
    heads, chance = [], random.Random(0)
    for step in range(steps):
        most = schedule.next_budget() if step % 4 else 1  # drafts of several widths show the slope
        n = schedule.head(likely[:most])
        heads.append(n)
        stood = [node for node in range(n) if chance.random() < kept * likely[node]]
        how = {"promised": likely[:n], "kept": stood}
        schedule.record(n, len(stood), 0.001, 1.0 + slope * n, **how)
    return heads


def test_nodes_are_taken_while_they_are_worth_their_rows():
    """Steep steps take the sure head of a draft, flat ones all of it."""
    likely = [0.9, 0.8, 0.5, 0.3, 0.1, 0.05, 0.02, 0.01]
    flat = judged(Schedule(8), 60, likely, kept=1.0, slope=0.0)
    steep = judged(Schedule(8), 60, likely, kept=1.0, slope=0.2)
    assert flat[-1] >= 6
    assert 2 <= steep[-1] <= 4


def test_broken_promises_shorten_drafts_and_switch_them_off():
    """A drafter that promises what the target does not keep is soon asked seldom."""
    heads = judged(Schedule(8), 80, [0.9] * 8, kept=0.0, slope=0.2)
    assert max(heads[:4]) >= 6
    assert sum(n > 1 for n in heads[40:]) <= 2


def test_a_fixed_length_takes_the_whole_draft():
    """What was asked for is verified, however unlikely."""
    assert Schedule(16, fixed=4).head([0.01] * 4) == 4


def test_dear_drafts_are_not_asked_in_full():
    """Where a drafted token costs as much as a step, likelihoods do not make it free."""
    schedule = Schedule(16)
    for _ in range(20):
        n = schedule.next_budget()
        schedule.record(n, int(0.6 * n), 1.0 * n, 1.0 + 0.02 * n, promised=[0.6] * n)
    assert schedule.next_budget() <= 4
