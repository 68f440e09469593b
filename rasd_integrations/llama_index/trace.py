"""Records what the pipeline around an LLM call did, through LlamaIndex's instrumentation.

One observer per process at the root dispatcher: spans show which calls belong together and the retriever objects,
events show what was retrieved. It holds retrievers weakly and texts in bounded lists, and does nothing while there is
no LLM of this package.
"""

from __future__ import annotations

import inspect
import logging
import re
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.indices.vector_store import VectorIndexRetriever
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictStartEvent
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.instrumentation.span import BaseSpan, active_span_id
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from pydantic import PrivateAttr

from rasd_integrations.errors import RASDError
from rasd_integrations.llama_index.packing import pack_by_model
from rasd_integrations.retrieval.items import node_to_chunk
from rasd_integrations.runtime.hints import Bounded, RetrievalEvent
from rasd_integrations.types import Chunk

logger = logging.getLogger(__name__)

_MAX_SPANS = 4096
_MAX_RECORDS = 32
_PROBES = 3  # chunks of a retrieval that are looked for in a prompt


@dataclass(slots=True)
class IndexRetrieval(RetrievalEvent):
    """One call of a LlamaIndex retriever; its chunks have the text that prompts show.

    Attributes:
        root: The outermost span around the call.
        index: The retriever's own index, if it has one.
        filter: The retriever's own metadata filter.
    """

    root: str | None = None
    index: weakref.ref[Any] | None = None
    filter: Any = None

    def share(self, text: str) -> int:
        """Return how many of the best few chunks occur in ``text``, each by its longest line.

        A line, because some templates show the context as an escaped list.
        """
        lines = (_longest_line(chunk.text) for chunk in self.chunks[:_PROBES])
        return sum(line in text for line in lines if line)


@dataclass(frozen=True, slots=True)
class StructuredCall:
    """A template that ``structured_predict`` is about to fill."""

    span: str | None
    template: BasePromptTemplate
    args: Mapping[str, Any]


def node_chunk(node: BaseNode, rank: int) -> Chunk:
    """Return a node as a chunk, with the text that LlamaIndex shows to LLMs."""
    chunk = node_to_chunk(node, rank)
    return replace(chunk, text=node.get_content(MetadataMode.LLM), stored=chunk.text)


def _longest_line(text: str) -> str:
    return max((line.strip() for line in text.splitlines()), key=len, default="")


def _plain_query(query: Any) -> str:
    text = query if isinstance(query, str) else query.query_str
    return re.sub(r"^\s*input is\s+", "", text).strip()  # what RetrieverTool makes of its argument


@dataclass(frozen=True, slots=True)
class _Span:
    parent: str | None
    of_llm: bool
    """True if it is a method of an LLM."""


class Trace:
    """The observer: the newest spans, retrievals and structured calls of this process."""

    def __init__(self) -> None:
        """Start empty; :func:`observe` installs it."""
        self._lock = threading.Lock()
        self._spans: Bounded[str, _Span] = Bounded(_MAX_SPANS)
        self._retrievers: Bounded[str, weakref.ref[Any]] = Bounded(_MAX_SPANS)
        self._retrievals: deque[IndexRetrieval] = deque(maxlen=_MAX_RECORDS)
        self._structured: deque[StructuredCall] = deque(maxlen=_MAX_RECORDS)
        self._listeners: weakref.WeakSet[Any] = weakref.WeakSet()

    def enter(self, span: str, parent: str | None, instance: Any) -> None:
        """Record a span and its retriever; make a synthesizer pack by its LLM's tokens."""
        if not self._listeners:
            return
        with self._lock:
            self._spans[span] = _Span(parent, isinstance(instance, BaseLLM))
            if isinstance(instance, VectorIndexRetriever):
                self._retrievers[span] = weakref.ref(instance)
        if isinstance(instance, BaseSynthesizer):
            pack_by_model(instance)

    def handle(self, event: BaseEvent) -> None:
        """Record what was retrieved, and the template of a structured call."""
        if not self._listeners:
            return
        if isinstance(event, RetrievalEndEvent):
            self._retrieved(event)
        elif isinstance(event, LLMStructuredPredictStartEvent):
            call = StructuredCall(event.span_id, event.template, event.template_args or {})
            with self._lock:
                self._structured.appendleft(call)

    def _retrieved(self, event: RetrievalEndEvent) -> None:
        nodes: list[NodeWithScore] = event.nodes
        chunks = tuple(node_chunk(scored.node, rank) for rank, scored in enumerate(nodes))
        with self._lock:
            reference = self._retrievers.get(event.span_id or "")
            retriever = reference() if reference is not None else None
            root = self._root(event.span_id)
            index: weakref.ref[Any] | None = None
            filter_: Any = None
            if retriever is not None:
                index, filter_ = weakref.ref(retriever._index), retriever._filters  # noqa: SLF001
            elif inner := next((r for r in self._retrievals if root and r.root == root), None):
                # One that asks other retrievers (fusion, auto-merging): theirs ended just before.
                index, filter_ = inner.index, inner.filter
            query = _plain_query(event.str_or_query_bundle)
            self._retrievals.appendleft(IndexRetrieval(query, chunks, root, index, filter_))

    def retrieval_for(self, text: str) -> IndexRetrieval | None:
        """Return the retrieval that the prompt ``text`` was made from.

        The one of the same root span with most chunks in the prompt, the newest of equals. If no root is shared
        (plain Python, streams read after their query has returned), the best of the process, without its query,
        which may be another request's.
        """
        with self._lock:
            root = self._root(active_span_id.get())
            records = list(self._retrievals)
        own = [record for record in records if root is not None and record.root == root]
        if own:
            return max(own, key=lambda record: record.share(text))
        best = max(records, key=lambda record: record.share(text), default=None)
        return replace(best, query=None) if best is not None and best.share(text) else None

    def structured_calls(self) -> list[StructuredCall]:
        """Return the structured calls around the running LLM call, newest first."""
        with self._lock:
            around = {None, *self._path(active_span_id.get())}
            return [call for call in self._structured if call.span in around]

    def in_pipeline(self) -> bool:
        """True if a component or workflow, not only an LLM, made the running LLM call."""
        with self._lock:
            around = [self._spans.get(span) for span in self._path(active_span_id.get())]
        return any(span is not None and not span.of_llm for span in around)

    def _path(self, span: str | None) -> Iterator[str]:
        for _ in range(_MAX_SPANS):
            if span is None:
                return
            yield span
            known = self._spans.get(span)
            span = known.parent if known is not None else None

    def _root(self, span: str | None) -> str | None:
        root = None
        for root in self._path(span):  # noqa: B007
            pass
        return root


class _Events(BaseEventHandler):
    _trace: Trace = PrivateAttr()

    @classmethod
    def class_name(cls) -> str:
        return "RASDEventHandler"

    def handle(self, event: BaseEvent, **_: Any) -> None:
        try:
            self._trace.handle(event)
        except Exception:
            # The dispatcher swallows what handlers raise; a fault here costs drafts, so say it.
            logger.exception("A retrieval could not be captured; drafting goes on without it.")


class _Spans(BaseSpanHandler[BaseSpan]):
    _trace: Trace = PrivateAttr()

    @classmethod
    def class_name(cls) -> str:
        return "RASDSpanHandler"

    def span_enter(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        parent_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        del bound_args, tags
        try:
            self._trace.enter(id_, parent_id, instance)
        except RASDError:
            pass  # a model that cannot be read: the call that follows raises it
        except Exception:
            # The dispatcher swallows what handlers raise; packing goes on by another tokenizer, so say it.
            logger.exception("A span could not be followed.")

    def span_exit(self, id_: str, bound_args: inspect.BoundArguments, *_: Any, **__: Any) -> None:
        # Spans stay until they are pushed out: streams are read after theirs has ended.
        del id_, bound_args

    span_drop = span_exit

    def new_span(self, *_: Any, **__: Any) -> None:
        return None

    def prepare_to_exit_span(self, *_: Any, **__: Any) -> None:
        return None

    def prepare_to_drop_span(self, *_: Any, **__: Any) -> None:
        return None


_TRACE = Trace()
_EVENTS = _Events()
_EVENTS._trace = _TRACE  # noqa: SLF001
_SPANS = _Spans()
_SPANS._trace = _TRACE  # noqa: SLF001


def observe(listener: object) -> Trace:
    """Return the process's observer, listening as long as ``listener`` lives."""
    root = get_dispatcher()
    if not any(handler is _EVENTS for handler in root.event_handlers):
        root.add_event_handler(_EVENTS)
    if not any(handler is _SPANS for handler in root.span_handlers):
        root.add_span_handler(_SPANS)
    _TRACE._listeners.add(listener)  # noqa: SLF001
    return _TRACE
