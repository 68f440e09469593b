"""How long the next draft should be, from what this answer has measured so far.

Expected tokens per second are ``E(n) / (t(1 + n) + d(n))`` (algorithms.md 8.1, 8.2), with the step time ``t`` of
:mod:`.costs`. For a chain of which nothing is said, ``E(n) = (1 - a^(n+1)) / (1 - a)`` with the running acceptance
``a`` and a drafting time for each token. For a draft whose nodes carry their likelihood, chain or tree,
``E(n) = 1 + sum(c * likely[:n])`` with ``c`` the running share of what likelihoods of that size promised, and the draft
is there already: only the verify step is to be paid. Drafting that would lose time is switched off and tried again
now and then. Only time depends on it.

Where another number of rows than the last step's costs time of its own, a step is run as that many rows, and the
number is changed once what another one would have saved of late outweighs the change.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.engine.costs import CostShape, StepCosts, rows_at
from rasd_integrations.errors import ConfigurationError

_DECAY = 0.9
_PRIOR_ACCEPTED, _PRIOR_TRIED = 1.4, 2.0
_SIZES = (
    0.5,
    0.2,
)  # of likelihoods that are judged apart: drafters err most in their unlikely nodes
_PRIOR_KEPT = (
    3.0  # promised tokens of each size that are taken for kept besides those that were seen
)
_REMEMBERED = 40.0  # promised tokens over which it is judged how many are kept
_FIRST_PROBE, _LAST_PROBE = 4, 64  # steps from one trial to the next while drafting is off
_PROBING = 0.01  # of the time may go into trials, but for the first ones
_CHEAP = 0.5  # of a plain step
_LEAST_STEPS = 5.0  # with a draft, before drafting can be found to lose


def check_lockstep(drafter: object, config: SpeculationConfig, params: SamplingParams) -> None:
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
    if getattr(drafter, "keeps_time", False):
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
        promised: Tokens that drafts promised of late, for each size of likelihood.
        kept: Of these.
        steps: Recent ones for which drafts were made.
        won: Tokens accepted in them.
        spent: Their time with drafting, in plain steps.
    """

    costs: CostShape | None = None
    promised: tuple[float, ...] = (0.0,) * (1 + len(_SIZES))
    kept: tuple[float, ...] = (0.0,) * (1 + len(_SIZES))
    steps: float = 0.0
    won: float = 0.0
    spent: float = 0.0


class _Option(NamedTuple):
    """A draft of ``tokens``: what it is expected to yield, and seconds besides the step."""

    tokens: int
    expected: float
    seconds: float = 0.0


def _size(share: float) -> int:
    return sum(share < bound for bound in _SIZES)


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
        grain: int = 1,
        experience: Experience | None = None,
    ) -> None:
        """Choose up to ``max_draft_tokens``, or always ``fixed`` where given.

        Args:
            max_draft_tokens: Longest draft.
            fixed: Length of every draft.
            grain: Steps are run as ``1 + k * grain`` rows, and changes of their number cost time if above 1.
            experience: Of earlier answers.
        """
        self.rows = 0
        self._max = max_draft_tokens
        self._fixed = fixed
        self._grain = grain
        self._accepted, self._tried = _PRIOR_ACCEPTED, _PRIOR_TRIED
        experience = experience or Experience()
        self._promised, self._kept = list(experience.promised), list(experience.kept)
        self._costs = StepCosts(experience.costs or CostShape(), changes=grain > 1)
        self._is_new = experience.costs is None
        self._saved: dict[int, float] = {}  # seconds that other rows would have saved of late
        self._draft_s, self._draft_tokens = 0.0, 0.0
        self._asked = 0
        self._last_s: float | None = None  # of the last draft whose nodes carried their likelihood
        self._full_s: float | None = None  # of a draft of full length, running average
        # Steps with a draft of known likelihoods: their number, the tokens won, the plain steps with drafting.
        self._steps, self._won, self._spent = experience.steps, experience.won, experience.spent
        self._wait, self._probe_every = 0, _FIRST_PROBE

    @property
    def experience(self) -> Experience:
        """What the next answer should know."""
        promises = tuple(self._promised), tuple(self._kept)
        return Experience(self._costs.shape, *promises, self._steps, self._won, self._spent)

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
            self.rows = min(self._costs.rows, rows_at(1 + fixed, self._grain))
        elif not self._asked:
            self.rows = 0
        return self._asked

    def _next(self) -> int:
        if self._is_new and not self._costs.knows_plain:
            return 0  # what drafting is to be measured by
        best = self._max if self._steps and self._drafts_cheaply() else self._best_chain()
        if best and not self._loses():
            self._probe_every, self._wait = _FIRST_PROBE, 0
            return best
        self._wait += 1
        if self._wait < self._probe_every:
            return 0
        rarest = min(self._draft_share() / _PROBING, _LAST_PROBE)
        self._wait, self._probe_every = (
            0,
            int(max(min(2 * self._probe_every, rarest), _FIRST_PROBE)),
        )
        return best or 1

    def head(self, likely: Sequence[float]) -> int:
        """Return how many of a draft's nodes are worth verifying, the first ones.

        Args:
            likely: How likely each node is reached and accepted, in the drafter's opinion.
        """
        if self._fixed is not None:
            return len(likely)
        trust = [
            min((kept + _PRIOR_KEPT) / (promised + _PRIOR_KEPT), 1.5)
            for kept, promised in zip(self._kept, self._promised, strict=True)
        ]
        options, expected = [_Option(0, 1.0)], 1.0
        for n, share in enumerate(likely, start=1):
            expected += min(trust[_size(share)] * share, 1.0)
            options.append(_Option(n, expected))
        return self._chosen(options)

    def _chosen(self, options: Sequence[_Option]) -> int:
        """Return the tokens of the best option; where changes cost time, of the best at rows that pay for longer."""
        if self._grain == 1:
            return self._best(options, None).tokens
        now = self._costs.rows
        widths = {rows_at(1 + option.tokens, self._grain) for option in options} | {now or 1}
        best = {rows: self._best(options, rows) for rows in widths}
        stay = best.get(now)
        if stay is None:
            self.rows = max(best, key=lambda rows: self._rate(best[rows], rows))
            return best[self.rows].tokens
        for rows in widths - {now}:
            # Seconds that this step would have taken less for as many tokens.
            saved = self._seconds(stay, now) - stay.expected / self._rate(best[rows], rows)
            self._saved[rows] = _DECAY * self._saved.get(rows, 0.0) + saved
        self.rows = now
        move = max(self._saved, key=self._saved.__getitem__, default=now)
        if move in best and self._saved.get(move, 0.0) > self._costs.change:
            self._saved.clear()
            self.rows = move
        return best[self.rows].tokens

    def _best(self, options: Iterable[_Option], rows: int | None) -> _Option:
        """Return the best of what fits ``rows``; of all, each run as its own, where ``None``."""
        return max(
            (option for option in options if rows is None or option.tokens < rows),
            key=lambda option: self._rate(option, rows or 1 + option.tokens),
        )

    def _rate(self, option: _Option, rows: int) -> float:
        return option.expected / self._seconds(option, rows)

    def _seconds(self, option: _Option, rows: int) -> float:
        return self._costs.at(rows) + option.seconds

    def record(
        self,
        drafted: int,
        accepted: int,
        draft_s: float,
        step_s: float,
        *,
        rows: int | None = None,
        promised: Sequence[float] | None = None,
        kept: Iterable[int] | None = None,
    ) -> None:
        """Learn from one step.

        Args:
            drafted: Tokens that the drafter proposed.
            accepted: Of these.
            draft_s: Seconds of drafting.
            step_s: Seconds of the step.
            rows: Of the step, where others than the drafted tokens and the last one were in it.
            promised: The drafted tokens' likelihoods, where they carry any.
            kept: Which of these tokens were accepted; ``None`` judges no promise.
        """
        rows = 1 + drafted if rows is None else rows
        self._costs.add(max(rows_at(rows, self._grain), self.rows), step_s)
        self._draft_s = _DECAY * self._draft_s + draft_s
        self._draft_tokens = _DECAY * self._draft_tokens + drafted
        if promised is not None:
            self._last_s = draft_s
            if self._asked >= self._max:
                known = draft_s if self._full_s is None else self._full_s
                self._full_s = _DECAY * known + (1 - _DECAY) * draft_s
            self._steps = _DECAY * self._steps + 1
            self._won = _DECAY * self._won + accepted
            self._spent = _DECAY * self._spent + (draft_s + step_s) / self._costs.at(1)
            if kept is not None:
                self._judge(promised, set(kept))
        if drafted:
            tried = accepted + (accepted < drafted)
            self._accepted = _DECAY * self._accepted + accepted
            self._tried = _DECAY * self._tried + tried

    def _judge(self, promised: Sequence[float], kept: Container[int]) -> None:
        """Learn how far likelihoods of each size are to be trusted."""
        for size in range(len(self._promised)):
            nodes = [node for node, share in enumerate(promised) if _size(share) == size]
            total = sum(promised[node] for node in nodes)
            left = max(1 - total / _REMEMBERED, 0.5)
            self._promised[size] = left * self._promised[size] + total
            self._kept[size] = left * self._kept[size] + sum(node in kept for node in nodes)

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

    def _loses(self) -> bool:
        """Whether the last steps, drafting included, were slower than plain ones."""
        enough = self._steps > _LEAST_STEPS
        return enough and self._spent > self._steps + self._won
