"""Turns what was captured, or given outright, into hints for the prompt planner.

Pure rules: which captured variable is the question, which is the context, which Documents belong to
this prompt. A captured text counts only if it occurs in the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage

from rasd_integrations.langchain.capture import Captured, document_chunk
from rasd_integrations.prompting import PromptHints
from rasd_integrations.runtime.hints import RetrievalEvent, explicit_hints
from rasd_integrations.types import Chunk

if TYPE_CHECKING:
    from typing import TypeAlias

Variables: TypeAlias = "Mapping[str, Any]"

_QUESTION_NAMES = ("question", "query", "query_str", "input", "user_input", "human_input", "q")
_CONTEXT_NAMES = ("context", "context_str", "documents", "docs", "sources", "summaries", "text")
_LONGEST_QUESTION = 2000  # characters; a longer variable is a document, whatever its name


def prompt_hints(
    prompt: Sequence[BaseMessage] | str, captured: Captured, explicit: Variables | None = None
) -> PromptHints | None:
    """Return what is known of how ``prompt`` was made; ``None`` if nothing is.

    Args:
        prompt: What the model was called with.
        captured: What the callbacks recorded of it.
        explicit: The caller's own ``rasd={...}``, which overrides the rest by name.

    Raises:
        ConfigurationError: ``explicit`` has an unknown name or a value of the wrong type.
    """
    messages = [] if isinstance(prompt, str) else prompt
    text = prompt if isinstance(prompt, str) else "\n".join(str(m.text) for m in messages)
    recent = () if captured.retrievals else _occurring(captured.recent, text)
    retrievals = captured.retrievals or recent
    templates = [v for t in captured.templates for v in _entries(t, text)]
    chains = [v for c in captured.chains for v in _entries(c, text)]

    question, question_source = _question(templates, chains, text)
    chunks, chunk_source = _chunks(templates, chains, messages, retrievals, text)
    found = {
        "question": question,
        "question_source": question_source,
        "search_query": _own_query(question, messages, captured.retrievals, recent, text),
        "chunks": chunks,
        "chunk_source": chunk_source,
        "context": _context([*templates, *chains], question, chunks, text),
        **explicit_hints(explicit, _chunk),
    }
    return PromptHints(**found) if any(found.values()) else None


def _chunk(value: Any, rank: int) -> Chunk | None:
    return document_chunk(value, rank) if isinstance(value, Document) else None


# --- the question ---


def _question(
    templates: Sequence[Variables], chains: Sequence[Variables], text: str
) -> tuple[str | None, str | None]:
    """Return the question as a template or chain was given it; the planner finds any other."""
    made = _named_question(templates, text) or _shortest(templates[:1], text)
    if made:
        return made, "template"
    given = _named_question(chains, text)
    return given, "chain" if given else None


def _named_question(captured: Sequence[Variables], text: str) -> str | None:
    values = (variables.get(name) for variables in captured for name in _QUESTION_NAMES)
    return next((value for value in values if _is_question(value, text)), None)


def _shortest(captured: Sequence[Variables], text: str) -> str | None:
    named = [(name, value) for variables in captured for name, value in variables.items()]
    values = [v for name, v in named if name not in _CONTEXT_NAMES and _is_question(v, text)]
    return min(values, key=len, default=None)


def _is_question(value: object, text: str) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_QUESTION and occurs(value, text)


def _own_query(
    question: str | None,
    messages: Sequence[BaseMessage],
    retrievals: Sequence[RetrievalEvent],
    recent: Sequence[RetrievalEvent],
    text: str,
) -> str | None:
    humans = [i for i, m in enumerate(messages) if isinstance(m, HumanMessage)]
    turn = messages[humans[-1] + 1 :] if humans else messages
    # In an agent's turn the history says more than the event: the question asked and the call made.
    if question is None and any(isinstance(m, ToolMessage) for m in turn):
        return None
    if retrievals:
        return retrievals[0].query
    return next((r.query for r in recent if occurs(r.query, text)), None)


# --- the chunks ---


def _chunks(
    templates: Sequence[Variables],
    chains: Sequence[Variables],
    messages: Sequence[BaseMessage],
    retrievals: Sequence[RetrievalEvent],
    text: str,
) -> tuple[tuple[Chunk, ...], str | None]:
    sources = {
        "template": _found(v for variables in templates for v in variables.values()),
        "artifact": _found(m.artifact for m in reversed(messages) if isinstance(m, ToolMessage)),
        "retriever": (chunk for r in retrievals for chunk in r.chunks),
        "chain": _found(v for variables in chains for v in variables.values()),
    }
    chunks: dict[str, Chunk] = {}
    chunk_source = None
    for source, found in sources.items():
        for chunk in found:
            if chunk.text.strip() and chunk.text not in chunks:
                chunks[chunk.text] = replace(chunk, rank=len(chunks))
        chunk_source = chunk_source or (source if chunks else None)
    if not any(occurs(chunk, text) for chunk in chunks) and chunk_source == "chain":
        return (), None  # what a chain was given need not be what it asks the model about
    return tuple(chunks.values()), chunk_source


def _found(values: Iterable[object]) -> Iterator[Chunk]:
    return (document_chunk(document, 0) for value in values for document in _documents(value))


def _documents(value: object) -> Iterator[Document]:
    values = value if isinstance(value, list | tuple) else [value]
    return (v for v in values if isinstance(v, Document))


# --- the context ---


def _context(
    captured: Iterable[Variables], question: str | None, chunks: Sequence[Chunk], text: str
) -> str | None:
    """Return the rendered context as it occurs in the prompt: found by its chunks, else its name or length."""
    rendered = {
        value: name
        for variables in captured
        for name, value in ((n, _rendered(v)) for n, v in variables.items())
        if value.strip() and value != question and value in text
    }
    for value in rendered:
        if any(occurs(chunk.text, value) for chunk in chunks):
            return value
    for value, name in rendered.items():
        if name in _CONTEXT_NAMES:
            return value
    return max((v for v in rendered if len(v) > _LONGEST_QUESTION), key=len, default=None)


def _rendered(value: object) -> str:
    # A bare retriever puts str([Document(...)]) in the prompt.
    documents = isinstance(value, list | tuple) and any(_documents(value))
    return value if isinstance(value, str) else str(value) if documents else ""


# --- shared ---


def occurs(value: object, text: str) -> bool:
    """True if ``value`` is a text that occurs in ``text``, verbatim or as `repr` writes it."""
    if not isinstance(value, str) or not (value := value.strip()):
        return False
    escaped = repr(value)[1:-1]
    return value in text or (escaped != value and escaped in text)


def _occurring(retrievals: Iterable[RetrievalEvent], text: str) -> tuple[RetrievalEvent, ...]:
    """Return the retrievals with chunks in the prompt, with those chunks only."""
    kept = (
        RetrievalEvent(r.query, tuple(c for c in r.chunks if occurs(c.text, text)))
        for r in retrievals
    )
    return tuple(retrieval for retrieval in kept if retrieval.chunks)


def _entries(variables: Variables, text: str) -> list[Variables]:
    """Return the variables; of a classic chain's `input_list`, the entries behind this prompt."""
    entries = variables.get("input_list")
    if not isinstance(entries, list):
        return [variables]
    dicts = [e for e in entries if isinstance(e, Mapping)]
    return [e for e in dicts if all(occurs(v, text) for v in e.values() if isinstance(v, str))]
