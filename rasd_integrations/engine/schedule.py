"""How long the next draft should be, from what this answer has measured so far.

Expected tokens per second are ``E(n) / (t(1 + n) + d(n))`` (algorithms.md 8.1, 8.2): step time ``t`` is a
running line over the width. For a chain of which nothing is said, ``E(n) = (1 - a^(n+1)) / (1 - a)`` with the
running acceptance ``a`` and a drafting time for each token. For a draft whose nodes carry their likelihood,
chain or tree, ``E(n) = 1 + c * sum(likely[:n])`` with ``c`` the running share of what was promised, and the
draft is there already: only the verify step is to be paid. Drafting that would lose time is switched off and
tried again now and then. Only time depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.errors import ConfigurationError

_DECAY = 0.9
PRIOR_SLOPE = 0.04  # cost of one more token in a step, as a share of a step of one
_PRIOR_WEIGHT = 16.0  # that of four steps in which the width varied by two tokens
_PRIOR_ACCEPTED, _PRIOR_TRIED = 1.4, 2.0
_PRIOR_KEPT = 6.0  # promised tokens that are taken for kept besides those that were seen
_REMEMBERED = 40.0  # promised tokens over which it is judged how many are kept
_FIRST_PROBE, _LAST_PROBE = 4, 64
_CHEAP = 0.5  # of a plain step
_LEAST_STEPS = 5.0  # with a draft, before drafting can be found to lose
_OUTLIER = 2.0  # a step that took so many times what was expected was held up by something else


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


class Schedule:
    """Chooses the draft length of one answer."""

    def __init__(
        self, max_draft_tokens: int, fixed: int | None = None, *, slope: float = PRIOR_SLOPE
    ) -> None:
        """Choose up to ``max_draft_tokens``, or always ``fixed`` where given.

        Args:
            max_draft_tokens: Longest draft.
            fixed: Length of every draft.
            slope: Cost of one more token in a step, as a share of a step of one, before any is measured.
        """
        self._max = max_draft_tokens
        self._fixed = fixed
        self._accepted, self._tried = _PRIOR_ACCEPTED, _PRIOR_TRIED
        self._promised, self._kept = 0.0, 0.0
        self._widths = _Line(slope)
        self._draft_s, self._draft_tokens = 0.0, 0.0
        self._asked = 0
        self._last_s = 0.0  # of the last draft
        self._full_s: float | None = None  # of a draft of full length, running average
        # Steps with a draft of known likelihoods: their number, the tokens won, the seconds with drafting.
        self._steps, self._won, self._spent = 0.0, 0.0, 0.0
        self._wait, self._probe_every = 0, _FIRST_PROBE

    @property
    def slope(self) -> float:
        """Estimated cost of one more token in a step, as a share of a step of one."""
        return min(self._widths.at(2) / self._widths.at(1) - 1, 1.0)

    @property
    def acceptance(self) -> float:
        """Estimated probability that one more drafted token is accepted."""
        return min(self._accepted / self._tried, 0.98)

    def next_budget(self) -> int:
        """Return how many tokens to draft now; 0 says that drafting does not pay at present."""
        self._asked = self._next() if self._fixed is None else self._fixed
        return self._asked

    def _next(self) -> int:
        best = self._max if self._steps and self._drafts_cheaply() else self._best_chain()
        if best and not self._loses():
            self._probe_every, self._wait = _FIRST_PROBE, 0
            return best
        self._wait += 1
        if self._wait < self._probe_every:
            return 0
        self._wait, self._probe_every = 0, min(2 * self._probe_every, _LAST_PROBE)
        return best or 1

    def head(self, likely: Sequence[float]) -> int:
        """Return how many of a draft's nodes are worth verifying, the first ones.

        Args:
            likely: How likely each node is reached and accepted, in the drafter's opinion.
        """
        if self._fixed is not None:
            return len(likely)
        trust = min((self._kept + _PRIOR_KEPT) / (self._promised + _PRIOR_KEPT), 1.5)
        best, expected, rate = 0, 1.0, 1.0 / self._widths.at(1)
        for n, share in enumerate(likely, start=1):
            expected += min(trust * share, 1.0)
            if expected / self._widths.at(1 + n) > rate:
                best, rate = n, expected / self._widths.at(1 + n)
        return best

    def record(
        self,
        drafted: int,
        accepted: int,
        draft_s: float,
        step_s: float,
        *,
        width: int | None = None,
        promised: float | None = None,
        steady: bool = True,
    ) -> None:
        """Learn from one step.

        Args:
            drafted: Tokens that the drafter proposed.
            accepted: Of these.
            draft_s: Seconds of drafting.
            step_s: Seconds of the step.
            width: Rows of the step, where others than the drafted ones were in it.
            promised: Sum of the drafted tokens' likelihoods, where they carry any.
            steady: Whether the step took what steps of its width take; one that a graph had to be fitted for
                says nothing of the next.
        """
        if steady:
            self._widths.add(1 + drafted if width is None else width, step_s)
        self._draft_s = _DECAY * self._draft_s + draft_s
        self._draft_tokens = _DECAY * self._draft_tokens + drafted
        if promised is not None:
            self._last_s = draft_s
            if self._asked >= self._max:
                known = draft_s if self._full_s is None else self._full_s
                self._full_s = _DECAY * known + (1 - _DECAY) * draft_s
            self._steps = _DECAY * self._steps + 1
            self._won = _DECAY * self._won + accepted
            self._spent = _DECAY * self._spent + draft_s + step_s
            left = max(1 - promised / _REMEMBERED, 0.5)
            self._promised = left * self._promised + promised
            self._kept = left * self._kept + accepted
        if drafted:
            tried = accepted + (accepted < drafted)
            self._accepted = _DECAY * self._accepted + accepted
            self._tried = _DECAY * self._tried + tried

    def _drafts_cheaply(self) -> bool:
        """Whether a draft of full length costs so little that its head can be chosen afterwards.

        It is tried once, where shorter ones cost little.
        """
        seconds = self._last_s if self._full_s is None else self._full_s
        return seconds < _CHEAP * self._widths.at(1)

    def _best_chain(self) -> int:
        best, rate = 0, 1.0 / self._widths.at(1)
        for n in range(1, self._max + 1):
            seconds = self._widths.at(1 + n) + n * self._seconds_per_draft_token()
            if self._expected(n) / seconds > rate:
                best, rate = n, self._expected(n) / seconds
        return best

    def _loses(self) -> bool:
        """Whether the last steps, drafting included, were slower than plain ones."""
        enough = self._steps > _LEAST_STEPS
        return enough and self._spent > (self._steps + self._won) * self._widths.at(1)

    def _expected(self, n: int) -> float:
        a = self.acceptance
        return float((1 - a ** (n + 1)) / (1 - a))

    def _seconds_per_draft_token(self) -> float:
        return self._draft_s / self._draft_tokens if self._draft_tokens else 0.0


class _Line:
    """A decaying least-squares line of step time over width, with a prior for its slope."""

    def __init__(self, prior_slope: float) -> None:
        self._prior = prior_slope
        self._w = self._n = self._t = self._nn = self._nt = 0.0

    def add(self, n: float, t: float) -> None:
        if self._w:
            t = min(t, _OUTLIER * self.at(n))
        self._w, self._n, self._t, self._nn, self._nt = (
            _DECAY * old + new
            for old, new in zip(
                (self._w, self._n, self._t, self._nn, self._nt),
                (1, n, t, n * n, n * t),
                strict=True,
            )
        )

    def at(self, n: float) -> float:
        if not self._w:
            return 1 + self._prior * (n - 1)
        mean_n, mean_t = self._n / self._w, self._t / self._w
        variance = self._nn / self._w - mean_n**2
        covariance = self._nt / self._w - mean_n * mean_t
        base = mean_t / (1 + self._prior * (mean_n - 1))
        prior = self._prior * base
        slope = (covariance * self._w + prior * _PRIOR_WEIGHT) / (
            variance * self._w + _PRIOR_WEIGHT
        )
        slope = min(max(slope, 0.0), base)
        return max(mean_t + slope * (n - mean_n), 1e-6)
