"""The draft length follows what was measured."""

from __future__ import annotations

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
