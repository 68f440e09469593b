"""Grows draft trees best first: the first ``n`` nodes of a tree are the most probable ``n``."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

_State = TypeVar("_State")
Tree = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]
"""Token, parent and probability of each node."""


def grow(
    root: _State,
    children: Callable[[_State, float], Iterable[tuple[float, int, _State]]],
    budget: int,
    min_probability: float,
) -> Tree:
    """Return the most probable nodes, at most ``budget``; a parent comes before its children.

    Args:
        root: State of the root, which has probability 1.
        children: Takes a node's state and probability; gives its children's probability, token and state. No child
            is more probable than its parent.
        budget: Maximum number of nodes.
        min_probability: Least probability of a node.
    """
    token_ids: list[int] = []
    parents: list[int] = []
    node_probs: list[float] = []
    # Entries: probability (negative), order of finding, token, parent, state.
    heap: list[tuple[float, int, int, int, _State]] = []
    node, prob, state, found = -1, 1.0, root, 0
    while len(token_ids) < budget:
        for child_prob, token, child in children(state, prob):
            if child_prob >= min_probability:
                heapq.heappush(heap, (-child_prob, found, token, node, child))
                found += 1
        if not heap:
            break
        prob, _, token, parent, state = heapq.heappop(heap)
        prob = min(-prob, 1.0)  # sums of shares may round to more
        node = len(token_ids)
        token_ids.append(token)
        parents.append(parent)
        node_probs.append(prob)
    return tuple(token_ids), tuple(parents), tuple(node_probs)


def grow_trie(
    rows: Sequence[Sequence[int]],
    weights: Sequence[float],
    trust: Callable[[int], float],
    budget: int,
    min_probability: float,
    *,
    width: int | None = None,
    end: int = -1,
) -> Tree:
    """Return the most probable nodes of the trie of ``rows``.

    The probability of a node at depth ``d`` (1 is the first token) is the share of the weights that runs through it,
    times ``trust(d)``.

    Args:
        rows: Continuations, as token ids.
        weights: Weight of each row.
        trust: Probability that a row is followed to a depth, falling.
        budget: Maximum number of nodes.
        min_probability: Least probability of a node.
        width: Maximum number of children of a node; ``None`` is no limit.
        end: Token behind which a row does not count.
    """
    if not rows:
        return (), (), ()
    total = math.fsum(weights)

    def children(
        node: tuple[Sequence[int], int], _prob: float
    ) -> Iterable[tuple[float, int, tuple[Sequence[int], int]]]:
        through, depth = node
        following: dict[int, list[int]] = {}
        for i in through:
            if depth < len(rows[i]):
                following.setdefault(rows[i][depth], []).append(i)
        following.pop(end, None)
        scale = trust(depth + 1) / total
        ranked = sorted(
            (-math.fsum(weights[i] for i in group), token) for token, group in following.items()
        )
        for weight, token in ranked[:width]:
            yield -weight * scale, token, (following[token], depth + 1)

    root: tuple[Sequence[int], int] = (range(len(rows)), 0)
    return grow(root, children, budget, min_probability)
