"""DReSD's drafter: what followed where the target thought alike (arXiv 2502.15572).

The hidden state that gave the last committed token is compared with those of earlier places that gave the
same token; what followed there is the draft. Places are those of the prompt and the running answer, whose
hidden states stand beside their keys and values, and those of a :class:`DenseStore`.

Of the prompt the raw states are compared, by cosine: z-scores, 64 principal components of the prompt, of a
store, or a random projection find no better places, and cost time before the first token
(docs/explanation/experiments.md). A raw cosine ``c`` counts as an agreement of ``c ** 2``, one of principal
components as ``c``: both are about how often the next token is the same.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from rasd_integrations.datastores.hidden import DenseStore, Neighbour, nearest
from rasd_integrations.drafters.base import Drafter, DraftSession, Needs
from rasd_integrations.drafters.tree import grow_trie
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError, RetrievalError
from rasd_integrations.types import Draft, DraftContext, TokenBlock

_SHARPNESS = 5.0  # a place whose agreement is lower by a fifth weighs 1 / e as much
_MOST_ROWS = 1 << 11  # places of the prompt that are compared: the latest
_BLOCK = 256  # of them at once


class DenseDrafter(Drafter):
    """Proposes what followed the places where the target's hidden state was like the present one, as a tree."""

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
            store: Places of other texts, built with the target.
            name: Name in the statistics.
            prompt: Draft from the prompt and the running answer.
            neighbours: Most places that a draft is made of, the most similar ones.
            max_draft: Most tokens of a draft.
            min_probability: Least estimated probability of a drafted token.
            tree: Draft less likely continuations too; else one chain.

        Raises:
            ConfigurationError: A value out of its range, or nothing to draft from.
        """
        for option, value in (("neighbours", neighbours), ("max_draft", max_draft)):
            if not 1 <= value <= 1024:
                msg = f"{option} is {value!r}, but must be in 1..1024."
                raise ConfigurationError(msg)
        if not 0 <= min_probability <= 1:
            msg = f"min_probability is {min_probability!r}, but must be in 0..1."
            raise ConfigurationError(msg)
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
        """Begin an answer."""
        return DenseSession(self, context)


class DenseSession(DraftSession):
    """A dense drafter at work on one answer. Without :meth:`attach` it has nothing to say."""

    def __init__(self, drafter: DenseDrafter, context: DraftContext) -> None:
        """Made by :meth:`DenseDrafter.start`."""
        self._drafter = drafter
        self._ids = list(context.prompt_ids)
        self._buffer: KVBuffer | None = None
        # Places by the token that came next; those of the last two tokens have no follower yet.
        self._places: defaultdict[int, list[int]] = defaultdict(list)
        self._num_placed = 0

    def attach(self, target: TargetModel, buffer: KVBuffer) -> None:
        """Take the answer's hidden states.

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
        """Return the most likely continuations as a tree of at most ``budget`` tokens.

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
        if not found:
            return Draft(source=drafter.name)
        best = found[0].agreement
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
        """Let go of the hidden states."""
        self._buffer = None

    def _earlier(self, first: int, hidden: Tensor, depth: int) -> list[Neighbour]:
        """Return the most similar of the rows ``first``, ... that gave the last token too and have a follower."""
        ids = self._ids
        for place in range(self._num_placed, len(ids) - 2):
            self._places[ids[place + 1]].append(place)
        self._num_placed = max(self._num_placed, len(ids) - 2)
        places = [i for i in self._places.get(ids[-1], ())[-_MOST_ROWS:] if i >= first]
        if not places:
            return []
        index = torch.tensor([i - first for i in places], device=hidden.device)
        query = torch.nn.functional.normalize(hidden[-1].float(), dim=0)
        # Block by block, so that the wide copies stay in a CPU's cache.
        blocks = (hidden[block].float() for block in index.split(_BLOCK))
        parts = [(rows @ query) / rows.norm(dim=1).clamp_min(1e-9) for rows in blocks]
        cosines = torch.cat(parts).clamp(0, 1).cpu().numpy()
        return [
            Neighbour(
                float(cosines[i]) ** 2,
                tuple(ids[places[i] + 2 : places[i] + 2 + depth]),
            )
            for i in nearest(cosines, self._drafter.neighbours)
        ]
