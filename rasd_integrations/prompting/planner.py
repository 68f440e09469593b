"""Plans an answer's two prompts: what the target reads and what the drafter reads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from rasd_integrations.config import ContextMode, RetrievalConfig
from rasd_integrations.prompting.chunks import StoreSession, find_chunks
from rasd_integrations.prompting.compress import Compressor, only
from rasd_integrations.prompting.expand import expand
from rasd_integrations.prompting.hints import Prompt, PromptHints, PromptPlan
from rasd_integrations.prompting.locate import PromptIndex
from rasd_integrations.prompting.prompt_view import PromptView
from rasd_integrations.prompting.question import classify, find_question
from rasd_integrations.prompting.token_counts import TokenCounter
from rasd_integrations.retrieval import GuardedSource
from rasd_integrations.types import Chunk

logger = logging.getLogger(__name__)

_NO_RETRIEVAL = {
    "condense": "the call only makes a question standalone",
    "tool_decision": "the call decides on a tool; nothing is retrieved for it yet",
}


class PromptPlanner:
    """Plans the prompts of each answer and caches token counts and cut texts."""

    def __init__(
        self,
        source: GuardedSource | None,
        retrieval: RetrievalConfig,
        context: ContextMode,
        count_tokens: Callable[[str], int],
    ) -> None:
        """Plan with chunks from ``source``.

        Args:
            source: The pipeline's own store, if there is one.
            retrieval: Limits of the search and of the drafter's prompt.
            context: ``"prompt"``: the target reads the prompt as sent; ``"documents"``: the whole
                documents of its chunks.
            count_tokens: Counts the target's tokens of a text, without special tokens.
        """
        self._source = source
        self._retrieval = retrieval
        self._context = context
        self._tokens = TokenCounter(count_tokens)
        self._compressor = Compressor(retrieval)
        self._logged = False

    def plan(
        self, prompt: Prompt, *, hints: PromptHints | None, room: int, wants_drafter_prompt: bool
    ) -> PromptPlan:
        """Return what target and drafter read. Never raises over a store, a hint or odd text.

        Args:
            prompt: What the framework sent; it is not changed.
            hints: What the edge knows about it.
            room: Most tokens of the target's prompt.
            wants_drafter_prompt: The drafter reads a prompt of its own.
        """
        wants = wants_drafter_prompt
        searches = self._context == "documents" or self._retrieval.store_policy == "any"
        if hints is None and not wants and not searches:
            return PromptPlan(target=prompt)  # nothing reads a plan
        hints = hints or PromptHints()
        view = PromptView.of(prompt)
        store = StoreSession(self._source, hints.filter)
        plan = self._plan(view, hints, store, room, wants=wants, searches=searches)
        self._log_missing_store(plan, view, wants=wants)
        if not wants:
            plan = replace(plan, drafter=None, off_reason=None)
        return replace(plan, faults=(*store.faults(), *plan.faults), retrieve_s=store.seconds)

    def plan_without_drafter(self, prompt: Prompt, hints: PromptHints | None) -> PromptPlan:
        """Return ``prompt`` with the captured chunks that are in it; search and tokenise nothing."""
        if hints is None or not hints.chunks:
            return PromptPlan(target=prompt)
        located, _ = PromptIndex(PromptView.of(prompt), hints).locate(hints.chunks)
        chunks = tuple(at.chunk for at in located)
        return PromptPlan(
            target=prompt, chunks=chunks, chunk_source=hints.chunk_source if chunks else None
        )

    def parts(
        self, prompt: Prompt, hints: PromptHints, count: int
    ) -> tuple[tuple[Prompt, tuple[Chunk, ...]], ...]:
        """Return the prompt with each of ``count`` parts of its chunks alone, and those chunks.

        Chunks are dealt out by rank. There are fewer parts, or none, where the prompt has fewer chunks.
        """
        view = PromptView.of(prompt)
        tokens = self._tokens.estimate_prompt(view)
        index = PromptIndex(view, hints, tokens, self._retrieval.chunk_tokens)
        question = find_question(view, hints)
        found = find_chunks(
            index, question, StoreSession(self._source, hints.filter), self._retrieval
        )
        located = sorted(found.located, key=lambda at: at.chunk.rank)
        dealt = [located[n::count] for n in range(min(count, len(located)))]
        prompts = (only(index, found, [at.span for at in part]) for part in dealt)
        return tuple(
            (prompt, tuple(at.chunk for at in part))
            for prompt, part in zip(prompts, dealt, strict=True)
        )

    def _plan(
        self,
        view: PromptView,
        hints: PromptHints,
        store: StoreSession,
        room: int,
        *,
        wants: bool,
        searches: bool,
    ) -> PromptPlan:
        question = find_question(view, hints)
        plan = PromptPlan(
            target=view.prompt,
            question=question.text if question else None,
            question_source=question.source if question else None,
        )
        if reason := _NO_RETRIEVAL.get(classify(view, hints)):
            return replace(plan, off_reason=reason)
        tokens = self._tokens.estimate_prompt(view)
        short = tokens < self._retrieval.gate_tokens
        index = PromptIndex(view, hints, tokens, self._retrieval.chunk_tokens)
        may_search = searches or (wants and not short)
        found = find_chunks(index, question if may_search else None, store, self._retrieval)
        plan = replace(plan, chunks=found.chunks, unseen=found.unseen, chunk_source=found.source)
        if self._context == "documents":
            plan = expand(plan, index, found, store, self._tokens, room=room)
            if plan.target is not view.prompt:
                return self._with_sent_prompt(plan, index)
        if short:
            return replace(plan, off_reason=self._too_short(tokens))
        if question is None:
            return replace(plan, off_reason="the prompt asks no question that could be found")
        return self._compressor.compress(plan, index, found, question) if wants else plan

    def _with_sent_prompt(self, plan: PromptPlan, index: PromptIndex) -> PromptPlan:
        """Return ``plan`` with the prompt as sent for the drafter, if it is short enough."""
        tokens = self._tokens.estimate_prompt(PromptView.of(plan.target))
        if tokens < self._retrieval.gate_tokens:
            return replace(plan, off_reason=self._too_short(tokens))
        if index.tokens > self._retrieval.gate_share * tokens:
            reason = (
                f"the prompt as sent has about {index.tokens} of the {tokens} tokens with its documents, "
                f"over gate_share={self._retrieval.gate_share:g}"
            )
            return replace(plan, off_reason=reason)
        return replace(plan, drafter=index.view.prompt)

    def _log_missing_store(self, plan: PromptPlan, view: PromptView, *, wants: bool) -> None:
        """Log once that no store was given although one would be read."""
        if self._logged or self._source is not None or plan.question is None:
            return
        if self._context == "documents" and plan.target == view.prompt:
            self._logged = True
            logger.warning(
                "context='documents' has no store to read documents from: the prompt is read as it was sent. "
                "Give store=, or attach() the chain, its retriever or the store."
            )
        elif wants and plan.chunk_source == "prompt":
            self._logged = True
            logger.info(
                "No store was given: the drafter reads pieces of the prompt itself. If the prompt's chunks "
                "come from a store, give store=, or attach() the chain, its retriever or the store."
            )

    def _too_short(self, tokens: int) -> str:
        return (
            f"the prompt has about {tokens} tokens, fewer than "
            f"gate_tokens={self._retrieval.gate_tokens}"
        )
