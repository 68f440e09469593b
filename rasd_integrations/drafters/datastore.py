"""REST: drafts what followed the last tokens in a store of texts (arXiv 2311.08252, section 3).

The longest suffix of the context that occurs in the store has continuations, which form a trie with counts; the draft
is its most probable tree. No model, no training.
"""

from __future__ import annotations

from collections.abc import Sequence

from rasd_integrations.config import check_value
from rasd_integrations.datastores.tokens.shard import MAX_MATCH
from rasd_integrations.datastores.tokens.store import TokenStore
from rasd_integrations.drafters.base import Drafter, DraftSession
from rasd_integrations.drafters.lookup import look_up
from rasd_integrations.drafters.tree import Tree
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock


class DatastoreDrafter(Drafter):
    """Proposes the store's continuations of the last tokens, as a tree.

    The store's texts need not be in the prompt. Drafts never change an answer, but its speed tells that a text is in
    the store: give each tenant a store of its own.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        learned: TokenStore | None = None,
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
            learned: Also drafted from, and extended by every answer when it ends; must have ``max_tokens``.
                ``None`` learns nothing: answers of one user would draft for another.
            name: Name in the statistics.
            min_match: Least tokens of a match, 1 to 16.
            max_draft: Maximum tokens of a draft.
            min_probability: Least estimated probability of a drafted token.
            max_rows: Maximum occurrences read, evenly spread over all.
            tree: Draft less frequent continuations too; else one chain.

        Raises:
            ConfigurationError: A value out of its range, a learned store without a bound, or stores of
                two tokenizers.
        """
        for option, value, least, most in (
            ("min_match", min_match, 1, MAX_MATCH),
            ("max_draft", max_draft, 1, 1024),
            ("min_probability", min_probability, 0, 1),
            ("max_rows", max_rows, 1, 1 << 16),
        ):
            check_value(least <= value <= most, option, value, f"in {least}..{most}")
        if learned is not None and learned.max_tokens is None:
            msg = (
                "The learned store has no max_tokens, so answers would fill it without end. Make it with a "
                "bound: TokenStore(encode, max_tokens=1_000_000)."
            )
            raise ConfigurationError(msg)
        if learned is not None and learned.tokenizer != store.tokenizer:
            msg = (
                f"The store and the learned one are of different tokenizers ({store.tokenizer} and "
                f"{learned.tokenizer}). Build both with the target's."
            )
            raise ConfigurationError(msg)
        self.store = store
        self.learned = learned
        self.stores = (store,) if learned is None else (store, learned)
        self.name = name
        self.min_match = min_match
        self.max_draft = max_draft
        self.min_probability = min_probability
        self.max_rows = max_rows
        self.tree = tree

    def start(self, context: DraftContext) -> DatastoreSession:
        """Start an answer."""
        return DatastoreSession(self, context)


class DatastoreSession(DraftSession):
    """State of one answer: its last tokens. Each draft reads the store as it is then."""

    def __init__(self, drafter: DatastoreDrafter, context: DraftContext) -> None:
        """Made by :meth:`DatastoreDrafter.start`."""
        self._drafter = drafter
        self._prompt = list(context.prompt_ids[-MAX_MATCH:])
        self._answer: list[int] = []

    def propose(self, budget: int) -> Draft:
        """Return the most probable continuations as a tree of at most ``budget`` tokens.

        Raises:
            RetrievalError: The store's file was changed in place.
        """
        token_ids, parents, node_probs = self._grow((), budget, tree=self._drafter.tree)
        return Draft(token_ids, parents, source=self._drafter.name, node_probs=node_probs)

    def propose_after(self, extra: Sequence[int], budget: int) -> tuple[int, ...]:
        """Return the most probable continuation of the committed tokens and ``extra``."""
        return self._grow(extra, budget, tree=False)[0]

    def observe(self, block: TokenBlock) -> None:
        """Append the committed tokens."""
        self._answer.extend(block.token_ids)

    def close(self) -> None:
        """Add the answer to the learned store."""
        answer, self._answer = self._answer, []
        if self._drafter.learned is not None and answer:
            self._drafter.learned.add_ids([answer])

    def _grow(self, extra: Sequence[int], budget: int, *, tree: bool) -> Tree:
        drafter = self._drafter
        budget = min(budget, drafter.max_draft)
        if budget < 1:
            return (), (), ()
        context = [*self._prompt, *self._answer[-MAX_MATCH:], *extra]
        return look_up(
            [shard for store in drafter.stores for shard in store.shards],
            context,
            budget,
            min_match=drafter.min_match,
            most_rows=drafter.max_rows,
            min_probability=drafter.min_probability,
            tree=tree,
        )
