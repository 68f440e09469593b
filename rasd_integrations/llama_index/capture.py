"""Records how a prompt was made: its template and arguments, when the framework fills it.

Keyed by a hash of the prompt's content, which threads, tasks and streams share without passing an id.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import BaseNode, NodeWithScore

from rasd_integrations.llama_index.trace import IndexRetrieval, node_chunk
from rasd_integrations.prompting import Prompt, PromptHints
from rasd_integrations.retrieval.items import digest
from rasd_integrations.runtime.hints import Bounded
from rasd_integrations.types import Chunk

Sent = str | Sequence[ChatMessage]
"""A prompt as LlamaIndex sends it to an LLM."""

_MAX_PROMPTS = 32
_QUESTIONS = ("query_str", "query", "question", "user_input", "input", "q")
_CONTEXTS = ("context_str", "context_msg", "context")


@dataclass(frozen=True, slots=True)
class Filled:
    """A template and what it was filled with.

    Attributes:
        template: The template, with the variables that were bound before in ``template.kwargs``.
        args: The variables of the call.
        form: Which of the framework's ways to fill it was taken.
    """

    template: BasePromptTemplate
    args: Mapping[str, Any]
    form: Literal["messages", "text", "structured"]

    @property
    def variables(self) -> dict[str, Any]:
        """All variables; those of the call override the template's."""
        return {**self.template.kwargs, **self.args}


def sent_text(sent: Sent) -> str:
    """Return the text of a prompt, one message a line."""
    return sent if isinstance(sent, str) else "\n".join(m.content or "" for m in sent)


def same_prompt(one: Sent, other: Sent) -> bool:
    """True if two prompts have the same roles and texts."""
    return _key(one) == _key(other)


def _key(sent: Sent) -> bytes:
    if isinstance(sent, str):
        return digest("text", sent)
    return digest(*(part for m in sent for part in (m.role.value, m.content or "")))


class PromptCapture:
    """Templates of the prompts that one LLM has filled, by the prompts' content."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._filled: Bounded[bytes, Filled] = Bounded(_MAX_PROMPTS)

    def record(self, sent: Sent, filled: Filled) -> None:
        """Record that ``sent`` was made from ``filled``."""
        with self._lock:
            self._filled[_key(sent)] = filled

    def lookup(self, sent: Sent) -> Filled | None:
        """Return what ``sent`` was made from, if that was seen."""
        with self._lock:
            return self._filled.get(_key(sent))


def question_of(filled: Filled) -> str | None:
    """Return the question among a template's variables, by its usual names."""
    variables = filled.variables
    values = (variables.get(name) for name in _QUESTIONS)
    return next((value for value in values if isinstance(value, str) and value.strip()), None)


def context_variable(filled: Filled, retrieval: IndexRetrieval | None) -> str | None:
    """Return the name of the variable that holds the context.

    By its usual names, else the longest one with a retrieved chunk in it.
    """
    variables = filled.variables
    for name in _CONTEXTS:
        if variables.get(name):
            return name
    if retrieval is None:
        return None
    holders = [n for n, v in variables.items() if isinstance(v, str) and retrieval.share(v)]
    return max(holders, key=lambda name: len(variables[name]), default=None)


def build_hints(
    sent: Sent,
    filled: Filled | None,
    retrieval: IndexRetrieval | None,
    rerender: Callable[[Filled, Mapping[str, Any]], Prompt],
    explicit: Mapping[str, Any],
) -> PromptHints | None:
    """Return what is known of how a prompt was made; ``None`` if nothing is.

    Args:
        sent: The prompt.
        filled: The template behind it, if one was seen.
        retrieval: The search behind it, if one was seen.
        rerender: Fills a template again, with the given arguments.
        explicit: Hints passed by the caller; they override captured ones by field.
    """
    known: dict[str, Any] = {}
    if filled is not None:
        if question := question_of(filled):
            known.update(question=question, question_source="template")
        if name := context_variable(filled, retrieval):
            text = str(filled.variables[name])
            known["context"] = text if text in sent_text(sent) else None
            known["rerender"] = lambda context: rerender(filled, {**filled.args, name: context})
    if retrieval is not None:
        known.update(chunks=retrieval.chunks, chunk_source="retriever", filter=retrieval.filter)
        if retrieval.query:
            known["search_query"] = retrieval.query
            known.setdefault("question_source", "retriever")
    known.update(explicit)
    return PromptHints(**known) if known else None


def chunk_of(item: Any, rank: int) -> Chunk | None:
    """Return a node as a chunk; ``None``: it is no node."""
    node = item.node if isinstance(item, NodeWithScore) else item
    return node_chunk(node, rank) if isinstance(node, BaseNode) else None
