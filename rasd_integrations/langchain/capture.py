"""Records how a prompt was made from LangChain's callbacks: template variables and retrieved Documents.

A configure hook adds one handler per process to every run. Prompts are matched by a hash of their content,
because `stream()` gives a chat model no run id. All records are bounded, and empty while no RASD model is alive.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.prompt_values import PromptValue
from langchain_core.tracers.context import register_configure_hook

from rasd_integrations.retrieval.items import digest
from rasd_integrations.runtime.hints import Bounded, RetrievalEvent
from rasd_integrations.types import Chunk

if TYPE_CHECKING:
    from uuid import UUID

    from langchain_core.documents import Document
    from langchain_core.messages import BaseMessage

LLM_TYPES = frozenset({"rasd-chat", "rasd"})
"""The `_llm_type` of the models whose calls are looked at; other models' calls cost nothing."""

_MAX_RUNS = 16_384  # open runs; a wide `abatch` opens some for each item before the first LLM call
_MAX_LOOSE_PROMPTS = 64  # prompts formatted outside any chain, which nothing ever closes
_MAX_RECENT = 8  # runs that ended before the LLM was called: plain Python around a retriever


@dataclass(frozen=True, slots=True)
class Captured:
    """What is known of one prompt.

    Attributes:
        templates: Variables of the prompt templates: the one that made this prompt first, then the
            others of the same root run, newest first.
        chains: Inputs of the enclosing chains, nearest first.
        retrievals: Retriever calls of the same root run, newest first.
        recent: Earlier retriever calls in this context, newest first, perhaps for another question: a
            chunk of these counts only if it occurs in the prompt.
    """

    templates: tuple[Mapping[str, Any], ...] = ()
    chains: tuple[Mapping[str, Any], ...] = ()
    retrievals: tuple[RetrievalEvent, ...] = ()
    recent: tuple[RetrievalEvent, ...] = ()


@dataclass(slots=True)
class _Root:
    retrievals: list[RetrievalEvent] = field(default_factory=list)
    prompts: dict[bytes, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class _Run:
    kind: str
    parent: UUID | None
    root_id: UUID
    root: _Root
    inputs: Mapping[str, Any] | None = None
    retrieval: RetrievalEvent | None = None


def content_key(prompt: Sequence[BaseMessage] | str) -> bytes:
    """Return the hash of what a prompt says: of its text, or of its messages' types and texts."""
    if isinstance(prompt, str):
        return digest(prompt)
    return digest(*(part for m in prompt for part in (m.type, m.text)))


def document_chunk(document: Document, rank: int) -> Chunk:
    """Return a Document as a chunk."""
    return Chunk(document.page_content, id=document.id, rank=rank, metadata=document.metadata)


_recent_roots: ContextVar[tuple[_Root, ...]] = ContextVar("rasd_recent_roots", default=())


class PromptCapture(BaseCallbackHandler):
    """Records the runs that lead to a RASD model's call; does nothing if there is no such model."""

    run_inline = True

    def __init__(self) -> None:
        """Start with nothing to watch for."""
        self._owners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._runs: Bounded[UUID, _Run] = Bounded(_MAX_RUNS)
        self._calls: Bounded[bytes, UUID | None] = Bounded(_MAX_RUNS)
        self._loose: Bounded[bytes, Mapping[str, Any]] = Bounded(_MAX_LOOSE_PROMPTS)

    def watch_for(self, owner: object) -> None:
        """Capture for as long as ``owner``, which is referenced weakly, is alive."""
        self._owners.add(owner)

    def lookup(self, prompt: Sequence[BaseMessage] | str) -> Captured:
        """Return what is known of ``prompt``, now that a model was called with it."""
        key = content_key(prompt)
        recent = [r for root in reversed(_recent_roots.get()) for r in reversed(root.retrievals)]
        with self._lock:
            ancestors = self._ancestors(self._calls.get(key))
            root = ancestors[0].root if ancestors else _Root()
            made = root.prompts.get(key) or self._loose.get(key)
            others = [v for k, v in reversed(root.prompts.items()) if k != key]
        own = list(reversed(root.retrievals))
        return Captured(
            templates=(*([made] if made else ()), *others),
            chains=tuple(run.inputs for run in ancestors if run.inputs),
            retrievals=tuple(own),
            recent=tuple(r for r in recent if not any(r is mine for mine in own)),
        )

    def _ancestors(self, run_id: UUID | None) -> list[_Run]:
        found: list[_Run] = []
        while run_id is not None and (run := self._runs.get(run_id)):
            found.append(run)
            run_id = run.parent
        return found

    def _open(
        self, kind: str, run_id: UUID, parent_id: UUID | None, inputs: object = None
    ) -> _Run | None:
        if not self._owners:
            return None
        known = inputs if isinstance(inputs, Mapping) else None
        with self._lock:
            parent = self._runs.get(parent_id) if parent_id else None
            root = parent.root if parent else _Root()
            root_id = parent.root_id if parent else run_id
            run = self._runs[run_id] = _Run(kind, parent_id, root_id, root, known)
        if parent is None and kind != "prompt":
            _recent_roots.set((*_recent_roots.get()[1 - _MAX_RECENT :], root))
        return run

    def _close(self, run_id: UUID) -> _Run | None:
        with self._lock:
            return self._runs.pop(run_id, None)

    # --- prompt templates and chains ---

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        run_type: str | None = None,
        **_: Any,
    ) -> None:
        """Record the inputs; a template of one variable may be given the bare string."""
        if run_type == "prompt" and isinstance(inputs, str):
            inputs = {"input": inputs}
        self._open(run_type or "chain", run_id, parent_run_id, inputs)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **_: Any) -> None:
        """Tie a template's variables to the prompt it made."""
        run = self._close(run_id)
        if not (run and run.kind == "prompt" and run.inputs and isinstance(outputs, PromptValue)):
            return
        # A chat model is called with the messages, a plain LLM with the string.
        keys = content_key(outputs.to_messages()), content_key(outputs.to_string())
        with self._lock:
            made = self._loose if run.root_id == run_id else run.root.prompts
            for key in keys:
                made[key] = run.inputs

    # --- tools: links between a retriever inside a tool and the agent's model ---

    def on_tool_start(
        self,
        serialized: dict[str, Any],
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **_: Any,
    ) -> None:
        """Record the tool's parent run."""
        self._open("tool", run_id, parent_run_id)

    # --- retrievers ---

    def on_retriever_start(
        self,
        serialized: dict[str, Any],
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **_: Any,
    ) -> None:
        """Record the query, unless another retriever (multi-query, ensemble, ...) asks it."""
        run = self._open("retriever", run_id, parent_run_id)
        if run is None or any(a.kind == "retriever" for a in self._ancestors(parent_run_id)):
            return
        run.retrieval = RetrievalEvent(query)
        run.root.retrievals.append(run.retrieval)

    def on_retriever_end(self, documents: Sequence[Document], *, run_id: UUID, **_: Any) -> None:
        """Record the Documents."""
        run = self._close(run_id)
        if run and run.retrieval:
            chunks = (document_chunk(d, rank) for rank, d in enumerate(documents))
            run.retrieval.chunks = tuple(chunks)

    def _forget(self, _: Any, *, run_id: UUID, **__: Any) -> None:
        self._close(run_id)

    on_chain_error = on_tool_end = on_tool_error = on_retriever_error = _forget  # type: ignore[assignment]

    # --- our own models' calls ---

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Tie each prompt to the run that calls the model with it."""
        self._called(messages, parent_run_id, kwargs)

    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Tie each prompt to the run that calls the model with it."""
        self._called(prompts, parent_run_id, kwargs)

    def _called(
        self,
        prompts: Sequence[Sequence[BaseMessage] | str],
        parent_id: UUID | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        called = (kwargs.get("invocation_params") or {}).get("_type")
        if called not in LLM_TYPES or not self._owners:
            return
        for prompt in prompts:
            key = content_key(prompt)
            with self._lock:
                self._calls[key] = parent_id


CAPTURE = PromptCapture()
"""The process's one handler."""

# The default is what every thread and task sees, whatever it has or has not inherited.
_hook: ContextVar[PromptCapture | None] = ContextVar("rasd_capture", default=CAPTURE)
register_configure_hook(_hook, inheritable=True)
