"""Drafts from the pipeline's collection and from the answers given before."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rasd_integrations.datastores.memory import Memory
from rasd_integrations.datastores.tokens.shard import MAX_MATCH, Shard
from rasd_integrations.drafters.base import Drafter, DraftSession
from rasd_integrations.drafters.lookup import look_up
from rasd_integrations.types import Draft, DraftContext, TokenBlock

_MOST_ROWS = 32  # 512 give no more tokens a step
_LEAST_PROBABILITY = 0.02
_MOST_DRAFT = 32


class CollectionDrafter(Drafter):
    """Proposes what followed the last tokens in the texts of the pipeline's store."""

    name = "collection"

    def __init__(self, memory: Memory) -> None:
        """Draft from ``memory``."""
        self._memory = memory

    def start(self, context: DraftContext) -> DraftSession:
        """Start an answer; the texts are those of ``context.source`` under ``context.filter``."""
        texts = self._memory.collection(context.source, context.filter)
        return _Session(self.name, context, texts)


class AnswersDrafter(Drafter):
    """Proposes what followed the last tokens in earlier answers, to which it adds each answer."""

    name = "answers"

    def __init__(self, memory: Memory) -> None:
        """Draft from ``memory``."""
        self._memory = memory

    def start(self, context: DraftContext) -> DraftSession:
        """Start an answer."""
        return _AnswersSession(self.name, context, self._memory)


class _Session(DraftSession):
    """The last tokens of one answer; each draft reads the texts as they are then."""

    def __init__(
        self, name: str, context: DraftContext, texts: Callable[[], Iterable[Shard]]
    ) -> None:
        self._name = name
        self._texts = texts
        self._prompt = list(context.prompt_ids[-MAX_MATCH:])
        self._answer: list[int] = []

    def propose(self, budget: int) -> Draft:
        budget = min(budget, _MOST_DRAFT)
        if budget < 1:
            return Draft()
        token_ids, parents, node_probs = look_up(
            self._texts(),
            [*self._prompt, *self._answer[-MAX_MATCH:]],
            budget,
            min_match=1,
            most_rows=_MOST_ROWS,
            min_probability=_LEAST_PROBABILITY,
        )
        return Draft(token_ids, parents, source=self._name, node_probs=node_probs)

    def observe(self, block: TokenBlock) -> None:
        self._answer.extend(block.token_ids)


class _AnswersSession(_Session):
    def __init__(self, name: str, context: DraftContext, memory: Memory) -> None:
        super().__init__(name, context, lambda: memory.answers.store.shards)
        self._memory = memory

    def close(self) -> None:
        answer, self._answer = self._answer, []
        if answer:
            self._memory.answers.add(self._prompt, answer)
