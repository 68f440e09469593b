"""Limits the time that trials of drafting, or of one drafter among others, may lose."""

from __future__ import annotations

_CREDIT = 0.7  # plain steps that may be lost at the start of an answer
# The share of the time that may be lost later: 0.3 of what was saved recently, within these limits.
_LEAST, _REINVESTED, _MOST = 0.008, 0.3, 0.05
_MEMORY = 0.995  # of the recent savings, a step
_KEPT, _CARRIED = 16.0, 4.0  # plain steps that are kept of a gain; and for the next answer


class Allowance:
    """A balance in plain steps; trials are allowed while it is not negative.

    Attributes:
        balance: Plain steps that may still be lost.
        saved: Plain steps saved a step, running average.
    """

    def __init__(self, last: Allowance | None = None) -> None:
        """Start an answer with what the ``last`` one left, but with some credit."""
        self.balance: float = min(max(last.balance if last else 0.0, _CREDIT), _CARRIED)
        self.saved: float = last.saved if last else 0.0

    @property
    def allows(self) -> bool:
        """True while trials are allowed."""
        return self.balance >= 0

    def step(self, gain: float = 0.0) -> None:
        """Add a step's share of the time, and the plain steps that it saved or lost."""
        self.saved = _MEMORY * self.saved + (1 - _MEMORY) * gain
        share = min(max(_REINVESTED * self.saved, _LEAST), _MOST)
        self.balance = min(self.balance + gain + share, _KEPT)
