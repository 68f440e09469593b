"""RASD: a local model with retrieval-fed speculative decoding, for every framework and for none.

One path from prompt to text: plan the prompts, encode them, decode blocks, join text. ``generate`` is the
join of ``stream``, and the asynchronous forms run the same path in a thread.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from rasd_integrations.config import (
    DEFAULT_PREFIX_CACHE_BYTES,
    DEFAULT_PREFIX_CACHE_DIR_BYTES,
    ContextMode,
    ExecutorName,
    PrefixFolder,
    RetrievalConfig,
    SamplingParams,
    SpeculationConfig,
    check_engine,
    reject_unknown,
)
from rasd_integrations.drafters.base import Drafter, check_drafter_spec
from rasd_integrations.errors import ConfigurationError, DecodingError
from rasd_integrations.prompting import Prompt, PromptHints, PromptPlanner
from rasd_integrations.response_format import ToolUse
from rasd_integrations.retrieval import GuardedSource, as_chunk_source
from rasd_integrations.runtime.aio import iterate_in_thread
from rasd_integrations.runtime.assembly import encode, identity, joined
from rasd_integrations.runtime.pipeline import Gate, Pipeline, Progress, Request
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.prompt.template import ChatTemplate
from rasd_integrations.types import Generation, TextChunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rasd_integrations.decoding.decoder import SpeculativeDecoder
    from rasd_integrations.runtime.models import SharedModel


class RASD:
    """A local causal language model behind speculative decoding fed from a vector store."""

    def __init__(
        self,
        model: str | Path,
        *,
        drafter: str | Path | Drafter | None = "auto",
        drafter_device: str | None = None,
        store: object = None,
        executor: ExecutorName = "auto",
        context: ContextMode = "prompt",
        knowledge_transfer: float = 0.0,
        model_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        retrieval: RetrievalConfig | None = None,
        speculation: SpeculationConfig | None = None,
        prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES,
        prefix_cache_dir: str | Path | None = None,
        prefix_cache_dir_bytes: int = DEFAULT_PREFIX_CACHE_DIR_BYTES,
        namespace: str = "",
        **unknown: Any,
    ) -> None:
        """Check the options; load nothing. The first call loads, or :meth:`ensure_loaded`.

        Args:
            model: Hub id, local folder, or path of a ``.gguf`` file.
            drafter: ``"auto"``, ``None`` (plain decoding), ``"self"`` (the target on the retrieved
                prompt), a smaller model's hub id or path, or a :class:`Drafter`.
            drafter_device: Where a drafter model stands (``"cpu"``, ``"cuda:1"``); ``None``: as the target.
            store: Anything ``as_chunk_source`` takes, or ``None``.
            executor: What runs steps: ``"eager"`` torch, ``"openvino"``, ``"openvino-kv8"``, ``"cuda-graphs"``.
            context: What the target reads: ``"prompt"`` as sent, or the ``"documents"`` of its chunks.
            knowledge_transfer: RAPID's eta; 0 is lossless.
            model_kwargs: Straight to ``from_pretrained``.
            chat_template_kwargs: Straight to the chat template.
            retrieval: How chunks are found and how long the drafter's prompt may be.
            speculation: Draft lengths and laws.
            prefix_cache_bytes: Most memory for keys and values kept between answers.
            prefix_cache_dir: Folder for those of warmed documents, found again by later processes.
            prefix_cache_dir_bytes: Most that the folder may hold, of all models together.
            namespace: Keys and values are shared only within a namespace.
            **unknown: Refused, with the nearest valid name.

        Raises:
            ConfigurationError: An option, or a combination, that cannot work.
            RetrievalError: ``store`` cannot be used as a chunk source.
        """
        reject_unknown(unknown, signature(RASD.__init__).parameters, "RASD")
        check_engine(context, executor, prefix_cache_bytes)
        self._speculation = speculation or SpeculationConfig()
        if knowledge_transfer:
            self._speculation = replace(self._speculation, knowledge_transfer=knowledge_transfer)
        check_drafter_spec(drafter, drafter_device, lossless=self._speculation.lossless)
        self.model_name = str(model)
        self._drafter_spec, self._drafter_device = drafter, drafter_device
        self._context: ContextMode = context
        self._executor: ExecutorName = executor
        self._model_kwargs = dict(model_kwargs or {})
        self._template_kwargs = dict(chat_template_kwargs or {})
        self._retrieval = retrieval or RetrievalConfig()
        self._prefix_cache_bytes = prefix_cache_bytes
        self._folder = PrefixFolder.of(prefix_cache_dir, prefix_cache_dir_bytes)
        self._namespace = namespace
        self._source: GuardedSource | None = None
        self._lock = threading.RLock()
        self._shared: SharedModel | None = None
        self._drafter_model: SharedModel | None = None
        self._decoder: SpeculativeDecoder | None = None
        self._template: ChatTemplate | None = None
        self._planner: PromptPlanner | None = None
        self._window: int | None = None
        self._weights: dict[str, str] = {}
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
        from rasd_integrations.runtime.models import name_of, wrapped_model

        name = name_of(model)
        if drafter_model is not None and options.get("drafter", "auto") not in ("auto", "self"):
            msg = (
                f"drafter is {options['drafter']!r} and a drafter_model is given too. Leave drafter at "
                f"'auto' to draft with the model."
            )
            raise ConfigurationError(msg)
        rasd = cls(name, **options)
        rasd._shared = wrapped_model(model, tokenizer, name, rasd._executor)
        rasd._window = rasd._shared.target.window
        rasd._weights = {"weights": rasd._shared.fingerprint}
        if drafter_model is not None:
            rasd._drafter_model = wrapped_model(drafter_model, tokenizer, name_of(drafter_model))
            rasd._weights["drafter_weights"] = rasd._drafter_model.fingerprint
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

    def ensure_loaded(self) -> None:
        """Load the weights now.

        Raises:
            ModelLoadError: The model is missing or broken.
            VocabularyMismatchError: The drafter model's vocabulary cannot be translated.
            DecodingError: This instance was closed.
        """
        self._ready()

    def _ready(self) -> SpeculativeDecoder:
        with self._lock:
            self._check_open()
            if self._decoder is None:
                # Here, not above: torch and transformers are imported when a model is.
                from rasd_integrations.decoding.decoder import SpeculativeDecoder
                from rasd_integrations.loading import check_device
                from rasd_integrations.runtime.models import (
                    make_drafter,
                    named_drafter_model,
                    shared_model,
                )

                check_device(self._drafter_device)
                if self._shared is None:
                    self._shared = shared_model(
                        self.model_name, self._model_kwargs, executor=self._executor
                    )
                self._window = self._shared.target.window
                self._drafter_model = self._drafter_model or named_drafter_model(
                    self._drafter_spec, self._model_kwargs, self._drafter_device, self._executor
                )
                self._decoder = SpeculativeDecoder(
                    self._shared.target,
                    make_drafter(
                        self._drafter_spec,
                        self._shared,
                        self._drafter_model,
                        lossless=self._speculation.lossless,
                        cache_bytes=self._prefix_cache_bytes // 4,
                        folder=self._folder,
                        namespace=self._namespace,
                    ),
                    config=self._speculation,
                    prefix_cache=self._shared.prefix_cache(self._prefix_cache_bytes, self._folder),
                )
            return self._decoder

    def _check_open(self) -> None:
        if self._closed:
            msg = "This model was closed. Make a new instance."
            raise DecodingError(msg)

    def _text(self) -> ChatTemplate:
        with self._lock:
            self._check_open()
            if self._template is None:
                from rasd_integrations.loading import load_tokenizer

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
        self._check_open()
        if self._window is None:
            from rasd_integrations.loading import load_window

            self._window = load_window(self.model_name, self._model_kwargs)
        return self._window

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's tokenizer can format messages; reads the tokenizer only."""
        return bool(self._text().tokenizer.chat_template)

    @property
    def has_reasoning(self) -> bool:
        """Whether the model marks its thoughts, so that they can be told from its answer; reads the tokenizer only."""
        return self._text().reasoning is not None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the output besides prompt and sampling, as plain JSON: for cache keys and traces."""
        return identity(
            {"model": self.model_name, "context": self._context, "kv8": self._executor == "openvino-kv8"},
            self._speculation, self._template_kwargs, self._weights,
            drafter=self._drafter_spec, source=self._source,
        )  # fmt: skip

    def _prompts(self) -> PromptPlanner:
        with self._lock:
            if self._planner is None:
                self._planner = PromptPlanner(
                    self._source, self._retrieval, self._context, lambda t: len(self.encode(t))
                )
            return self._planner

    def attach(self, store: object) -> None:
        """Take ``store``, anything ``as_chunk_source`` takes, as the source of chunks.

        Raises:
            RetrievalError: It cannot be used as one.
        """
        source = GuardedSource(as_chunk_source(store), self._retrieval.timeout_s)
        with self._lock:
            self._source, self._planner = source, None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without special tokens."""
        return self._text().encode_chunk(text)

    def count_tokens(self, prompt: Prompt, tools: ToolUse | None = None) -> int:
        """Return the tokens of a prompt as the model reads it, template and tools included."""
        return len(encode(self._text(), prompt, tools))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        hints: PromptHints | None = None,
        tools: ToolUse | None = None,
    ) -> Generator[TextChunk, None, None]:
        """Check and plan now, decode lazily; closing the iterator stops within one step.

        Args:
            prompt: A text, read as it stands, or chat messages, formatted by the model's template.
            params: How to draw the answer.
            hints: What the caller knows of how the prompt was made.
            tools: What the answer may or must call.

        Raises:
            PromptError: The prompt is empty, has parts that are not text, or exceeds the window.
            ConfigurationError: The options contradict one another, or a grammar cannot be followed.
        """
        return self._answer(Request(prompt, params or SamplingParams(), hints, tools))

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        hints: PromptHints | None = None,
        tools: ToolUse | None = None,
    ) -> Generation:
        """Return the whole answer, the join of :meth:`stream`, once there is memory for it."""
        return joined(list(self._gated(Request(prompt, params or SamplingParams(), hints, tools))))

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        hints: PromptHints | None = None,
        tools: ToolUse | None = None,
    ) -> AsyncGenerator[TextChunk, None]:
        """Stream without blocking the event loop; cancelling stops decoding within one step.

        Many streams at once take turns; those that memory or threads cannot hold wait in line.
        """
        request = Request(prompt, params or SamplingParams(), hints, tools)
        left = threading.Event()
        return iterate_in_thread(lambda: self._gated(request, left), left)

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        hints: PromptHints | None = None,
        tools: ToolUse | None = None,
    ) -> Generation:
        """Return the whole answer without blocking the event loop."""
        stream = self.astream(prompt, params, hints=hints, tools=tools)
        return joined([chunk async for chunk in stream])

    def warm(self, documents: Sequence[Prompt], progress: Progress | None = None) -> None:
        """Prefill documents and keep their keys and values ahead of questions, and in the folder if there is one.

        Each document is taken as the head of a prompt: a text as the head of the first user message,
        messages as the head of a conversation. A later prompt reuses as many tokens as it shares.
        What is known is not prefilled again. ``progress`` is called with tokens done and tokens in all.

        Raises:
            ContextOverflowError: A document leaves no room in the window; none was prefilled.
        """
        self._pipeline().warm(documents, progress)

    def _pipeline(self) -> Pipeline:
        return Pipeline(
            planner=self._prompts(), template=self._text(), decoder=self._ready(),
            speculation=self._speculation, retrieval=self._retrieval,
            context=self._context, namespace=self._namespace,
        )  # fmt: skip

    def _gated(
        self, request: Request, cancelled: threading.Event | None = None
    ) -> Generator[TextChunk, None, None]:
        """Stream an answer that runs to its end by itself, once there is memory for it."""
        from rasd_integrations.runtime.admission import shared_admission

        admit = shared_admission(self._ready().target.device).admit
        return self._answer(request, partial(admit, cancelled=cancelled))

    def _answer(
        self, request: Request, gate: Gate | None = None
    ) -> Generator[TextChunk, None, None]:
        stats = DecodingStats()
        return self._counted(self._pipeline().answer(request, stats, gate), stats)

    def _counted(
        self, chunks: Iterator[TextChunk], stats: DecodingStats
    ) -> Generator[TextChunk, None, None]:
        try:
            yield from chunks
        finally:
            with self._lock:
                self.stats.add(stats)
