"""DReSD: nearest hidden states propose the tokens that followed them (arXiv 2502.15572).

The hidden state that predicted the last committed token is compared with those of earlier positions that predicted
the same token; what followed there is the draft. Positions are those of the prompt and the running answer, whose hidden
states are kept beside their keys and values, and those of a :class:`DenseStore`.

States of the prompt are compared as they are, by cosine: z-scores, 64 principal components of the prompt or of a store,
or a random projection find no better positions, and cost time before the first token
(docs/explanation/experiments.md). A raw cosine ``c`` counts as an agreement of ``c ** 2``, one of principal components
as ``c``: either is about how often the next token is the same.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from rasd_integrations.config import check_value
from rasd_integrations.datastores.hidden import DenseStore, Neighbour, nearest
from rasd_integrations.drafters.base import Drafter, DraftSession, Needs
from rasd_integrations.drafters.tree import grow_trie
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError, RetrievalError
from rasd_integrations.types import Draft, DraftContext, TokenBlock

_SHARPNESS = 5.0  # a neighbour whose agreement is lower by a fifth weighs 1 / e as much
_MOST_ROWS = 1 << 11  # positions of the text that are compared, the latest
_BLOCK = 256  # positions compared at once


class DenseDrafter(Drafter):
    """Proposes what followed the nearest hidden states of the target, as a tree."""

    needs = Needs(hidden=True)

    def __init__(
        self,
        store: DenseStore | None = None,
        *,
        name: str = "dense",
        prompt: bool = True,
        neighbours: int = 16,
        max_draft: int = 64,
        min_probability: float = 0.02,
        tree: bool = True,
    ) -> None:
        """Draft from prompt and answer, and from ``store``.

        Args:
            store: Hidden states of other texts, built with the target.
            name: Name in the statistics.
            prompt: Draft from the prompt and the running answer.
            neighbours: Number of nearest neighbours per draft.
            max_draft: Maximum tokens of a draft.
            min_probability: Least estimated probability of a drafted token.
            tree: Draft less likely continuations too; else one chain.

        Raises:
            ConfigurationError: A value out of its range, or nothing to draft from.
        """
        for option, value in (("neighbours", neighbours), ("max_draft", max_draft)):
            check_value(1 <= value <= 1024, option, value, "in 1..1024")
        check_value(0 <= min_probability <= 1, "min_probability", min_probability, "in 0..1")
        if store is None and not prompt:
            msg = "There is no store and prompt is False, so there is nothing to draft from. Give one."
            raise ConfigurationError(msg)
        self.store = store
        self.name = name
        self.prompt = prompt
        self.neighbours = neighbours
        self.max_draft = max_draft
        self.min_probability = min_probability
        self.tree = tree

    def start(self, context: DraftContext) -> DenseSession:
        """Start an answer."""
        return DenseSession(self, context)


class DenseSession(DraftSession):
    """State of one answer. Proposes nothing before :meth:`attach`."""

    def __init__(self, drafter: DenseDrafter, context: DraftContext) -> None:
        """Made by :meth:`DenseDrafter.start`."""
        self._drafter = drafter
        self._ids = list(context.prompt_ids)
        self._buffer: KVBuffer | None = None
        # Positions by the token that came next; those of the last two tokens have no successor yet.
        self._positions: defaultdict[int, list[int]] = defaultdict(list)
        self._num_indexed = 0

    def attach(self, target: TargetModel, buffer: KVBuffer) -> None:
        """Receive the answer's hidden states.

        Raises:
            RetrievalError: The store is of a model of another width.
        """
        store = self._drafter.store
        width = int(target.model.config.get_text_config().hidden_size)
        if store is not None and store.width != width:
            msg = (
                f"The dense store {store.path} holds hidden states of width {store.width}, but the target's are "
                f"{width} wide. Build one with the target: DenseStore.build(texts, model, folder)."
            )
            raise RetrievalError(msg)
        self._buffer = buffer

    @torch.inference_mode()
    def propose(self, budget: int) -> Draft:
        """Return the most probable continuations as a tree of at most ``budget`` tokens.

        Raises:
            RetrievalError: The store's file was changed in place.
        """
        drafter = self._drafter
        budget = min(budget, drafter.max_draft)
        if budget < 1 or self._buffer is None:
            return Draft(source=drafter.name)
        first, hidden = self._buffer.hidden()
        if not len(hidden):
            return Draft(source=drafter.name)
        found = self._earlier(first, hidden, budget) if drafter.prompt else []
        if drafter.store is not None:
            state = hidden[-1].float().cpu().numpy()
            found += drafter.store.find(state, self._ids[-1], drafter.neighbours, budget)
        found.sort(key=lambda neighbour: -neighbour.agreement)  # stable: the prompt's own first
        found = found[: drafter.neighbours]
        best = found[0].agreement if found else 1.0
        token_ids, parents, node_probs = grow_trie(
            [near.following for near in found],
            [math.exp(_SHARPNESS * (near.agreement - best)) for near in found],
            lambda depth: best**depth,
            budget,
            drafter.min_probability,
            width=None if drafter.tree else 1,
        )
        return Draft(token_ids, parents, source=drafter.name, node_probs=node_probs)

    def observe(self, block: TokenBlock) -> None:
        """Append the committed tokens."""
        self._ids.extend(block.token_ids)

    def close(self) -> None:
        """Release the hidden states."""
        self._buffer = None

    def _earlier(self, first: int, hidden: Tensor, depth: int) -> list[Neighbour]:
        """Return the nearest positions from ``first`` on that predicted the last token too and have a successor."""
        ids = self._ids
        for position in range(self._num_indexed, len(ids) - 2):
            self._positions[ids[position + 1]].append(position)
        self._num_indexed = max(self._num_indexed, len(ids) - 2)
        positions = [i for i in self._positions.get(ids[-1], ())[-_MOST_ROWS:] if i >= first]
        if not positions:
            return []
        index = torch.tensor([i - first for i in positions], device=hidden.device)
        query = torch.nn.functional.normalize(hidden[-1].float(), dim=0)
        # Block by block, so that the float32 copies stay in a CPU's cache.
        blocks = (hidden[block].float() for block in index.split(_BLOCK))
        parts = [(rows @ query) / rows.norm(dim=1).clamp_min(1e-9) for rows in blocks]
        cosines = torch.cat(parts).clamp(0, 1).cpu().numpy()
        return [
            Neighbour(
                float(cosines[i]) ** 2,
                tuple(ids[positions[i] + 2 : positions[i] + 2 + depth]),
            )
            for i in nearest(cosines, self._drafter.neighbours)
        ]
