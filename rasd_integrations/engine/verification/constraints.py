"""Grammar constraints: drafts cut to what is allowed, logits masked, forced tokens drafted.

Under a grammar the target's distribution is that of its masked logits, and every verification rule stays exact for
it. A forbidden token has probability zero, so leaving it out of a deterministic draft changes no outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessorList
from typing_extensions import Self

from rasd_integrations.token_mask import flags_of, has_token
from rasd_integrations.types import Draft, GrammarState

SOURCE = "grammar"  # of forced tokens, in the statistics
MOST_FORCED = 64  # rows of one step; a longer forced text takes another

Bits = NDArray[np.int32]
"""``[rows, ceil(vocab / 32)]``, bit set where a token may follow."""


def guide(
    state: GrammarState, draft: Draft, room: int, eos_ids: Collection[int]
) -> tuple[Draft, Bits]:
    """Return the allowed part of the draft, extended by forced tokens after its first path, and the masks.

    A sampled draft, or one with logits, keeps its tokens: they must have been drawn from ``probs``.

    Args:
        state: Of the committed tokens; unchanged afterwards.
        draft: Chain or tree.
        room: Most tokens that the draft may have.
        eos_ids: Tokens that end an answer; the grammar is not asked after them.

    Returns:
        The draft, and a mask for the root and for each node.
    """
    if draft.probs is not None or draft.logits is not None:
        return draft, chain_masks(state, draft.token_ids, eos_ids)
    with _Walker(state) as walker:
        draft, masks = _cut(walker, draft, room, eos_ids, _mask)
    return draft, np.stack([mask for mask in masks if mask is not None])


def allowed(state: GrammarState, draft: Draft, room: int, eos_ids: Collection[int]) -> Draft:
    """Return what :func:`guide` does of a deterministic draft, without the masks."""
    with _Walker(state) as walker:
        return _cut(walker, draft, room, eos_ids, lambda _: None)[0]


def mask_visited(
    state: GrammarState, logits: Tensor, draft: Draft, eos_ids: Collection[int]
) -> Tensor:
    """Mask the rows that greedy verification of ``draft`` reads, in place, and return the logits.

    It reads the root's row and those of the accepted nodes, a third of the rows of a typical step; a mask costs as much
    as 1 % of a step of a small model.
    """
    children: dict[tuple[int, int], int] = {}
    for node, edge in enumerate(zip(draft.parent_of, draft.token_ids, strict=True)):
        children.setdefault(edge, node)  # of two alike verification takes the first
    with _Walker(state) as walker:
        node = -1
        while True:
            row = mask_rows(logits[node + 1 : node + 2], _mask(state)[None])
            token = int(row.argmax())
            child = children.get((node, token))
            if child is None or token in eos_ids or not walker.push(token, child):
                return logits
            node = child


def chain_masks(state: GrammarState, token_ids: Sequence[int], eos_ids: Collection[int]) -> Bits:
    """Return the masks of the root and of each token of a chain; after a forbidden one all is allowed."""
    with _Walker(state) as walker:
        masks = [_mask(state)]
        for place, token in enumerate(token_ids):
            alive = len(walker.path) == place and token not in eos_ids and walker.push(token, place)
            masks.append(_mask(state) if alive else _everything(masks[0]))
    return np.stack(masks)


def forced_after(state: GrammarState, token_ids: Sequence[int]) -> tuple[int, ...]:
    """Return what must follow ``token_ids``; nothing if these are forbidden themselves."""
    with _Walker(state) as walker:
        allowed = all(walker.push(token, node) for node, token in enumerate(token_ids))
        return tuple(state.forced()) if allowed else ()


def mask_rows(logits: Tensor, bits: Bits) -> Tensor:
    """Set the logits ``[rows, vocab]`` of forbidden tokens to ``-inf``, in place, and return them."""
    rows, vocab = logits.shape
    allowed = flags_of(bits[:rows])[:, :vocab]
    forbidden = torch.from_numpy(allowed).to(logits.device) == 0
    return logits.masked_fill_(forbidden, float("-inf"))


def processed_rows(
    processors: LogitsProcessorList,
    logits: Tensor,
    ids: Sequence[int],
    draft: Draft,
    bits: Bits | None,
) -> Tensor:
    """Return each row's logits, processed with the tokens before it, then masked.

    Rows in which processors forbid all that the grammar allows follow the grammar only.

    Args:
        processors: In their order; may be none.
        logits: ``[1 + num_nodes, vocab]``; may be changed in place.
        ids: The tokens up to the draft.
        draft: Chain or tree.
        bits: What the grammar allows; ``None`` without one.
    """
    if not processors:
        return logits if bits is None else mask_rows(logits, bits)
    # In float32, as transformers processes them.
    scores = torch.cat([
        processors(context, cast("torch.FloatTensor", row[None]))
        for context, row in zip(_contexts(ids, draft, logits.device), logits.float(), strict=True)
    ])  # fmt: skip
    if bits is None:
        return scores
    scores, plain = mask_rows(scores, bits), mask_rows(logits.float(), bits)
    return torch.where((scores == float("-inf")).all(-1, keepdim=True), plain, scores)


def _contexts(ids: Sequence[int], draft: Draft, device: torch.device) -> Iterator[torch.LongTensor]:
    """Return the tokens ``[1, n]`` before each row: the root's, then each node's with itself at the end."""
    found = [torch.tensor(ids, device=device)]
    nodes = torch.tensor(draft.token_ids, dtype=torch.int64, device=device)
    for node, parent in enumerate(draft.parent_of):
        found.append(torch.cat([found[parent + 1], nodes[node : node + 1]]))
    return (cast("torch.LongTensor", context[None]) for context in found)


class _Walker:
    """Moves a grammar's state over the nodes of a draft, and back to where it was."""

    def __init__(self, state: GrammarState) -> None:
        self.state = state
        self.path: list[int] = []  # nodes from the root to the current one
        self._tokens: dict[int, int] = {}
        self._parents: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.state.pop(len(self.path))

    def push(self, token: int, node: int) -> bool:
        """Step on to ``node``; ``False``, and no step, if its token may not follow."""
        parent = self.path[-1] if self.path else -1
        if not self.state.push(token):
            return False
        self._tokens[node], self._parents[node] = token, parent
        self.path.append(node)
        return True

    def move_to(self, node: int) -> None:
        """Move to ``node``, which was pushed before; -1 is the root."""
        wanted: list[int] = []
        while node >= 0:
            wanted.append(node)
            node = self._parents[node]
        wanted.reverse()
        pairs = zip(self.path, wanted, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        common = min(len(self.path), len(wanted)) if common is None else common
        self.state.pop(len(self.path) - common)
        del self.path[common:]
        for on in wanted[common:]:
            self.state.push(self._tokens[on])
            self.path.append(on)


def _cut(
    walker: _Walker,
    draft: Draft,
    room: int,
    eos_ids: Collection[int],
    mask_at: Callable[[GrammarState], NDArray[np.int32] | None],
) -> tuple[Draft, list[NDArray[np.int32] | None]]:
    """Return the allowed part of a draft with its forced tokens, and the mask of the root and of each node.

    Without masks a token is allowed if the grammar takes it: near the answer's end its mask may forbid more, and
    verification refuses the token then.
    """
    state = walker.state
    masks = [mask_at(state)]
    everything = None if masks[0] is None else _everything(masks[0])
    kept: dict[int, int] = {-1: -1}  # old index to new
    ended: set[int] = set()
    nodes: list[tuple[int, int, str]] = []  # token, parent, source
    sources = draft.sources or (draft.source,) * len(draft)
    for old, (parent, token) in enumerate(zip(draft.parent_of, draft.token_ids, strict=True)):
        up = kept.get(parent)
        if up is None or up in ended:
            continue
        here, new = masks[up + 1], len(nodes)
        if here is not None and not has_token(here, token):
            continue
        if token in eos_ids:
            ended.add(new)
            masks.append(everything)
        else:
            walker.move_to(up)
            if not walker.push(token, new):  # the grammar is finished; its mask allows every token
                continue
            masks.append(mask_at(state))
        kept[old] = new
        nodes.append((token, up, sources[old]))
    leaf = _first_leaf([parent for _, parent, _ in nodes])
    if leaf not in ended:
        walker.move_to(leaf)
        most = min(room, max(MOST_FORCED, len(nodes)))
        for token in state.forced()[: max(most - len(nodes), 0)]:
            if not walker.push(token, len(nodes)):
                break
            nodes.append((token, leaf, SOURCE))
            leaf = len(nodes) - 1
            masks.append(mask_at(state))
    cut = replace(
        draft,
        token_ids=tuple(token for token, _, _ in nodes),
        parents=tuple(parent for _, parent, _ in nodes),
        sources=tuple(source for _, _, source in nodes),
        node_probs=None,
    )
    return cut, masks


def _first_leaf(parents: Sequence[int]) -> int:
    """Return the end of the path of first children; -1 if there is no node."""
    leaf = -1
    for node, parent in enumerate(parents):
        if parent == leaf:
            leaf = node
    return leaf


def _mask(state: GrammarState) -> NDArray[np.int32]:
    """Return what may follow; after the grammar's end everything, since an empty row would be an error."""
    mask = state.mask()
    return _everything(mask) if state.finished else mask


def _everything(like: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.full_like(like, -1)
