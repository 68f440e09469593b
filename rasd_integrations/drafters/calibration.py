"""Calibrates a drafter's probabilities against the tokens that were committed, and limits what trials may lose.

A node's probability is that it is reached and accepted. Counted is the step to it from its parent: if the parent was
committed, and a token after it, the node was right or wrong, whether it was verified or not. Counting whole paths
would be biased: of a path whose first token was right it is unknown how it would have continued, so only wrong ones
would count.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from rasd_integrations.types import Draft

_BOUNDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)  # of bins that are counted together
_PRIOR_WEIGHT = 4.0  # of a drafted probability, in counted nodes
_REMEMBERED = 512  # counted nodes of a bin after which one has little weight
_UNRATED = 0.5  # taken for each token of a draft without probabilities

_CREDIT = 0.7  # plain steps that may be lost at the start of an answer
# The share of the time that may be lost later: 0.3 of what was saved recently, within these limits.
_LEAST, _REINVESTED, _MOST = 0.008, 0.3, 0.05
_MEMORY = 0.995  # of the recent savings, a step
_KEPT, _CARRIED = 16.0, 4.0  # plain steps that are kept of a gain; and for the next answer


class Calibration:
    """Maps drafted probabilities to observed acceptance rates."""

    def __init__(self) -> None:
        """Count nothing yet; drafted probabilities are believed."""
        self._counted = [0.0] * (len(_BOUNDS) + 1)
        self._right = [0.0] * (len(_BOUNDS) + 1)

    def node_probs(self, draft: Draft) -> list[float]:
        """Return each node's calibrated probability of being reached and accepted."""
        found: list[float] = []
        for parent, said in _steps(draft):
            rate = self._rate(said)
            found.append(rate * (found[parent] if parent >= 0 else 1.0))
        return found

    def count(self, draft: Draft, committed: Sequence[int]) -> int:
        """Learn from what was committed instead of ``draft``; return how much was right."""
        depths = {-1: 0}  # of the nodes that were committed
        for node, (parent, said) in enumerate(_steps(draft)):
            depth = depths.get(parent)
            if depth is None or depth >= len(committed):
                continue
            i = bisect_right(_BOUNDS, said)
            is_right = draft.token_ids[node] == committed[depth]
            if is_right:
                depths[node] = depth + 1
            self._counted[i] += 1 - self._counted[i] / _REMEMBERED
            self._right[i] += is_right - self._right[i] / _REMEMBERED
        return max(depths.values())

    def _rate(self, said: float) -> float:
        i = bisect_right(_BOUNDS, said)
        return (self._right[i] + _PRIOR_WEIGHT * said) / (self._counted[i] + _PRIOR_WEIGHT)


def _steps(draft: Draft) -> list[tuple[int, float]]:
    """Return each node's parent, and its drafted probability given the parent."""
    said = draft.node_probs
    if said is None:
        return [(parent, _UNRATED) for parent in draft.parent_of]
    return [
        (parent, min(p / said[parent], 1.0) if parent >= 0 and said[parent] > 0 else p)
        for parent, p in zip(draft.parent_of, said, strict=True)
    ]


class Allowance:
    """A balance in plain steps: trials of drafting, or of one drafter, are allowed while it is not negative.

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
