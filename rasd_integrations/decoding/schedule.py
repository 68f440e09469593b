"""How long the next draft should be, from what this answer and those before it have measured.

Expected tokens per second are ``E(n) / (t(1 + n) + d(n))`` (arXiv 2211.17192, theorem 3.8) for step time ``t`` of
:mod:`.costs`. For a chain of which nothing is said, ``E(n) = (1 - a^(n+1)) / (1 - a)`` with the running acceptance
``a`` and a drafting time for each token. For a draft whose nodes carry their likelihood, chain or tree,
``E(n) = 1 + sum(node_probs[:n])`` with calibrated estimates, and the draft exists already:
only the verify step is to be paid. Such a draft is asked for in each step, and nothing of it verified where that
does not pay. Drafting that would lose time nonetheless is switched off and tried again now and then. Only time
depends on it.

Where another number of rows than the last step's costs time of its own, that time is part of the step's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rasd_integrations.config import Sampling, SpeculationConfig
from rasd_integrations.decoding.costs import CostShape, StepCosts
from rasd_integrations.drafters.base import Drafter
from rasd_integrations.drafters.calibration import Calibration, Judgements
from rasd_integrations.engine.executors.eager import rows_at
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft

_DECAY = 0.9
_PRIOR_ACCEPTED, _PRIOR_TRIED = 1.4, 2.0
_FIRST_PROBE, _LAST_PROBE = 4, 64  # steps from one trial to the next while drafting is off
_PROBING = 0.01  # of the time may go into trials, but for the first ones
_CHEAP = 0.5  # of a plain step
_OUTLIER = 4.0  # a draft that took so many times the usual was held up by something else
_NEAR = 0.25  # prompts whose lengths differ by less have steps of the same shape
# Drafting is judged over some fifty steps, since text is copied in bursts, and found to lose when it has cost so
# many plain steps: soon where it is dear, late where it is cheap. One step counts for little: a first draft is dear,
# and so are other rows than the last step's, and both are soon made good.
_MEMORY = 0.98
_LOST = 2.0
_LOST_AT_ONCE = 0.5
# Another text may copy what the last did not, and answers begin with words of their own: each one begins with what
# drafting won in earlier ones, within these limits.
_GRACE, _CREDIT = 2.0, 8.0


def check_lockstep(drafter: Drafter | None, config: SpeculationConfig, params: Sampling) -> None:
    """See that processes that run one model together would take the same steps: each has a clock of its own.

    Args:
        drafter: ``None`` decodes plainly.
        config: Of the answer.
        params: Of the answer.

    Raises:
        ConfigurationError: Steps could differ from process to process, which would leave all of them waiting.
    """
    faults = []
    if drafter is not None and config.num_draft_tokens is None:
        faults.append("num_draft_tokens is None, so that the clock chooses it; set it")
    if drafter is not None and drafter.needs.timing:
        faults.append("the drafter chooses its parts by the clock; give a model or None")
    if params.temperature > 0 and params.seed is None:
        faults.append("seed is None, so that each process would draw its own; set it")
    if faults:
        msg = f"A model split by tp_plan needs the same steps in every process, but {'; '.join(faults)}."
        raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Experience:
    """What one answer leaves to the next.

    Attributes:
        costs: Of steps.
        prefix: Tokens of the prompt that they were found over.
        estimates: How far those of drafts held.
        lost: Plain steps that drafting cost of late, less what it won.
        draft_s: Seconds of a draft of full length whose nodes carry their likelihood, once known.
    """

    costs: CostShape | None = None
    prefix: int = 0
    calibration: Judgements | None = None
    lost: float = 0.0
    draft_s: float | None = None


class _Option(NamedTuple):
    """A draft of ``tokens``: what it is expected to yield, and seconds besides the step."""

    tokens: int
    expected: float
    seconds: float = 0.0


class Schedule:
    """Chooses the draft length of one answer.

    Attributes:
        rows: As how many rows the coming step should be run at least.
    """

    def __init__(
        self,
        max_draft_tokens: int,
        fixed: int | None = None,
        *,
        row_multiple: int = 1,
        prefix: int = 0,
        experience: Experience | None = None,
    ) -> None:
        """Choose up to ``max_draft_tokens``, or always ``fixed`` where given.

        Args:
            max_draft_tokens: Longest draft.
            fixed: Length of every draft.
            row_multiple: Step widths are ``1 + k * row_multiple``; above 1 if changing the width costs time.
            prefix: Tokens of the prompt.
            experience: Of earlier answers.
        """
        self.rows = 0
        self._max = max_draft_tokens
        self._fixed = fixed
        self._row_multiple = row_multiple
        self._accepted, self._tried = _PRIOR_ACCEPTED, _PRIOR_TRIED
        experience = experience or Experience()
        self._calibration = Calibration(experience.calibration)
        self._prefix = prefix
        elsewhere = abs(prefix - experience.prefix) > _NEAR * max(prefix, experience.prefix)
        self._costs = StepCosts(experience.costs, changes=row_multiple > 1, elsewhere=elsewhere)
        self._draft_s, self._draft_tokens = 0.0, 0.0
        self._asked = 0
        # Of the last draft whose nodes carried their likelihood, and running average of those of full length.
        self._last_s = self._full_s = experience.draft_s
        self._has_proposed = False
        self._lost = max(min(experience.lost, -_GRACE), -_CREDIT)
        self._wait, self._probe_every = 0, _FIRST_PROBE

    @property
    def experience(self) -> Experience:
        """What the next answer should know."""
        # One that seemed dear is tried anew by the next answer.
        draft_s = self._full_s if self._drafts_cheaply() else None
        known = self._calibration.known
        return Experience(self._costs.shape, self._prefix, known, self._lost, draft_s)

    @property
    def acceptance(self) -> float:
        """Estimated probability that one more drafted token is accepted."""
        return min(self._accepted / self._tried, 0.98)

    def next_budget(self) -> int:
        """Return how many tokens to draft now; 0 says that drafting does not pay at present."""
        fixed = self._fixed
        # A length that is fixed is seldom changed: what the last step ran as will do for a shorter draft.
        self._asked = self._next() if fixed is None else fixed
        if fixed is not None:
            self.rows = min(self._costs.rows, rows_at(1 + fixed, self._row_multiple))
        elif not self._asked:
            self.rows = 0
        return self._asked

    def _next(self) -> int:
        if self._costs.wants_plain:
            return 0
        says = self._last_s is not None and self._drafts_cheaply()
        best = self._max if says else self._best_chain()
        if best and self._lost <= _LOST:
            self._probe_every, self._wait = _FIRST_PROBE, 0
            return best
        self._wait += 1
        if self._wait < self._probe_every:
            return 0
        rarest = min(self._draft_share() / _PROBING, _LAST_PROBE)
        self._wait = 0
        self._probe_every = int(max(min(2 * self._probe_every, rarest), _FIRST_PROBE))
        return best or 1

    def head(self, draft: Draft) -> int:
        """Return how many of a draft's nodes are worth verifying, the first ones."""
        if self._fixed is not None or (draft.node_probs is None and len(draft)):
            return len(draft)
        options, expected = [_Option(0, 1.0)], 1.0
        for n, share in enumerate(self._calibration.node_probs(draft), start=1):
            expected += share
            options.append(_Option(n, expected))
        return self._chosen(options)

    def _chosen(self, options: Sequence[_Option]) -> int:
        """Return the tokens of the best option, and set the rows that it is run as."""
        now = self._costs.rows
        widths = {rows_at(1 + option.tokens, self._row_multiple) for option in options} | {now or 1}
        best = {rows: self._best(options, rows) for rows in widths}
        rows = max(best, key=lambda rows: self._rate(best[rows], rows))
        if self._row_multiple > 1:
            self.rows = rows
        return best[rows].tokens

    def _best(self, options: Iterable[_Option], rows: int) -> _Option:
        """Return the best of what fits ``rows``."""
        fitting = (option for option in options if option.tokens < rows)
        return max(fitting, key=lambda option: self._rate(option, rows))

    def _rate(self, option: _Option, rows: int) -> float:
        return option.expected / (self._costs.at(rows) + self._change_to(rows) + option.seconds)

    def _change_to(self, rows: int) -> float:
        """Return the seconds that a step of ``rows`` takes longer where the last one had other rows."""
        return self._costs.change if self._costs.rows not in (0, rows) else 0.0

    def record(
        self,
        drafted: int,
        accepted: int,
        draft_s: float,
        step_s: float,
        *,
        rows: int | None = None,
        proposed: Draft | None = None,
        committed: Sequence[int] = (),
    ) -> None:
        """Learn from one step.

        Args:
            drafted: Tokens of the drafter that were verified.
            accepted: Of these.
            draft_s: Seconds of drafting.
            step_s: Seconds of the step.
            rows: Of the step, where others than the drafted tokens and the last one were in it.
            proposed: What the drafter proposed before its head was chosen.
            committed: The step's tokens, where they tell whether it was right.
        """
        rows = max(rows_at(1 + drafted if rows is None else rows, self._row_multiple), self.rows)
        change_s = self._change_to(rows)
        self._costs.add(rows, step_s)
        if proposed is None or proposed.node_probs is None:
            self._note_draft(drafted, draft_s)
        else:
            if self._asked and self._has_proposed:  # the first one builds what later ones read
                self._note_draft(drafted, draft_s)
                self._note_proposal(draft_s)
            self._has_proposed |= self._asked > 0
            # What the step should take: what holds it up holds up plain ones too.
            expected_s = self._costs.at(rows) + change_s
            lost = (draft_s + expected_s) / self._costs.at(1) - 1 - accepted
            self._lost = _MEMORY * self._lost + min(lost, _LOST_AT_ONCE)
            self._calibration.judge(proposed, committed)
        if drafted:
            tried = accepted + (accepted < drafted)
            self._accepted = _DECAY * self._accepted + accepted
            self._tried = _DECAY * self._tried + tried

    def _note_draft(self, drafted: int, draft_s: float) -> None:
        self._draft_s = _DECAY * self._draft_s + draft_s
        self._draft_tokens = _DECAY * self._draft_tokens + drafted

    def _note_proposal(self, draft_s: float) -> None:
        self._last_s = draft_s
        if self._asked >= self._max:
            known = draft_s if self._full_s is None else self._full_s
            self._full_s = _DECAY * known + (1 - _DECAY) * min(draft_s, _OUTLIER * known)

    def _drafts_cheaply(self) -> bool:
        """Whether a draft of full length costs so little that its head can be chosen afterwards.

        It is tried once, where shorter ones cost little.
        """
        return self._draft_share() < _CHEAP

    def _draft_share(self) -> float:
        """Return what a draft costs, or a token of it where they come one by one, in plain steps."""
        seconds = self._last_s if self._full_s is None else self._full_s
        return (self._each() if seconds is None else seconds) / self._costs.at(1)

    def _each(self) -> float:
        """Return the seconds of a drafted token."""
        return self._draft_s / self._draft_tokens if self._draft_tokens else 0.0

    def _best_chain(self) -> int:
        a = self.acceptance
        each, lengths = self._each(), range(self._max + 1)
        return self._chosen([_Option(n, (1 - a ** (n + 1)) / (1 - a), n * each) for n in lengths])
