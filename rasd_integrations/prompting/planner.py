"""From one prompt to two: decides what the target reads, what the drafter reads, and says why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from rasd_integrations.config import ContextMode, RetrievalConfig
from rasd_integrations.prompting.chunks import Found, StoreSession, find_chunks
from rasd_integrations.prompting.compress import Compressor, Scale
from rasd_integrations.prompting.expand import expand
from rasd_integrations.prompting.hints import Prompt, PromptHints, PromptPlan
from rasd_integrations.prompting.locate import PromptIndex
from rasd_integrations.prompting.prompt_view import PromptView
from rasd_integrations.prompting.question import Question, classify, find_question
from rasd_integrations.prompting.token_counts import TokenCounter
from rasd_integrations.retrieval import GuardedSource

logger = logging.getLogger(__name__)

_NO_RETRIEVAL = {
    "condense": "the call only makes a question standalone",
    "tool_decision": "the call decides on a tool; nothing is retrieved for it yet",
}


class PromptPlanner:
    """Plans the two prompts of each answer. Keep one: it remembers what it counted and cut."""

    def __init__(
        self,
        source: GuardedSource | None,
        retrieval: RetrievalConfig,
        context: ContextMode,
        count_tokens: Callable[[str], int],
    ) -> None:
        """Plan with chunks of ``source``.

        Args:
            source: The pipeline's own store, if there is one.
            retrieval: Limits of the search and of the drafter's prompt.
            context: ``"prompt"``: the target reads what was sent; ``"documents"``: the documents of its chunks.
            count_tokens: The target's token count of a text, without special tokens.
        """
        self._source = source
        self._retrieval = retrieval
        self._context = context
        self._tokens = TokenCounter(count_tokens)
        self._compressor = Compressor(retrieval)
        self._told = False

    def plan(
        self, prompt: Prompt, *, hints: PromptHints | None, room: int, wants_drafter_prompt: bool
    ) -> PromptPlan:
        """Return what target and drafter read. Never raises over a store, a hint or odd text.

        Args:
            prompt: What the framework sent; it is not changed.
            hints: What the edge knows of how it was made.
            room: Tokens that the target's prompt may have.
            wants_drafter_prompt: A drafter reads a prompt of its own, if there is one.
        """
        hints = hints or PromptHints()
        view = PromptView.of(prompt)
        store = StoreSession(self._source, hints.filter)
        plan = self._plan(view, hints, store, room, wants_drafter_prompt)
        self._tell_of_store(plan, view, wants_drafter_prompt)
        if not wants_drafter_prompt:
            plan = replace(plan, drafter=None, off_reason=None)
        return replace(plan, faults=(*store.faults(), *plan.faults), retrieve_s=store.seconds)

    def _plan(
        self, view: PromptView, hints: PromptHints, store: StoreSession, room: int, wants: bool
    ) -> PromptPlan:
        question = find_question(view, hints)
        plan = PromptPlan(
            target=view.prompt,
            question=question.text if question else None,
            question_source=question.source if question else None,
        )
        if reason := _NO_RETRIEVAL.get(classify(view, hints)):
            return replace(plan, off_reason=reason)
        scale = Scale.of(view, self._tokens.estimate_prompt(view), self._retrieval)
        short = scale.tokens < self._retrieval.gate_tokens
        index = PromptIndex(view, hints.context)
        anywhere = self._retrieval.store_policy == "any"
        found = find_chunks(
            view,
            index,
            hints,
            question,
            store,
            self._retrieval,
            scale.chunk_chars,
            may_search=anywhere or self._context == "documents" or (wants and not short),
        )
        plan = replace(plan, chunks=found.chunks, chunk_source=found.source)
        if self._context == "documents":
            expansion = expand(
                view,
                index,
                hints,
                found,
                store,
                self._tokens,
                room=room,
                chunk_chars=scale.chunk_chars,
            )
            plan = replace(plan, faults=expansion.faults, omitted_tokens=expansion.omitted_tokens)
            if expansion.target is not None:
                return self._expanded(replace(plan, target=expansion.target), view, scale)
        if short:
            return replace(plan, off_reason=self._too_short(scale.tokens))
        if question is None:
            return replace(plan, off_reason="the prompt asks no question that could be found")
        return self._compressed(plan, view, index, hints, found, question, scale) if wants else plan

    def _expanded(self, plan: PromptPlan, view: PromptView, scale: Scale) -> PromptPlan:
        """Return ``plan`` with the prompt as sent for the drafter, if that is short enough beside the target's."""
        tokens = self._tokens.estimate_prompt(PromptView.of(plan.target))
        if tokens < self._retrieval.gate_tokens:
            return replace(plan, off_reason=self._too_short(tokens))
        if scale.tokens > self._retrieval.gate_share * tokens:
            reason = (
                f"the prompt as sent has about {scale.tokens} of the {tokens} tokens with its documents, "
                f"over gate_share={self._retrieval.gate_share:g}"
            )
            return replace(plan, off_reason=reason)
        return replace(plan, drafter=view.prompt)

    def _compressed(
        self,
        plan: PromptPlan,
        view: PromptView,
        index: PromptIndex,
        hints: PromptHints,
        found: Found,
        question: Question,
        scale: Scale,
    ) -> PromptPlan:
        short = self._compressor.compress(view, index, hints, found, question, scale)
        plan = replace(
            plan,
            drafter=short.drafter,
            off_reason=short.off_reason,
            faults=(*plan.faults, *short.faults),
        )
        if plan.chunks or not short.pieces:
            return plan
        return replace(plan, chunks=short.pieces, chunk_source="prompt")

    def _tell_of_store(self, plan: PromptPlan, view: PromptView, wants: bool) -> None:
        """Log once that no store was given, where one would have been read."""
        if self._told or self._source is not None or plan.question is None:
            return
        if self._context == "documents" and plan.target == view.prompt:
            self._told = True
            logger.warning(
                "context='documents' has no store to read documents from: the prompt is read as it was sent. "
                "Give store=, or attach() the chain, its retriever or the store."
            )
        elif wants and plan.chunk_source == "prompt":
            self._told = True
            logger.info(
                "No store was given: the drafter reads pieces of the prompt itself. If the prompt's chunks "
                "come from a store, give store=, or attach() the chain, its retriever or the store."
            )

    def _too_short(self, tokens: int) -> str:
        return (
            f"the prompt has about {tokens} tokens, fewer than "
            f"gate_tokens={self._retrieval.gate_tokens}"
        )
