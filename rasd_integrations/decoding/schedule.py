"""Chooses how many drafted tokens each step verifies; it changes time, never tokens.

Of a few step widths the one with the most expected tokens a second runs: one token, and the drafted ones by their
calibrated probabilities, over the width's measured time. A width takes the median of its last steps, and before it has
been run it counts as quick as the next narrower one, so that it is tried. Drafting that loses time is off, except for
trials within an :class:`~rasd_integrations.drafters.calibration.Allowance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from math import log2
from statistics import median_low

from rasd_integrations.drafters.calibration import Allowance, Calibration
from rasd_integrations.engine.executors.eager import rows_at
from rasd_integrations.types import Draft

_TIMES = 5  # steps of a width that its median is of
_ENOUGH = 2  # steps: the first of a width may take longer
_STALE = 128  # steps after which the plain step is timed again
_CHEAP = 0.5  # plain steps; a draft below that is asked for in full, and cut afterwards
_FIRST_DRAFT = 4  # tokens, while it is not known what they cost
_NO_GAIN = "drafting does not pay on this text"
_TIMED = "a plain step is timed, to compare drafts with"


class StepTimes:
    """Times of steps by width; first steps of a width are apart if changes cost time."""

    def __init__(self, *, change_costs: bool = False) -> None:
        """Know nothing yet."""
        self.width = 0  # of the last step
        self._change_costs = change_costs
        self._plain: tuple[float, ...] = ()  # seconds
        self._shares: dict[tuple[int, bool], tuple[float, ...]] = {}  # of a plain step's time
        self._age = 0  # steps since a plain one was timed

    @property
    def wants_plain(self) -> bool:
        """True if the plain step, by which others are measured, has not been timed recently."""
        return len(self._plain) < _ENOUGH or self._age > _STALE

    @property
    def plain(self) -> float:
        """Seconds of a plain step."""
        return median_low(self._plain or (1.0,))

    def next(self, width: int) -> float:
        """Return the expected time of a next step of ``width``, in plain steps."""
        changed = self._change_costs and width != self.width
        return self._share(width, changed=True) or self._of(width) if changed else self._of(width)

    def add(self, width: int, seconds: float) -> None:
        """Learn from a step."""
        changed = self._change_costs and width != self.width
        self.width = width
        self._age += 1
        if width == 1 and not changed:
            self._plain, self._age = (*self._plain[1 - _TIMES :], seconds), 0
        elif self._plain:
            key = width, changed
            self._shares[key] = (*self._shares.get(key, ())[1 - _TIMES :], seconds / self.plain)

    def _of(self, width: int) -> float:
        """Return the time of a step of ``width`` after one of the same width."""
        if width == 1:
            return 1.0
        if share := self._share(width, changed=False):
            return share
        # Not measured yet: as quick as the widest narrower one, so that it is tried.
        narrower = [w for w, _ in self._shares if w < width and self._share(w, changed=False)]
        return self._of(max(narrower)) if narrower else 1.0

    def _share(self, width: int, *, changed: bool) -> float | None:
        seen = self._shares.get((width, changed), ())
        return median_low(seen) if len(seen) >= _ENOUGH else None


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """What an answer hands on to the next.

    Attributes:
        times: Of steps, by the length of the prompt.
        calibration: Of the drafter.
        allowance: Of drafting.
        draft_s: Seconds of a drafted token, of the last drafts.
    """

    times: Mapping[int, StepTimes] = field(default_factory=dict)
    calibration: Calibration | None = None
    allowance: Allowance | None = None
    draft_s: tuple[float, ...] = ()


class Schedule:
    """Chooses the draft lengths of one answer.

    Attributes:
        rows: Pad the next step to at least this many rows.
        off_reason: Why the last budget was 0, if it was.
        acceptance: Share of the tried tokens that were accepted, running average.
    """

    def __init__(
        self,
        max_draft_tokens: int,
        fixed: int | None = None,
        *,
        row_multiple: int = 1,
        prompt_tokens: int = 1,
        state: ScheduleState | None = None,
    ) -> None:
        """Choose up to ``max_draft_tokens``, or always ``fixed`` if given.

        Args:
            max_draft_tokens: Longest draft.
            fixed: Length of every draft.
            row_multiple: Widths are rounded up to ``1 + k * row_multiple``; above 1 a change of width costs time.
            prompt_tokens: Length of the prompt: step times are those of other prompts of about that length.
            state: Of the last answer.
        """
        self.rows = 0
        self.off_reason = ""
        self._max, self._fixed, self._multiple = max_draft_tokens, fixed, row_multiple
        lengths = (0, *(1 << k for k in range(max_draft_tokens.bit_length())), max_draft_tokens)
        self._widths = sorted({rows_at(1 + n, row_multiple) for n in lengths})
        self._before = state or ScheduleState()
        self._length = int(2 * log2(max(prompt_tokens, 1)))
        known = self._before.times.get(self._length)
        self._times = deepcopy(known) or StepTimes(change_costs=row_multiple > 1)
        self._times.width = 0
        self._calibration = deepcopy(self._before.calibration) or Calibration()
        self._allowance = Allowance(self._before.allowance)
        self._draft_s = self._before.draft_s
        self._asked = 0
        self._has_drafted = False
        self.acceptance = 0.7

    @property
    def state(self) -> ScheduleState:
        """What the next answer should know."""
        times = {**self._before.times, self._length: self._times}
        return ScheduleState(times, self._calibration, self._allowance, self._draft_s)

    def next_budget(self) -> int:
        """Return how many tokens to draft now; 0 if drafting does not pay at present."""
        if self._fixed is not None:
            self._asked = self._fixed
            self.rows = min(self._times.width, rows_at(1 + self._fixed, self._multiple))
        else:
            pays, is_timed = self._allowance.allows, self._times.wants_plain
            self.off_reason = _TIMED if pays and is_timed else "" if pays else _NO_GAIN
            self._asked = 0 if self.off_reason else self._length_worth_asking()
            self.rows = 0
        return self._asked

    def _width(self, rows: int) -> int:
        """Return the width that a step of ``rows`` runs in."""
        ran = rows_at(rows, self._multiple)
        return next((w for w in self._widths if w >= ran), ran)

    def _length_worth_asking(self) -> int:
        if not self._draft_s:
            return min(_FIRST_DRAFT, self._max)
        each = median_low(self._draft_s) / self._times.plain
        if each * self._max < _CHEAP:
            return self._max
        a = min(self.acceptance, 0.98)

        def rate(width: int) -> float:
            n = min(width - 1, self._max)
            return (1 - a ** (n + 1)) / (1 - a) / (self._times.next(width) + n * each)

        return min(max(self._widths[1:], key=rate) - 1, self._max)

    def head(self, draft: Draft) -> int:
        """Return how many of a draft's first nodes to verify; set the step's width."""
        if self._fixed is not None:
            return len(draft)
        expected = [*accumulate(self._calibration.node_probs(draft), initial=1.0)]
        nodes = {width: min(width - 1, len(draft)) for width in self._widths}
        width = max(nodes, key=lambda w: expected[nodes[w]] / self._times.next(w))
        self.rows = width if self._multiple > 1 else 0
        return nodes[width]

    def record(
        self,
        drafted: int,
        accepted: int,
        draft_s: float,
        step_s: float,
        rows: int,
        proposed: Draft,
        committed: Sequence[int],
    ) -> None:
        """Learn from one step.

        Args:
            drafted: Tokens of the drafter that were verified.
            accepted: Of these.
            draft_s: Seconds of drafting.
            step_s: Seconds of the step.
            rows: Of the step, tokens included that a grammar forced.
            proposed: The draft before it was cut.
            committed: The step's tokens.
        """
        width = self._width(max(rows, self.rows))
        # What a grammar forces would have been in a step without a draft too.
        without = self._width(rows - drafted)
        plain = 1.0 if without == 1 else self._times.next(without)
        cost = self._times.next(width)
        self._times.add(width, step_s)
        if self._asked:
            if self._has_drafted:  # the first draft builds what later ones read
                self._draft_s = (*self._draft_s[1 - _TIMES :], draft_s / self._asked)
            self._has_drafted = True
            cost += self._asked * median_low(self._draft_s or (0.0,)) / self._times.plain
            self._calibration.count(proposed, committed)
        self._allowance.step(plain + accepted - cost)
        if drafted:
            share = accepted / (accepted + (accepted < drafted))
            self.acceptance += 0.1 * (share - self.acceptance)
