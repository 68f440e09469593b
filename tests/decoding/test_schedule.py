"""The draft length follows what was measured."""

from __future__ import annotations

import random

import pytest

from rasd_integrations.decoding.schedule import Experience, Schedule
from rasd_integrations.types import Draft


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


def test_acceptance_is_of_the_tokens_that_were_tried():
    """Those behind a refused one were neither right nor wrong."""
    schedule = Schedule(16)
    for _ in range(100):
        schedule.record(8, 1, 0.0, 1.0)
    assert schedule.acceptance == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("cost", [0.0, 0.1])
def test_dearer_drafts_are_shorter(cost):
    """The draft length falls as a drafted token costs more."""
    cheap = after(Schedule(16), 30, share=0.7, draft_s=cost, slope=0.02).next_budget()
    dear = after(Schedule(16), 30, share=0.7, draft_s=cost + 0.3, slope=0.02).next_budget()
    assert dear <= cheap


def test_fixed_length_is_kept():
    """A fixed length is not negotiated."""
    assert after(Schedule(16, fixed=5), 20, share=0.0, draft_s=1.0, slope=1.0).next_budget() == 5


def chain(node_probs: list[float]) -> Draft:
    """Return a chain whose nodes are reached and accepted so often, in the drafter's estimate."""
    return Draft(tuple(range(len(node_probs))), node_probs=tuple(node_probs))


def judged(schedule: Schedule, steps: int, node_probs: list[float], *, kept: float, slope: float):
    """Run steps whose drafts promise ``node_probs``, of which the target keeps the share ``kept``."""
    heads, chance = [], random.Random(0)
    distribution = [kept * share for share in node_probs]
    for step in range(steps):
        most = schedule.next_budget() if step % 4 else 1  # drafts of several widths show the slope
        proposed = chain(node_probs[:most])
        n = schedule.head(proposed)
        heads.append(n)
        draw = chance.random()
        right = sum(draw < share for share in distribution)
        stood = min(n, right)
        how = {"proposed": proposed, "committed": [*range(stood), stood if right > stood else -1]}
        schedule.record(n, stood, 0.001, 1.0 + slope * n, **how)
    return heads


def test_nodes_are_taken_while_they_are_worth_their_rows():
    """Steep steps take the sure head of a draft, flat ones all of it."""
    node_probs = [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    flat = judged(Schedule(8), 60, node_probs, kept=1.0, slope=0.0)
    steep = judged(Schedule(8), 60, node_probs, kept=1.0, slope=0.5)
    assert flat[-1] >= 6
    assert 2 <= steep[-1] <= 5


def test_broken_promises_shorten_drafts():
    """Of a drafter that promises what the target does not keep nothing is verified after a while."""
    cheap = Experience(
        draft_s=0.001
    )  # known from an earlier answer, so that all is asked for at once
    heads = judged(Schedule(8, experience=cheap), 80, [0.9] * 8, kept=0.0, slope=0.2)
    assert max(heads[:8]) >= 4
    assert sum(n > 0 for n in heads[40:]) <= 2


def test_what_is_not_verified_is_judged():
    """A drafter that was found out and is right again is believed again, without a node of it being tried."""
    schedule = Schedule(8)
    judged(schedule, 80, [0.9] * 8, kept=0.0, slope=0.2)
    proposed = chain([0.9, 0.81])
    assert schedule.head(proposed) == 0
    for _ in range(600):
        schedule.record(0, 0, 0.0, 1.0, proposed=proposed, committed=[0])
    assert schedule.head(proposed) == 2


@pytest.mark.parametrize(("draft_s", "off"), [(0.5, True), (0.1, True), (0.01, False)])
def test_drafts_that_never_pay_are_asked_seldom(draft_s, off):
    """Right drafts of dear drafters lose, too; those that cost next to nothing are asked on."""
    schedule, asked = Schedule(8), []
    for _ in range(160):
        budget = schedule.next_budget()
        proposed = chain([0.02] * 4) if budget else Draft()
        n = schedule.head(proposed) if budget else 0
        asked.append(budget > 0)
        schedule.record(
            n, 0, draft_s * (budget > 0), 1.0 + 0.3 * n, proposed=proposed, committed=[-1]
        )
    assert (sum(asked[80:]) <= 20) == off
    if off:
        first_off = asked.index(False, 1)
        assert first_off <= 1 + 2 * 2.0 / draft_s


def test_a_fixed_length_takes_the_whole_draft():
    """What was asked for is verified, however unlikely."""
    assert Schedule(16, fixed=4).head(chain([0.01] * 4)) == 4


def test_dear_drafts_are_not_asked_in_full():
    """Where a drafted token costs as much as a step, likelihoods do not make it free."""
    schedule = Schedule(16)
    for _ in range(20):
        n = schedule.next_budget()
        schedule.record(n, int(0.6 * n), 1.0 * n, 1.0 + 0.02 * n, proposed=chain([0.6] * n))
    assert schedule.next_budget() <= 4


def test_one_dear_draft_switches_nothing_off():
    """A first draft that builds what later ones read, or a step that was held up, says little of the rest."""
    schedule = Schedule(8)
    judged(schedule, 20, [0.5, 0.3], kept=1.0, slope=0.2)
    proposed = chain([0.5, 0.3])
    schedule.record(2, 0, 0.9, 2.4, proposed=proposed, committed=[-1])
    assert schedule.next_budget() > 0


def losing(schedule: Schedule) -> int:
    """Return the steps that are drafted in of 100 whose drafts never come true."""
    asked = 0
    for _ in range(100):
        budget = schedule.next_budget()
        proposed = chain([0.02] * 4) if budget else Draft()
        schedule.head(proposed)
        asked += budget > 0
        schedule.record(0, 0, 0.1 * (budget > 0), 1.0, proposed=proposed, committed=[-1])
    return asked


def test_what_was_won_in_an_answer_is_no_licence_to_lose_in_the_next():
    """After an answer that was copied whole, drafts that never pay are found out nearly as soon as after none."""
    copied = Schedule(8)
    judged(copied, 40, [0.99] * 8, kept=1.0, slope=0.05)
    assert losing(Schedule(8)) < losing(Schedule(8, experience=copied.experience)) <= 90


@pytest.mark.parametrize("first_s", [0.001, 0.9, 9.0])
def test_the_first_draft_of_an_answer_does_not_tell_what_drafts_cost(first_s):
    """Where it builds what later ones read, later drafts are asked for in full all the same, and in later answers."""
    schedule = Schedule(8)
    for _ in range(3):
        for step in range(12):
            budget = schedule.next_budget()
            proposed = chain([0.9] * budget)
            n = schedule.head(proposed) if budget else 0
            draft_s = (0.001 if step > 4 else first_s) if budget else 0.0
            schedule.record(n, n, draft_s, 1.0, proposed=proposed, committed=list(range(n + 1)))
            first_s = first_s if not budget else 0.001
        assert schedule.next_budget() == 8
        schedule, first_s = Schedule(8, experience=schedule.experience), 9.0


def test_a_draft_that_was_held_up_once_is_asked_for_in_full_again():
    """Also where that was the last one of its answer."""
    schedule = Schedule(8)
    judged(schedule, 20, [0.9] * 8, kept=1.0, slope=0.05)
    schedule.next_budget()
    schedule.record(0, 0, 50.0, 1.0, proposed=chain([0.9] * 8), committed=[0])
    assert schedule.next_budget() == 8
    assert Schedule(8, experience=schedule.experience).next_budget() == 8


def test_an_answer_is_not_charged_with_what_earlier_ones_lost():
    """Where drafting was off in the last answer, it is tried at the start of the next."""
    last = Schedule(8)
    losing(last)
    assert last.experience.lost > 2
    assert Schedule(8, experience=last.experience).next_budget() > 0
