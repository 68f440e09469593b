"""Draft trees: every head of a tree is the best tree of its size."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rasd_integrations.drafters.tree import grow, grow_trie

END = 9
ROWS = st.lists(
    st.tuples(st.floats(0.01, 1), st.lists(st.sampled_from([1, 2, 3, END]), max_size=4)),
    min_size=1,
    max_size=12,
)


def trust(depth: int) -> float:
    return 0.8**depth


@settings(deadline=None)  # a busy machine is no fault
@given(ROWS, st.integers(1, 12))
def test_every_head_of_a_tree_is_the_best_tree_of_its_size(weighted, budget):
    """Cut to any size, the nodes are the most probable of the trie, form a tree and carry their probability."""
    weights, rows = zip(*weighted, strict=True)
    token_ids, parents, probs = grow_trie(rows, weights, trust, budget, 0.0, end=END)
    nodes: dict[tuple[int, ...], float] = {}
    for weight, row in weighted:
        text = row[: row.index(END)] if END in row else row
        for depth in range(1, len(text) + 1):
            nodes[tuple(text[:depth])] = nodes.get(tuple(text[:depth]), 0) + weight
    expected = {path: w / sum(weights) * trust(len(path)) for path, w in nodes.items()}
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(token_ids, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert len(set(paths)) == len(paths) == min(budget, len(expected))
    assert list(probs) == pytest.approx([expected[path] for path in paths])
    assert list(probs) == pytest.approx(sorted(expected.values(), reverse=True)[: len(paths)])
    everything = grow_trie(rows, weights, trust, 1000, 0.0, end=END)[2]
    likely = grow_trie(rows, weights, trust, 1000, 0.1, end=END)[2]
    assert likely == tuple(p for p in everything if p >= 0.1)


def test_a_chain_follows_the_heaviest_row():
    """With one child a node the tree is a chain; of equal weights the smaller token is taken."""
    rows, weights = [(1, 2, 3), (1, 4), (0, 5)], [1.0, 1.0, 2.0]
    token_ids, parents, probs = grow_trie(rows, weights, lambda depth: 1.0, 9, 0.0, width=1)
    assert (token_ids, parents) == ((0, 5), (-1, 0))
    assert probs == (0.5, 0.5)
    assert math.isclose(sum(grow_trie(rows, weights, lambda depth: 1.0, 2, 0.0)[2]), 1.0)


def test_nothing_is_grown_without_a_budget():
    """Children are not asked for."""
    assert grow(None, lambda *_: pytest.fail("asked"), 0, 0.0) == ((), (), ())
    assert grow_trie([], [], trust, 5, 0.0) == ((), (), ())
