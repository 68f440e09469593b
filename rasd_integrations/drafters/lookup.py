"""Finds what followed the last tokens in texts, as a draft tree (REST, arXiv 2311.08252, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import comb

from rasd_integrations.datastores.tokens.encoding import SEPARATOR
from rasd_integrations.datastores.tokens.shard import Shard, continuations
from rasd_integrations.drafters.tree import Tree, grow_trie


def look_up(
    shards: Iterable[Shard],
    context: Sequence[int],
    budget: int,
    *,
    min_match: int,
    most_rows: int,
    min_probability: float,
    tree: bool = True,
) -> Tree:
    """Return the most probable continuations of the longest match of a context's last tokens.

    Args:
        shards: Texts, searched as one.
        context: Token ids; the last ``MAX_MATCH`` count.
        budget: Maximum number of nodes, at least 1.
        min_match: Least tokens of a match.
        most_rows: Maximum occurrences read, evenly spread over all.
        min_probability: Least estimated probability of a node.
        tree: Less frequent continuations too; else one chain.
    """
    length, rows = continuations(
        shards, context, min_match=min_match, most_rows=most_rows, depth=budget
    )
    # A step is right n times of n + 3 after n matching tokens, drafted ones included: over SmolLM2's greedy answers
    # to L-Eval (2700 tokens) this predicts acceptance to 0.15; n / (n + 1) is up to five times too sure.
    return grow_trie(
        rows,
        [1.0] * len(rows),
        lambda depth: comb(length + 2, 3) / comb(length + depth + 2, 3),
        budget,
        min_probability,
        width=None if tree else 1,
        end=SEPARATOR,
    )
