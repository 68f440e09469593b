"""RASD: a local model with retrieval-fed speculative decoding, for every framework and for none.

One path from prompt to text: plan the prompts, encode them, decode blocks, join text. ``generate`` is the
join of ``stream``, and the asynchronous forms run the same path in a thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from rasd_integrations.aio import iterate_in_thread
from rasd_integrations.config import ContextMode, RetrievalConfig, SamplingParams, SpeculationConfig
from rasd_integrations.drafters.base import Drafter
from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.decoder import SpeculativeDecoder
from rasd_integrations.engine.prefix_cache import PrefixCache
from rasd_integrations.errors import ConfigurationError, DecodingError
from rasd_integrations.loading import load_tokenizer, load_window
from rasd_integrations.models import (
    SharedModel,
    check_drafter_spec,
    check_same_vocabulary,
    shared_model,
)
from rasd_integrations.prompting import Prompt, PromptHints, PromptPlan, PromptPlanner
from rasd_integrations.retrieval import GuardedSource, as_chunk_source
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.detokenizer import IncrementalDetokenizer
from rasd_integrations.text.stream import stream_text
from rasd_integrations.text.template import ChatTemplate
from rasd_integrations.types import DraftContext, FinishReason, Generation, TextChunk

DEFAULT_PREFIX_CACHE_BYTES = 2 << 30


class RASD:
    """A local causal language model behind speculative decoding fed from a vector store.

    Example:
        >>> rasd = RASD("Qwen/Qwen3-8B", store=vectorstore)  # doctest: +SKIP
        >>> rasd.generate([{"role": "user", "content": "Hello"}]).text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path,
        *,
        drafter: str | Path | Drafter | None = "auto",
        store: object = None,
        context: ContextMode = "prompt",
        knowledge_transfer: float = 0.0,
        model_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        retrieval: RetrievalConfig | None = None,
        speculation: SpeculationConfig | None = None,
        prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES,
        namespace: str = "",
    ) -> None:
        """Check the options; load nothing. The first call loads, or :meth:`ensure_loaded`.

        Args:
            model: Hub id, local folder, or path of a ``.gguf`` file.
            drafter: ``"auto"``, ``None`` (plain decoding), ``"self"`` (the target on the retrieved
                prompt), a smaller model's hub id or path, or a :class:`Drafter`.
            store: Anything ``as_chunk_source`` takes, or ``None``.
            context: What the target reads: ``"prompt"`` as sent, or the ``"documents"`` of its chunks.
            knowledge_transfer: RAPID's eta; 0 is lossless.
            model_kwargs: Straight to ``from_pretrained``.
            chat_template_kwargs: Straight to the chat template.
            retrieval: How chunks are found and how long the drafter's prompt may be.
            speculation: Draft lengths and laws.
            prefix_cache_bytes: Most memory for keys and values kept between answers.
            namespace: Keys and values are shared only within a namespace.

        Raises:
            ConfigurationError: An option, or a combination, that cannot work.
            RetrievalError: ``store`` cannot be used as a chunk source.
        """
        check_drafter_spec(drafter)
        if context not in ("prompt", "documents"):
            msg = f"context is {context!r}, but must be 'prompt' or 'documents'."
            raise ConfigurationError(msg)
        self._speculation = speculation or SpeculationConfig()
        if knowledge_transfer:
            self._speculation = replace(self._speculation, knowledge_transfer=knowledge_transfer)
        if drafter is None and not self._speculation.lossless:
            msg = "knowledge_transfer needs a drafter that reads the chunks. Use drafter='self' or a model."
            raise ConfigurationError(msg)
        if prefix_cache_bytes < 0:
            msg = f"prefix_cache_bytes is {prefix_cache_bytes}, but must be at least 0 (0 keeps nothing)."
            raise ConfigurationError(msg)
        self.model_name = str(model)
        self._drafter_spec = drafter
        self._context: ContextMode = context
        self._model_kwargs = dict(model_kwargs or {})
        self._template_kwargs = dict(chat_template_kwargs or {})
        self._retrieval = retrieval or RetrievalConfig()
        self._prefix_cache_bytes = prefix_cache_bytes
        self._namespace = namespace
        self._source: GuardedSource | None = None
        self._lock = threading.RLock()
        self._shared: SharedModel | None = None
        self._drafter_model: SharedModel | None = None
        self._decoder: SpeculativeDecoder | None = None
        self._template: ChatTemplate | None = None
        self._window: int | None = None
        self._closed = False
        self.stats = DecodingStats()
        if store is not None:
            self.attach(store)

    @classmethod
    def load(cls, model: str | Path, **options: Any) -> Self:
        """Return an instance whose weights are loaded; ``options`` as in the constructor."""
        rasd = cls(model, **options)
        rasd.ensure_loaded()
        return rasd

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter_model: PreTrainedModel | None = None,
        **options: Any,
    ) -> Self:
        """Return an instance round loaded objects; the weights are used as they are.

        The model's attention implementation becomes ``"rasd"``, which outside this engine is sdpa.
        ``drafter_model`` must share the target's tokenizer.
        """
        name = getattr(model, "name_or_path", "") or type(model).__name__
        rasd = cls(name, **options)
        rasd._shared = SharedModel(model, tokenizer, name)
        if drafter_model is not None:
            drafter_name = (
                getattr(drafter_model, "name_or_path", "") or type(drafter_model).__name__
            )
            rasd._drafter_model = SharedModel(drafter_model, tokenizer, drafter_name)
        return rasd

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Let go of the weights and the kept keys and values; streams under way end first."""
        with self._lock:
            self._closed = True
            self._decoder = self._template = self._shared = self._drafter_model = None

    # The parts, made when first needed.

    def ensure_loaded(self) -> None:
        """Load the weights now.

        Raises:
            ModelLoadError: The model is missing or broken.
            VocabularyMismatchError: The drafter model has another vocabulary.
            DecodingError: This instance was closed.
        """
        self._ready()

    def _ready(self) -> SpeculativeDecoder:
        with self._lock:
            if self._closed:
                msg = "This model was closed. Make a new instance."
                raise DecodingError(msg)
            if self._decoder is None:
                if self._shared is None:
                    self._shared = shared_model(self.model_name, self._model_kwargs)
                self._window = self._shared.target.window
                self._decoder = SpeculativeDecoder(
                    self._shared.target,
                    self._make_drafter(self._shared),
                    config=self._speculation,
                    prefix_cache=self._shared.prefix_cache(self._prefix_cache_bytes),
                )
            return self._decoder

    def _make_drafter(self, target: SharedModel) -> Drafter | None:
        spec = self._drafter_spec
        if spec is None or not isinstance(spec, str | Path):
            return spec
        if self._drafter_model is None and spec not in ("auto", "self"):
            self._drafter_model = shared_model(spec, self._model_kwargs)
            check_same_vocabulary(target, self._drafter_model)
        if self._drafter_model is None and spec == "auto" and self._speculation.lossless:
            return SuffixDrafter()
        own = self._drafter_model or target
        model = ModelDrafter(
            own.target,
            vocab_size=target.target.vocab_size,
            needs_own_prompt=own is target,
            prefix_cache=PrefixCache(self._prefix_cache_bytes // 4),
        )
        return CascadeDrafter(model, SuffixDrafter())

    def _text(self) -> ChatTemplate:
        with self._lock:
            if self._template is None:
                tokenizer = (
                    self._shared.tokenizer
                    if self._shared is not None
                    else load_tokenizer(self.model_name, self._model_kwargs)
                )
                self._template = ChatTemplate(tokenizer, self._template_kwargs)
            return self._template

    @property
    def window(self) -> int:
        """Longest sequence of prompt and answer, in tokens; reads the model's config only."""
        if self._window is None:
            if self._shared is not None:
                self.ensure_loaded()
            else:
                self._window = load_window(self.model_name, self._model_kwargs)
        return int(self._window or 0)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's tokenizer can format messages; reads the tokenizer only."""
        return bool(self._text().tokenizer.chat_template)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the output besides prompt and sampling, as plain JSON: for cache keys and traces."""
        spec = self._drafter_spec
        lossy = not self._speculation.lossless
        out: dict[str, Any] = {
            "model": self.model_name,
            "context": self._context,
            "knowledge_transfer": self._speculation.knowledge_transfer,
            "mixture": self._speculation.mixture,
            "chat_template_kwargs": {k: repr(v) for k, v in sorted(self._template_kwargs.items())},
        }
        if lossy:
            out["drafter"] = str(spec) if isinstance(spec, str | Path) else type(spec).__name__
        if self._source is not None and (lossy or self._context == "documents"):
            out["store"] = self._source.fingerprint()
        return out

    def attach(self, store: object) -> None:
        """Take ``store``, anything ``as_chunk_source`` takes, as the source of chunks.

        Raises:
            RetrievalError: It cannot be used as one.
        """
        self._source = GuardedSource(as_chunk_source(store), self._retrieval.timeout_s)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without special tokens."""
        return self._text().encode_chunk(text)

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the tokens of a prompt as the model reads it, template included."""
        return len(self._encode(prompt))

    def _encode(self, prompt: Prompt) -> list[int]:
        template = self._text()
        return (
            template.encode_text(prompt)
            if isinstance(prompt, str)
            else template.encode_messages(prompt)
        )

    # From prompt to text.

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        hints: PromptHints | None = None,
    ) -> Iterator[TextChunk]:
        """Check and plan now, decode lazily; closing the iterator stops within one step.

        Args:
            prompt: A text, read as it stands, or chat messages, formatted by the model's template.
            params: How to draw the answer.
            hints: What the caller knows of how the prompt was made.

        Raises:
            PromptError: The prompt is empty, has parts that are not text, or exceeds the window.
            ConfigurationError: The options contradict one another.
        """
        params = params or SamplingParams()
        decoder = self._ready()
        stats = DecodingStats()
        started = time.perf_counter()
        plan = self._plan(prompt, params, hints, decoder)
        prompt_ids = self._encode(plan.target)
        context = self._draft_context(plan, prompt_ids)
        _note(plan, stats, context)
        stats.total_s += time.perf_counter() - started
        blocks = decoder.generate(
            prompt_ids, params, context=context, stats=stats, namespace=self._namespace
        )
        return self._counted(
            stream_text(
                blocks, IncrementalDetokenizer(self._text().tokenizer), params.stop, lambda: stats
            ),
            stats,
        )

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        hints: PromptHints | None = None,
    ) -> Generation:
        """Return the whole answer: the join of :meth:`stream`."""
        return _joined(list(self.stream(prompt, params, hints=hints)))

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        hints: PromptHints | None = None,
    ) -> AsyncIterator[TextChunk]:
        """Stream without blocking the event loop; cancelling stops decoding within one step."""
        return iterate_in_thread(lambda: self.stream(prompt, params, hints=hints))

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        hints: PromptHints | None = None,
    ) -> Generation:
        """Return the whole answer without blocking the event loop."""
        return _joined([chunk async for chunk in self.astream(prompt, params, hints=hints)])

    def warm(self, documents: Sequence[Prompt]) -> None:
        """Prefill documents and keep their keys and values ahead of questions.

        Each document is taken as the head of a prompt: a text as the head of the first user message,
        messages as the head of a conversation. A later prompt reuses as many tokens as it shares.
        """
        decoder = self._ready()
        for document in documents:
            for _ in decoder.prefill(self._head_ids(document), namespace=self._namespace):
                pass

    def _head_ids(self, document: Prompt) -> list[int]:
        """Return the ids that every prompt beginning with ``document`` shares."""
        if not self.has_chat_template and isinstance(document, str):
            return self._encode(document)
        messages = (
            [{"role": "user", "content": document}] if isinstance(document, str) else list(document)
        )
        last = dict(messages[-1])
        variants = [
            self._encode([*messages[:-1], {**last, "content": f"{last['content']}\n\n{tail}"}])
            for tail in ("A", "7")
        ]
        same = next(
            (i for i, pair in enumerate(zip(*variants, strict=False)) if pair[0] != pair[1]), 0
        )
        return variants[0][:same]

    def _plan(
        self,
        prompt: Prompt,
        params: SamplingParams,
        hints: PromptHints | None,
        decoder: SpeculativeDecoder,
    ) -> PromptPlan:
        if self._context == "prompt" and decoder.drafter is None:
            return PromptPlan(target=prompt)
        overhead = self.count_tokens("a") if isinstance(prompt, str) else _TEMPLATE_TOKENS
        planner = PromptPlanner(
            self._source, self._retrieval, self._context, lambda text: len(self.encode(text))
        )
        return planner.plan(
            prompt,
            hints=hints,
            room=decoder.target.window - params.max_tokens - overhead,
            wants_drafter_prompt=bool(getattr(decoder.drafter, "wants_prompt", False)),
        )

    def _draft_context(self, plan: PromptPlan, prompt_ids: list[int]) -> DraftContext:
        drafter_ids = None
        if plan.drafter is not None:
            drafter_ids = tuple(self._encode(plan.drafter))
            if len(drafter_ids) > self._retrieval.gate_share * len(prompt_ids):
                drafter_ids = None
        return DraftContext(
            prompt_ids=(),
            chunk_ids=tuple(tuple(self.encode(chunk.text)) for chunk in plan.chunks),
            drafter_prompt_ids=drafter_ids,
        )

    def _counted(self, chunks: Iterator[TextChunk], stats: DecodingStats) -> Iterator[TextChunk]:
        try:
            yield from chunks
        finally:
            with self._lock:
                self.stats.add(stats)


_TEMPLATE_TOKENS = 64  # room for what a template writes round a few messages


def _note(plan: PromptPlan, stats: DecodingStats, context: DraftContext) -> None:
    """Write what was planned into the answer's statistics."""
    stats.question_source = plan.question_source
    stats.chunk_source = plan.chunk_source
    stats.num_chunks = len(plan.chunks)
    stats.faults = plan.faults
    stats.omitted_tokens = plan.omitted_tokens
    stats.retrieve_s = plan.retrieve_s
    stats.drafter_prompt_tokens = len(context.drafter_prompt_ids or ())


def _joined(chunks: Sequence[TextChunk]) -> Generation:
    last = chunks[-1]
    reason: FinishReason = last.finish_reason or "length"
    return Generation(
        text="".join(c.text for c in chunks),
        token_ids=tuple(t for c in chunks for t in c.token_ids),
        finish_reason=reason,
        stats=last.stats or DecodingStats(),
    )
