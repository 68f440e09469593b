"""How far a drafter's estimate of its own nodes holds, from what was committed instead.

An estimate says how likely a node is reached and accepted. What is judged is the step to it from its parent: where
the parent was committed, and a token behind it, the node was right or wrong, whether it was verified or not. Whole
paths could not be judged so: of one whose first token came true it is not known how it would have gone on, so that
only the false ones would count.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from rasd_integrations.types import Draft

_BOUNDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)
SIZES = len(_BOUNDS) + 1
"""Of estimates; those of one size are judged together."""
_FAITH = 4.0  # judged nodes that an estimate weighs as much as
_REMEMBERED = 512  # nodes of a size after which one counts for little

_NONE = (0.0,) * SIZES


@dataclass(frozen=True, slots=True)
class Judgements:
    """What has been seen, by the size of the estimate: nodes judged and nodes that were right."""

    judged: tuple[float, ...] = _NONE
    right: tuple[float, ...] = _NONE


def size_of(prob: float) -> int:
    """Return which of the :data:`SIZES` an estimate has."""
    return bisect_right(_BOUNDS, prob)


class Calibration:
    """Sets estimates right."""

    def __init__(self, known: Judgements | None = None) -> None:
        """Begin with what is known from earlier answers."""
        known = known or Judgements()
        self._judged, self._right = list(known.judged), list(known.right)

    @property
    def known(self) -> Judgements:
        """What the next answer should know."""
        return Judgements(tuple(self._judged), tuple(self._right))

    def node_probs(self, draft: Draft) -> list[float]:
        """Return how likely each node of ``draft``, which says so itself, is reached and accepted."""
        node_probs: list[float] = []
        for parent, step in _steps(draft):
            size = size_of(step)
            share = (self._right[size] + _FAITH * step) / (self._judged[size] + _FAITH)
            node_probs.append(share * (node_probs[parent] if parent >= 0 else 1.0))
        return node_probs

    def judge(self, draft: Draft, committed: Sequence[int]) -> None:
        """Learn from the tokens that were committed where ``draft`` was proposed."""
        depths = {-1: 0}  # of the nodes that were committed
        for node, (parent, step) in enumerate(_steps(draft)):
            depth = depths.get(parent)
            if depth is None or depth >= len(committed):
                continue
            size = size_of(step)
            is_right = draft.token_ids[node] == committed[depth]
            if is_right:
                depths[node] = depth + 1
            self._judged[size] += 1 - self._judged[size] / _REMEMBERED
            self._right[size] += is_right - self._right[size] / _REMEMBERED


def _steps(draft: Draft) -> list[tuple[int, float]]:
    """Return each node's parent, and how likely the draft says it is where that was accepted."""
    node_probs = draft.node_probs or ()
    return [
        (
            parent,
            min(share / node_probs[parent], 1.0)
            if parent >= 0 and node_probs[parent] > 0
            else share,
        )
        for parent, share in zip(draft.parent_of, node_probs, strict=True)
    ]
