"""Which retrieved chunks stand in the prompt: what was captured first, else what the store finds."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rasd_integrations.config import RetrievalConfig
from rasd_integrations.prompting.hints import PromptHints
from rasd_integrations.prompting.locate import Located, PromptIndex
from rasd_integrations.prompting.prompt_view import PromptView, Span
from rasd_integrations.prompting.question import Question
from rasd_integrations.retrieval import GuardedSource
from rasd_integrations.types import Chunk

_DOCUMENT = 4  # times `chunk_tokens`; a longer retrieved text is a document, itself to be searched
_LEAST_SHARE = 0.5  # of the captured chunks must stand in the prompt to tell where its context is
_LONGEST_HEADER = 300
_LABEL = re.compile(r"[ \t]*(\w[\w .-]{0,40}:)")


class StoreSession:
    """One plan's use of the store: the filter that goes with it, and the time it took."""

    def __init__(self, source: GuardedSource | None, filter: Any) -> None:
        """Use ``source`` with the retriever's own ``filter``."""
        self._source = source
        self._filter = filter
        self.seconds = 0.0

    def search(self, query: str, k: int) -> list[Chunk]:
        """Return the store's chunks for ``query``; nothing without a store."""
        if self._source is None:
            return []
        started = time.perf_counter()
        chunks = self._source.search(query, k, filter=self._filter)
        self.seconds += time.perf_counter() - started
        return chunks

    def document(self, chunk: Chunk) -> list[Chunk]:
        """Return the chunks of the document that ``chunk`` belongs to."""
        if self._source is None:
            return []
        started = time.perf_counter()
        chunks = self._source.document(chunk, filter=self._filter)
        self.seconds += time.perf_counter() - started
        return chunks

    def faults(self) -> tuple[str, ...]:
        """Return what went wrong in the store."""
        return () if self._source is None else self._source.take_faults()


@dataclass(frozen=True, slots=True)
class Found:
    """The chunks of a plan.

    Attributes:
        located: Those that stand in the prompt, best first. A span takes in the chunk's header line.
        extra: Those that do not, where the store's policy admits them.
        frame: Where the captured chunks stand, if most of them do: together they are the context.
        source: Where the chunks come from.
    """

    located: tuple[Located, ...] = ()
    extra: tuple[Chunk, ...] = ()
    frame: tuple[Span, ...] = ()
    source: str | None = None

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, best first."""
        return tuple(
            sorted((*(at.chunk for at in self.located), *self.extra), key=lambda c: c.rank)
        )

    def passages(self, chunk_chars: int) -> list[Located]:
        """Return the located chunks that are no whole documents."""
        return [at for at in self.located if len(at.span) <= _DOCUMENT * chunk_chars]


def find_chunks(
    view: PromptView,
    index: PromptIndex,
    hints: PromptHints,
    question: Question | None,
    store: StoreSession,
    retrieval: RetrievalConfig,
    chunk_chars: int,
    *,
    may_search: bool,
) -> Found:
    """Return the captured chunks; else, or where those are whole documents, what the store finds."""
    captured = _found(view, index, hints.chunks, hints.chunk_source or "hints", retrieval)
    enough = len(captured.located) >= _LEAST_SHARE * len(hints.chunks)
    frame = tuple(at.span for at in captured.located) if enough else ()
    captured = replace(captured, frame=frame)
    if captured.passages(chunk_chars) or question is None or not may_search:
        return captured
    chunks = store.search(question.query, retrieval.k)
    searched = _found(view, index, chunks, "store", retrieval)
    return replace(searched, frame=frame) if searched.chunks else captured


def _found(
    view: PromptView,
    index: PromptIndex,
    chunks: Sequence[Chunk],
    source: str,
    retrieval: RetrievalConfig,
) -> Found:
    located, missing = index.locate(chunks)
    extra = tuple(missing) if retrieval.store_policy == "any" else ()
    spans = [_with_header(view, at.span, located) for at in located]
    located = [replace(at, span=span) for at, span in zip(located, spans, strict=True)]
    return Found(tuple(located), extra, source=source if located or extra else None)


def _with_header(view: PromptView, span: Span, located: Sequence[Located]) -> Span:
    """Return ``span`` with the "Source: ..." lines right before it, if other chunks have such, too."""
    text = view.texts[span.message]
    floor = max(
        (
            o.span.end
            for o in located
            if o.span.message == span.message and o.span.end <= span.start
        ),
        default=0,
    )
    floor = max(floor, span.start - _LONGEST_HEADER)
    blank = text.rfind("\n\n", floor, span.start)
    if blank < 0 and floor > 0:
        return span  # no blank line: this is prose before the chunk
    start = blank + 2 if blank >= 0 else 0
    header = text[start : span.start].rstrip("\n")
    labels = [_LABEL.match(line) for line in header.split("\n")]
    if not all(labels) or labels[0] is None or text.count(labels[0][1]) < 2:
        return span
    return replace(span, start=start)
