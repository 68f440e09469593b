"""What the edges tell the planner of a prompt, and what the planner makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rasd_integrations.types import Chunk, Message

Prompt: TypeAlias = str | Sequence[Message]
"""A plain text, or chat messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptHints:
    """What an edge knows of how a prompt was made. Everything is optional.

    Attributes:
        question: The user's question.
        search_query: What the retriever was asked: often the question made standalone.
        question_source: Where the question was found: ``"explicit"``, ``"template"``,
            ``"retriever"``, ``"tool_call"``, ...
        chunks: What the pipeline retrieved, best first.
        chunk_source: Where the chunks were found.
        context: The rendered context as it stands inside the prompt.
        rerender: Fills the prompt's own template with another context.
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
        drafter: What a model drafter reads; ``None``: no prompt of its own.
        chunks: The chunks behind the answer, best first.
        question: The question that the plan was made for.
        question_source: Where the question was found.
        chunk_source: Where the chunks were found; ``"prompt"``: cut out of the prompt itself.
        off_reason: Why the drafter has no prompt of its own.
        faults: What went wrong on the way, one line each.
        omitted_tokens: Tokens of the documents that found no room (``context="documents"``).
        retrieve_s: Seconds spent in the store.
    """

    target: Prompt
    drafter: Prompt | None = None
    chunks: tuple[Chunk, ...] = ()
    question: str | None = None
    question_source: str | None = None
    chunk_source: str | None = None
    off_reason: str | None = None
    faults: tuple[str, ...] = ()
    omitted_tokens: int = 0
    retrieve_s: float = 0.0
