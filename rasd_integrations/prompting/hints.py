"""What an edge knows about a prompt, and the plan made from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rasd_integrations.types import Chunk, Message

Prompt: TypeAlias = str | Sequence[Message]
"""A plain text, or chat messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptHints:
    """What an edge knows about how a prompt was made. Every field is optional.

    Attributes:
        question: The user's question.
        search_query: The retriever's query, often the question made standalone.
        question_source: ``"explicit"``, ``"template"``, ``"retriever"``, ``"tool_call"``, ...
        chunks: What the pipeline retrieved, best first.
        chunk_source: Where the chunks were found.
        context: The rendered context, as the prompt has it.
        rerender: Fills the prompt's template with another context.
        filter: The retriever's own metadata filter.
    """

    question: str | None = None
    search_query: str | None = None
    question_source: str | None = None
    chunks: tuple[Chunk, ...] = ()
    chunk_source: str | None = None
    context: str | None = None
    rerender: Callable[[str], Prompt] | None = None
    filter: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPlan:
    """The two prompts of one answer.

    Attributes:
        target: What the target reads.
        drafter: What a model drafter reads, if it has a prompt of its own.
        chunks: The chunks behind the answer, best first.
        unseen: Retrieved chunks that the target's prompt does not hold, and that may be drafted from.
        documents: Other chunks of the documents that the target reads (``context="documents"``).
        question: The question that the plan was made for.
        question_source: Where the question was found.
        chunk_source: Where the chunks were found; ``"prompt"``: pieces of the prompt itself.
        off_reason: Why the drafter has no prompt of its own.
        faults: What went wrong, one line each.
        omitted_tokens: Tokens of documents that did not fit (``context="documents"``).
        retrieve_s: Seconds spent in the store.
    """

    target: Prompt
    drafter: Prompt | None = None
    chunks: tuple[Chunk, ...] = ()
    unseen: tuple[Chunk, ...] = ()
    documents: tuple[Chunk, ...] = ()
    question: str | None = None
    question_source: str | None = None
    chunk_source: str | None = None
    off_reason: str | None = None
    faults: tuple[str, ...] = ()
    omitted_tokens: int = 0
    retrieve_s: float = 0.0

    @property
    def quotable(self) -> tuple[Chunk, ...]:
        """What the answer may quote: chunks with a source of their own, the best first."""
        return (*(() if self.chunk_source == "prompt" else self.chunks), *self.documents)
