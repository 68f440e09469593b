"""The schedule runs what was measured to be quickest, and never loses much to plain decoding."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from rasd_integrations.decoding.schedule import Schedule, ScheduleState, StepTimes
from rasd_integrations.engine.executors.eager import rows_at
from rasd_integrations.types import Draft


@dataclass
class Machine:
    """Steps of ``1 + slope * (width - 1)`` seconds on average, and what was run on it."""

    slope: float = 0.02
    jump: float = 0.0  # of any width above 1
    change: float = 0.0
    row_multiple: int = 1
    draft_s: Callable[[int], float] = lambda n: 0.001
    seconds: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        """Draw the same numbers each time."""
        self.chance, self.last = random.Random(0), 0

    def step_s(self, width: int) -> float:
        """Return the seconds of a step of ``width``."""
        change = self.change * (width != self.last)
        return 1.0 + self.slope * (width - 1) + self.jump * (width > 1) + change

    def run(
        self,
        schedule: Schedule,
        steps: int,
        said: Sequence[float] | None,
        right: Sequence[float],
        forced: int = 0,
    ) -> list[tuple[int, int, int]]:
        """Run steps with chains of ``said`` probabilities whose tokens are right with those in ``right``.

        A grammar forces ``forced`` tokens more in every fourth step.

        Returns:
            Tokens asked for, tokens verified and the width of each step.
        """
        seen = []
        for step in range(steps):
            more = 0 if step % 4 else forced
            asked = schedule.next_budget()
            n = min(asked, len(right))
            probs = None if said is None else tuple(said[:n])
            proposed = Draft(tuple(range(n)), node_probs=probs)
            verified = schedule.head(proposed) if asked else 0
            draw = self.chance.random()
            good = sum(draw < p for p in right)
            accepted = min(verified, good)
            rows = 1 + verified + more
            width = max(rows_at(rows, self.row_multiple), schedule.rows)
            committed = [*range(accepted), accepted if good > accepted else -1]
            draft_s, step_s = self.draft_s(asked) if asked else 0.0, self.step_s(width)
            schedule.record(verified, accepted, draft_s, step_s, rows, proposed, committed)
            self.seconds, self.tokens = self.seconds + draft_s + step_s, self.tokens + accepted + 1
            self.last = width
            seen.append((asked, verified, width))
        return seen


SURE, FAIR, POOR = [0.99**n for n in range(1, 17)], [0.7**n for n in range(1, 17)], [0.02] * 16
NONE = [0.0] * 16


def asked(seen: list[tuple[int, int, int]]) -> int:
    """Return in how many steps a draft was asked for."""
    return sum(n > 0 for n, _, _ in seen)


@pytest.mark.parametrize("said", [None, SURE], ids=["unrated", "rated"])
def test_free_and_right_drafts_grow_to_the_limit(said):
    """If every token is accepted and steps cost the same, drafts are as long as allowed."""
    seen = Machine(slope=0.0, draft_s=lambda n: 0.0).run(Schedule(16), 60, said, [1.0] * 16)
    assert seen[-1] == (16, 16, 17)


def per_token(seconds: float) -> Callable[[int], float]:
    """Return the cost of drafts whose tokens come one by one."""
    return lambda n: seconds * n


HOPELESS = {
    "cheap": Machine(draft_s=lambda n: 0.05),
    "flat": Machine(draft_s=lambda n: 0.3),
    "dear": Machine(draft_s=per_token(0.5)),
    "dear and wide": Machine(slope=0.3, draft_s=per_token(0.5)),
    "compiled": Machine(slope=0.03, jump=0.3, change=0.35, row_multiple=4, draft_s=lambda n: 0.1),
}


@pytest.mark.parametrize("said", [None, FAIR, POOR], ids=["unrated", "hopeful", "modest"])
@pytest.mark.parametrize("kind", HOPELESS)
def test_drafts_that_never_fit_lose_less_than_three_percent(kind, said):
    """Over some answers, each of which tries again."""
    machine, state = replace(HOPELESS[kind]), ScheduleState()
    for _ in range(5):
        schedule = Schedule(16, row_multiple=machine.row_multiple, prompt_tokens=900, state=state)
        last = machine.run(schedule, 100, said, NONE)
        state = schedule.state
    assert machine.tokens / machine.seconds >= 0.97
    assert asked(last) <= (45 if kind == "cheap" else 30)


def test_off_is_tried_again():
    """A text that becomes easy is noticed."""
    schedule = Schedule(16)
    assert asked(Machine(draft_s=per_token(0.5)).run(schedule, 100, FAIR, NONE)[50:]) <= 4
    assert Machine(slope=0.01).run(schedule, 200, SURE, SURE)[-1][1] > 4


def test_dearer_drafts_are_shorter():
    """Where tokens are drafted one by one, fewer are asked for as they cost more."""
    lengths = []
    for cost in (0.01, 0.1, 0.3):
        seen = Machine(draft_s=per_token(cost)).run(Schedule(16), 80, FAIR, FAIR)
        lengths.append(sum(n for n, _, _ in seen[40:]) / 40)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 16
    assert lengths[-1] < 4


def test_acceptance_is_of_the_tokens_that_were_tried():
    """Those after a refused one were neither right nor wrong."""
    schedule = Schedule(16)
    for _ in range(100):
        schedule.record(8, 1, 0.0, 1.0, 9, Draft(), [0, 0])
    assert schedule.acceptance == pytest.approx(0.5, abs=0.01)


def test_a_fixed_length_is_kept():
    """What was asked for is verified, however unlikely and dear."""
    machine = Machine(slope=1.0, draft_s=per_token(1.0))
    assert set(machine.run(Schedule(16, fixed=5), 40, POOR, NONE)) == {(5, 5, 6)}


def test_nodes_are_taken_while_they_are_worth_their_positions():
    """Steep steps take the sure head of a draft, flat ones all of it."""
    probs = [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    flat, steep = (Machine(slope=s).run(Schedule(8), 100, probs, probs) for s in (0.0, 0.5))
    assert flat[-1][1] == 8
    assert 1 <= steep[-1][1] <= 4


def test_probabilities_are_calibrated_by_what_was_not_verified_too():
    """Of a drafter that promises too much nothing is verified; once it is right again, it is believed again."""
    schedule, machine = Schedule(8), Machine(slope=0.2)
    seen = machine.run(schedule, 200, [0.9**n for n in range(1, 9)], NONE)
    assert max(verified for _, verified, _ in seen[:20]) >= 4
    assert sum(verified > 0 for _, verified, _ in seen[40:]) <= 8
    draft = Draft((0, 1), node_probs=(0.9, 0.81))
    assert schedule.head(draft) == 0
    for _ in range(600):
        schedule.next_budget()
        schedule.record(0, 0, 0.0, 1.0, 1, draft, [0])
    assert schedule.head(draft) == 2


@pytest.mark.parametrize("held_up", ["first draft", "a draft", "a step", "a plain step"])
def test_what_was_held_up_once_switches_nothing_off(held_up):
    """A first draft builds what later ones read; a slow one says nothing of the rest, also in the next answer."""
    schedule, machine = Schedule(8), Machine(slope=0.05)
    if held_up == "first draft":
        machine.draft_s = lambda n: 9.0
        machine.run(schedule, 3, SURE, SURE)
        machine.draft_s = lambda n: 0.001
    machine.run(schedule, 20, SURE, SURE)
    schedule.next_budget()
    draft_s, step_s = (50.0, 1.0) if held_up == "a draft" else (0.001, 1.0)
    if held_up in ("a step", "a plain step"):
        n = 0 if "plain" in held_up else 8
        schedule.record(n, 0, 0.001, 40.0, 1 + n, Draft(), [0])
        schedule.next_budget()
    schedule.record(0, 0, draft_s, step_s, 1, Draft((0,), node_probs=(0.9,)), [0])
    assert schedule.next_budget() == 8
    assert Schedule(8, state=schedule.state).next_budget() == 8


def test_an_answer_is_not_charged_with_all_that_earlier_ones_lost():
    """If drafting was off in the last answer, it is tried at the start of the next."""
    last = Schedule(8)
    Machine(draft_s=per_token(0.5)).run(last, 60, POOR, NONE)
    assert last.next_budget() == 0
    assert Schedule(8, state=last.state).next_budget() > 0


def test_what_was_won_in_an_answer_is_no_licence_to_lose_in_the_next():
    """After an answer that was copied whole, drafts that never fit are found out, a little later than after none."""
    machine, copied = Machine(draft_s=lambda n: 0.2), Schedule(8)
    machine.run(copied, 40, SURE, SURE)
    after_none = asked(machine.run(Schedule(8), 100, POOR, NONE))
    assert after_none <= asked(machine.run(Schedule(8, state=copied.state), 100, POOR, NONE)) <= 60


def test_widths_are_filled_up():
    """A step of one row stays one; others are the next of ``1 + k * row_multiple``."""
    assert [rows_at(n, 4) for n in (1, 2, 5, 6, 17)] == [1, 5, 5, 9, 17]
    assert [rows_at(n, 1) for n in (1, 2, 17)] == [1, 2, 17]


def timed(times: StepTimes, widths: Sequence[int], plain: float, change: float = 0.0) -> StepTimes:
    """Show steps of which a wide one takes half a plain step more, and a tenth of one for each position."""
    last = 0
    for width in widths:
        step = 1 + (0.5 + 0.1 * (width - 1)) * (width > 1) + change * (width != last)
        times.add(width, plain * step)
        last = width
    return times


def test_each_width_has_its_own_time():
    """No line is fitted; one that was not run twice is as quick as the next narrower one, until it is tried."""
    times = timed(StepTimes(), [1, 1, 3, 3, 9, 9, 17], plain=0.02)
    expected = {1: 1.0, 2: 1.0, 3: 1.7, 5: 1.7, 9: 2.3, 17: 2.3}
    assert times.plain == pytest.approx(0.02)
    assert {width: times.next(width) for width in expected} == pytest.approx(expected)


def test_a_change_of_width_is_told_from_the_width():
    """If graphs are fitted to widths, the first step of a width is not what its steps cost."""
    widths = [n for n in (1, 5, 1, 9, 5) for _ in range(4)] * 4
    times = timed(StepTimes(change_costs=True), widths, plain=0.02, change=0.4)
    assert [times.next(n) for n in (5, 1, 9)] == pytest.approx([1.9, 1.4, 2.7])


@pytest.mark.parametrize("width", [1, 9])
def test_one_step_that_was_held_up_moves_no_time(width):
    """The median is taken."""
    times = timed(StepTimes(), [1, 1, *[width] * 10], plain=0.02)
    before = times.plain, times.next(9)
    times.add(width, 2.0)
    assert (times.plain, times.next(9)) == before


def test_the_plain_step_is_timed_again_now_and_then():
    """The times of wider ones are shares of it: on a machine that slows down, they stay."""
    times = timed(StepTimes(), [1, 1, 9, 9], plain=0.02)
    assert not times.wants_plain
    timed(times, [9] * 200, plain=0.02)
    assert times.wants_plain
    timed(times, [1] * 5, plain=0.04)
    assert not times.wants_plain
    assert (times.plain, times.next(9)) == pytest.approx((0.04, 2.3))


def test_prompts_of_another_length_are_measured_anew():
    """The plain step is timed first, and the times over the first length are kept."""
    short = Schedule(8, row_multiple=4, prompt_tokens=900)
    Machine(row_multiple=4).run(short, 60, FAIR, FAIR)
    same, long = (
        Schedule(8, row_multiple=4, prompt_tokens=n, state=short.state) for n in (920, 7200)
    )
    assert same.next_budget() > 0
    assert long.next_budget() == 0
    Machine(row_multiple=4).run(long, 9, FAIR, FAIR)
    assert Schedule(8, row_multiple=4, prompt_tokens=900, state=long.state).next_budget() > 0


def test_widths_change_if_the_step_pays_for_it():
    """A dear change is made for what lasts, a cheap one for a single good draft; hopeless drafts run alone."""

    def widths(change: float, probs: Sequence[float]) -> list[int]:
        schedule, seen = Schedule(4, row_multiple=4), []
        machine = Machine(slope=0.05, jump=0.2, change=change, row_multiple=4)
        for step in range(300):
            p = probs[step % len(probs)]
            said = [p**n for n in range(1, 5)]
            seen += machine.run(schedule, 1, said, said)
        return [width for _, _, width in seen[100:]]

    def changes(seen: list[int]) -> int:
        return sum(a != b for a, b in pairwise(seen))

    assert changes(widths(0.0, [0.9, 0.1, 0.1])) > 80
    assert changes(widths(0.9, [0.9, 0.1, 0.1])) < 20
    assert widths(0.5, [0.9]).count(5) > 180
    assert widths(0.5, [0.05]).count(1) > 190


def test_an_empty_draft_widens_nothing():
    """Nothing drafted, nothing added."""
    schedule = Schedule(8, row_multiple=4)
    Machine(row_multiple=4).run(schedule, 4, NONE, NONE)
    assert schedule.head(Draft()) == 0
    assert schedule.rows == 1


def test_what_a_grammar_forces_is_not_charged_to_drafts():
    """A plain step has the same forced tokens, in as wide a step."""
    machine = Machine(slope=0.05, change=0.35, row_multiple=4)
    schedule = Schedule(16, row_multiple=4)
    right = (0.35,)
    seen = machine.run(schedule, 400, right, right, forced=12)
    assert sum(asked > 0 for asked, _, _ in seen) > 380
