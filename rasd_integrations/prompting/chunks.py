"""Which retrieved chunks are in the prompt: captured ones, else what the store finds."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rasd_integrations.config import RetrievalConfig
from rasd_integrations.prompting.locate import Located, PromptIndex
from rasd_integrations.prompting.prompt_view import PromptView, Span
from rasd_integrations.prompting.question import Question
from rasd_integrations.retrieval import GuardedSource
from rasd_integrations.types import Chunk

_DOCUMENT = 4  # times `chunk_tokens`; a longer retrieved text is a document, to be searched itself
_MIN_SHARE = 0.5  # of the captured chunks must be in the prompt to show where its context is
_LONGEST_HEADER = 300
_LABEL = re.compile(r"[ \t]*(\w[\w .-]{0,40}:)")


class StoreSession:
    """One plan's use of the store: its filter, and the seconds it took."""

    def __init__(self, source: GuardedSource | None, filter: Any) -> None:
        """Query ``source`` under the retriever's ``filter``."""
        self._source = source
        self._filter = filter
        self.seconds = 0.0

    def search(self, query: str, k: int) -> list[Chunk]:
        """Return the store's chunks for ``query``; nothing without a store."""
        return self._timed(lambda source: source.search(query, k, filter=self._filter))

    def document(self, chunk: Chunk) -> list[Chunk]:
        """Return the chunks of the document that ``chunk`` belongs to."""
        return self._timed(lambda source: source.document(chunk, filter=self._filter))

    def faults(self) -> tuple[str, ...]:
        """Return what went wrong in the store."""
        return () if self._source is None else self._source.take_faults()

    def _timed(self, ask: Callable[[GuardedSource], list[Chunk]]) -> list[Chunk]:
        if self._source is None:
            return []
        started = time.perf_counter()
        chunks = ask(self._source)
        self.seconds += time.perf_counter() - started
        return chunks


@dataclass(frozen=True, slots=True)
class FoundChunks:
    """The chunks of a plan.

    Attributes:
        located: Those in the prompt, best first. A span includes the chunk's header line.
        extra: Those that are not, if the store's policy admits them.
        unseen: Those that are not and may still be drafted from: the pipeline retrieved them, or they are ``extra``.
        frame: Spans of the captured chunks if most of them are in the prompt: its context.
        source: Where the chunks come from.
    """

    located: tuple[Located, ...] = ()
    extra: tuple[Chunk, ...] = ()
    unseen: tuple[Chunk, ...] = ()
    frame: tuple[Span, ...] = ()
    source: str | None = None

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, best first."""
        chunks = (*(at.chunk for at in self.located), *self.extra)
        return tuple(sorted(chunks, key=lambda chunk: chunk.rank))

    def passages(self, chunk_chars: int) -> list[Located]:
        """Return the located chunks that are not whole documents."""
        return [at for at in self.located if len(at.span) <= _DOCUMENT * chunk_chars]


def find_chunks(
    index: PromptIndex,
    question: Question | None,
    store: StoreSession,
    retrieval: RetrievalConfig,
) -> FoundChunks:
    """Return the captured chunks; if there are none, or only documents, search the store.

    Without a ``question`` the store is not searched.
    """
    hints = index.hints
    captured = _find(index, hints.chunks, hints.chunk_source or "hints", retrieval)
    enough = len(captured.located) >= _MIN_SHARE * len(hints.chunks)
    frame = tuple(at.span for at in captured.located) if enough else ()
    captured = replace(captured, frame=frame)
    if captured.passages(index.chunk_chars) or question is None:
        return captured
    searched = _find(index, store.search(question.query, retrieval.k), "store", retrieval)
    if not searched.chunks:
        return captured
    return replace(searched, frame=frame, unseen=(*captured.unseen, *searched.extra))


def _find(
    index: PromptIndex, chunks: Sequence[Chunk], source: str, retrieval: RetrievalConfig
) -> FoundChunks:
    located, missing = index.locate(chunks)
    extra = tuple(missing) if retrieval.store_policy == "any" else ()
    unseen = tuple(missing) if retrieval.store_policy != "prompt" else ()
    spans = [_with_header(index.view, at.span, located) for at in located]
    located = [replace(at, span=span) for at, span in zip(located, spans, strict=True)]
    return FoundChunks(tuple(located), extra, unseen, source=source if located or extra else None)


def _with_header(view: PromptView, span: Span, located: Sequence[Located]) -> Span:
    """Extend ``span`` over the "Source: ..." lines before it, if other chunks have such too."""
    text = view.texts[span.message]
    others = (at.span for at in located if at.span.message == span.message)
    floor = max((other.end for other in others if other.end <= span.start), default=0)
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
