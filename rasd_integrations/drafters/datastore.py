"""REST: drafts what followed the last tokens in texts (arXiv 2311.08252, section 3).

The longest suffix of the context that occurs in the texts has continuations, which form a trie with counts; the draft
is its most probable tree. No model, no training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import comb
from typing import NamedTuple, Protocol

from rasd_integrations.config import check_value
from rasd_integrations.datastores.tokens.encoding import SEPARATOR
from rasd_integrations.datastores.tokens.memory import Memory
from rasd_integrations.datastores.tokens.shard import MAX_MATCH, May, Shard, continuations
from rasd_integrations.drafters.base import Drafter, DraftSession
from rasd_integrations.drafters.tree import Tree, grow_trie
from rasd_integrations.types import Draft, DraftContext, TokenBlock


class Searched(Protocol):
    """What is drafted from: a ``TokenStore``, or several as one."""

    @property
    def shards(self) -> Sequence[Shard]:
        """The current, immutable shards."""
        ...


class _Limits(NamedTuple):
    """See :class:`DatastoreDrafter`."""

    min_match: int = 1
    max_draft: int = 64
    min_probability: float = 0.01
    max_rows: int = 32  # 128 and 512 give no more tokens a step
    tree: bool = True


class DatastoreDrafter(Drafter):
    """Proposes the store's continuations of the last tokens, as a tree.

    The store's texts need not be in the prompt. Drafts never change an answer, but its speed tells that a text is in
    the store: give each tenant a store of its own.
    """

    def __init__(
        self,
        store: Searched,
        *,
        name: str = "datastore",
        min_match: int = 1,
        max_draft: int = 64,
        min_probability: float = 0.01,
        max_rows: int = 128,
        tree: bool = True,
    ) -> None:
        """Draft from ``store``.

        Args:
            store: Texts, as the target's tokenizer encodes them.
            name: Name in the statistics.
            min_match: Least tokens of a match, 1 to 16.
            max_draft: Maximum tokens of a draft.
            min_probability: Least estimated probability of a drafted token.
            max_rows: Maximum occurrences read, evenly spread over all.
            tree: Draft less frequent continuations too; else one chain.

        Raises:
            ConfigurationError: A value out of its range.
        """
        for option, value, least, most in (
            ("min_match", min_match, 1, MAX_MATCH),
            ("max_draft", max_draft, 1, 1024),
            ("min_probability", min_probability, 0, 1),
            ("max_rows", max_rows, 1, 1 << 16),
        ):
            check_value(least <= value <= most, option, value, f"in {least}..{most}")
        self.store = store
        self.name = name
        self._limits = _Limits(min_match, max_draft, min_probability, max_rows, tree)

    def start(self, context: DraftContext) -> DatastoreSession:
        """Start an answer."""
        return DatastoreSession(self.name, context, lambda: self.store.shards, self._limits)


class CollectionDrafter(Drafter):
    """Proposes what followed the last tokens in the texts of the pipeline's store."""

    name = "collection"

    def __init__(self, memory: Memory) -> None:
        """Draft from ``memory``."""
        self._memory = memory

    def start(self, context: DraftContext) -> DatastoreSession:
        """Start an answer; the texts are those of ``context.source`` under ``context.filter``."""
        view = self._memory.collection(context.source, context.filter)
        if view is None:
            return DatastoreSession(self.name, context, tuple, _Limits())
        return DatastoreSession(self.name, context, view.shards, _Limits(), may=view.may)


class AnswersDrafter(Drafter):
    """Proposes what followed the last tokens in earlier answers, to which it adds each answer."""

    name = "answers"

    def __init__(self, memory: Memory) -> None:
        """Draft from ``memory``."""
        self._memory = memory

    def start(self, context: DraftContext) -> DatastoreSession:
        """Start an answer."""
        answers = self._memory.answers
        return DatastoreSession(
            self.name, context, lambda: answers.store.shards, _Limits(), at_end=answers.add
        )


class DatastoreSession(DraftSession):
    """State of one answer: its last tokens. Each draft reads the texts as they are then."""

    def __init__(
        self,
        name: str,
        context: DraftContext,
        texts: Callable[[], Iterable[Shard]],
        limits: _Limits,
        *,
        may: May | None = None,
        at_end: Callable[[Sequence[int], Sequence[int]], object] = lambda *_: None,
    ) -> None:
        """Made by a drafter's ``start``.

        Args:
            name: Of the drafts.
            context: Of the answer.
            texts: Returns the texts as they are now.
            limits: Of the drafts.
            may: Says which texts may be drafted from; ``None`` allows all.
            at_end: Takes the prompt's last tokens and the answer.
        """
        self._name = name
        self._texts = texts
        self._limits = limits
        self._may = may
        self._at_end = at_end
        self._prompt = list(context.prompt_ids[-MAX_MATCH:])
        self._answer: list[int] = []

    def propose(self, budget: int) -> Draft:
        """Return the most probable continuations as a tree of at most ``budget`` tokens.

        Raises:
            RetrievalError: The store's file was changed in place.
        """
        token_ids, parents, node_probs = self._grow((), budget, tree=self._limits.tree)
        return Draft(token_ids, parents, source=self._name, node_probs=node_probs)

    def propose_after(self, extra: Sequence[int], budget: int) -> tuple[int, ...]:
        """Return the most probable continuation of the committed tokens and ``extra``."""
        return self._grow(extra, budget, tree=False)[0]

    def observe(self, block: TokenBlock) -> None:
        """Append the committed tokens."""
        self._answer.extend(block.token_ids)

    def close(self) -> None:
        """Hand over the answer."""
        answer, self._answer = self._answer, []
        if answer:
            self._at_end(self._prompt, answer)

    def _grow(self, extra: Sequence[int], budget: int, *, tree: bool) -> Tree:
        limits = self._limits
        budget = min(budget, limits.max_draft)
        if budget < 1:
            return (), (), ()
        length, rows = continuations(
            self._texts(),
            [*self._prompt, *self._answer[-MAX_MATCH:], *extra],
            min_match=limits.min_match,
            most_rows=limits.max_rows,
            depth=budget,
            may=self._may,
        )
        # A step is right n times of n + 3 after n matching tokens, drafted ones included: over SmolLM2's greedy answers
        # to L-Eval (2700 tokens) this predicts acceptance to 0.15; n / (n + 1) is up to five times too sure.
        return grow_trie(
            rows,
            [1.0] * len(rows),
            lambda depth: comb(length + 2, 3) / comb(length + depth + 2, 3),
            budget,
            limits.min_probability,
            width=None if tree else 1,
            end=SEPARATOR,
        )
