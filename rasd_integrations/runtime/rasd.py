"""RASD: a local model with speculative decoding fed by retrieval, for every framework and for none.

``generate`` is the join of ``stream``; the asynchronous forms run the same path in a thread.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self, Unpack

from rasd_integrations.config import (
    CacheDir,
    ContextMode,
    ExecutorName,
    RetrievalConfig,
    SamplingParams,
    SpeculationConfig,
    WeightsName,
    check_engine,
    check_memory,
    check_model_name,
    check_passed_on,
    reject_unknown,
)
from rasd_integrations.drafters.base import Drafter, check_drafter_spec
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.process import at_work, each_at_work, locked
from rasd_integrations.prompting import Prompt, PromptPlanner
from rasd_integrations.response_format import ToolUse
from rasd_integrations.retrieval import GuardedSource, as_chunk_source
from rasd_integrations.runtime.aio import iterate_in_thread
from rasd_integrations.runtime.lazy_engine import EngineOptions, LazyEngine, name_of
from rasd_integrations.runtime.modes import mode_name, mode_of
from rasd_integrations.runtime.pipeline import Gate, Known, Pipeline, Progress, Request, joined
from rasd_integrations.runtime.telemetry import AnswerSpan
from rasd_integrations.runtime.together import has_left
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.answer.explanation import Explanation, explained
from rasd_integrations.text.prompt.counting import count_messages, count_text
from rasd_integrations.text.prompt.template import check_template_options
from rasd_integrations.types import Generation, StepRecord, TextDelta

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RASD:
    """A local causal language model with speculative decoding fed by retrieval."""

    def __init__(
        self,
        model: str | Path = "",
        *,
        drafter: str | Path | Drafter | None = "auto",
        drafter_device: str | None = None,
        store: object = None,
        executor: ExecutorName = "auto",
        weights: WeightsName = "auto",
        context: ContextMode = "prompt",
        knowledge_transfer: Any = None,
        deterministic: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        retrieval: RetrievalConfig | None = None,
        speculation: SpeculationConfig | None = None,
        prefix_cache_bytes: int | None = None,
        cache_dir: str | Path | None = None,
        prefix_disk_bytes: int | None = None,
        namespace: str = "",
        memory: bool | str | Path = True,
        mode: Any = None,
        **unknown: Any,
    ) -> None:
        """Check the options; load nothing. The first call loads, or :meth:`ensure_loaded`.

        Args:
            model: Hub id, local folder, or path of a ``.gguf`` file.
            drafter: ``"auto"``, ``None``, ``"self"`` (the target on the retrieved prompt), a model, a `Drafter`.
            drafter_device: Device of a drafter model (``"cpu"``, ``"cuda:1"``); ``None``: the target's.
            store: Anything ``as_chunk_source`` takes, or ``None``.
            executor: What runs steps: ``"eager"`` torch, ``"openvino"``, ``"openvino-kv8"``, ``"cuda-graphs"``.
            weights: ``"dense"``, ``"kept"`` (a GGUF file's own blocks), ``"int8"``, ``"int4"``; "auto" takes what fits.
            context: What the target reads: ``"prompt"`` as sent, or the ``"documents"`` of its chunks.
            knowledge_transfer: Joins the target's distribution with that of the drafter model, or its own, on the
                chunks: a rule's name or a :class:`~rasd_integrations.transfer.TransferRule`; ``None`` is lossless.
            deterministic: The same call gives the same text, whatever was cached, drafted or batched.
            model_kwargs: Passed to ``from_pretrained``.
            chat_template_kwargs: Passed to the chat template.
            retrieval: How chunks are found and how long the drafter's prompt may be.
            speculation: Draft lengths and how drafts are judged.
            prefix_cache_bytes: Most memory for keys and values kept between answers; ``None``: an eighth of what is
                free after loading.
            cache_dir: Folder for all that is kept; ``None``: the user's cache folder, for models only.
            prefix_disk_bytes: Most that warmed documents may take there, of all models together; 32 GiB by default.
            namespace: Keys and values, and what is drafted from, are shared only within a namespace.
            memory: Draft from the store's texts and earlier answers; a folder keeps them for later processes.
            mode: ``None``, "route" (chunks first, documents where they are needed), "speculative-rag" (the best of
                several answers), or a :class:`~rasd_integrations.runtime.modes.Mode`.
            **unknown: Refused, with the nearest valid name.

        Raises:
            ConfigurationError: An option, or a combination, that cannot work.
            RetrievalError: ``store`` cannot be used as a chunk source.
        """
        known = set(signature(RASD.__init__).parameters) - {"self", "unknown"}
        reject_unknown(unknown, known, "RASD")
        check_model_name(model, "RASD")
        check_memory(memory)
        check_passed_on("chat_template_kwargs", chat_template_kwargs or ())
        check_passed_on("model_kwargs", model_kwargs or ())
        check_template_options(chat_template_kwargs or {})
        own = (speculation or SpeculationConfig()).with_transfer(knowledge_transfer)
        check_engine(context, executor, weights, prefix_cache_bytes, deterministic=deterministic)
        check_drafter_spec(drafter, drafter_device)
        self.model_name = str(model)
        self._context: ContextMode = context
        self._mode = mode_of(mode, context)
        self._retrieval = retrieval or RetrievalConfig()
        self._engine = LazyEngine(
            EngineOptions(
                model=self.model_name,
                drafter=drafter,
                drafter_device=drafter_device,
                executor=executor,
                weights=weights,
                model_kwargs=dict(model_kwargs or {}),
                template_kwargs=dict(chat_template_kwargs or {}),
                speculation=own,
                deterministic=deterministic,
                prefix_cache_bytes=prefix_cache_bytes,
                kept=CacheDir.of(cache_dir, prefix_disk_bytes),
                namespace=namespace,
                memory=memory,
            )
        )
        self._source: GuardedSource | None = None
        self._planners: dict[tuple[ContextMode, bool], PromptPlanner] = {}
        self._lock = threading.RLock()
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
        """Return an instance over loaded objects; the weights are used as they are.

        The model's attention implementation becomes ``"rasd"``, which outside this engine is sdpa.
        ``drafter_model`` must share the target's tokenizer.
        """
        name = name_of(model)
        if drafter_model is not None and options.get("drafter", "auto") not in ("auto", "self"):
            msg = (
                f"drafter is {options['drafter']!r} and a drafter_model is given too. Leave drafter at "
                f"'auto' to draft with the model."
            )
            raise ConfigurationError(msg)
        rasd = cls(name, **options)
        rasd._engine.take(model, tokenizer, drafter_model)
        return rasd

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Free the weights and the prefix cache; running streams finish first."""
        self._engine.close()

    def ensure_loaded(self) -> None:
        """Load the weights now.

        Raises:
            ModelLoadError: The model is missing or broken.
            VocabularyMismatchError: The drafter model's vocabulary cannot be translated.
            DecodingError: This instance was closed.
        """
        with at_work():
            self._engine.decoder()

    @property
    def window(self) -> int:
        """Longest sequence of prompt and answer, in tokens; reads the model's config only."""
        return self._engine.window

    @property
    def max_tokens(self) -> int:
        """Longest answer of a call without ``max_tokens``; reads the model's generation config only."""
        return self._engine.max_tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, for text splitters; loads no weights."""
        return self._engine.template().tokenizer

    @property
    def has_chat_template(self) -> bool:
        """True if messages can be formatted, by the tokenizer's template or an option's; reads the tokenizer only."""
        return self._engine.template().exists

    @property
    def has_reasoning(self) -> bool:
        """True if reasoning is marked in the output; reads the tokenizer only."""
        return self._engine.template().reasoning is not None

    @property
    def identity(self) -> dict[str, Any]:
        """All that affects the output besides prompt and sampling, as plain JSON: for cache keys and traces."""
        return self._engine.identity(self._context, self._source) | {"mode": mode_name(self._mode)}

    @locked
    def _prompts(self, context: ContextMode, *, searches: bool = True) -> PromptPlanner:
        key, source = (context, searches), self._source if searches else None
        if key not in self._planners:
            self._planners[key] = PromptPlanner(
                source, self._retrieval, context, lambda t: len(self.encode(t))
            )
        return self._planners[key]

    def attach(self, store: object) -> None:
        """Search chunks in ``store``, anything ``as_chunk_source`` takes; else it is a ``RetrievalError``."""
        self._take_source(GuardedSource(as_chunk_source(store), self._retrieval.timeout_s))

    @locked
    def _take_source(self, source: GuardedSource) -> None:
        self._source, self._planners = source, {}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without special tokens."""
        return self._engine.template().encode_chunk(text)

    def count_tokens(self, prompt: Prompt, tools: ToolUse | None = None) -> int:
        """Return the number of tokens of a prompt, template and tools included.

        Parts of a conversation that could not be a prompt are counted too; nothing has 0 tokens.
        """
        template = self._engine.template()
        if isinstance(prompt, str):
            return count_text(template, prompt)
        return count_messages(template, prompt, tools.visible if tools is not None else None)

    def stream(
        self, prompt: Prompt | Request, params: SamplingParams | None = None, **known: Unpack[Known]
    ) -> Generator[TextDelta, None, None]:
        """Check and plan now, decode lazily; closing the iterator stops within one step.

        Args:
            prompt: A text, read as it is, chat messages, formatted by the model's template, or a whole request.
            params: How to draw the answer.
            **known: ``hints`` on how the prompt was made, and the ``tools`` that may be called.

        Raises:
            PromptError: The prompt is empty, has parts that are not text, or exceeds the window.
            ConfigurationError: The options contradict one another, or a grammar cannot be followed.
        """
        return self._answer(Request.of(prompt, params, **known))

    def stream_to_end(self, request: Request) -> Generator[TextDelta, None, None]:
        """Stream an answer that is read to its end at once; it waits until there is memory for it.

        Not for a stream whose consumer may pause: it would hold its memory, and others wait for that.
        """
        return self._gated(request)

    def generate(
        self, prompt: Prompt | Request, params: SamplingParams | None = None, **known: Unpack[Known]
    ) -> Generation:
        """Return the whole answer, the join of :meth:`stream`, once there is memory for it."""
        return joined(list(self._gated(Request.of(prompt, params, **known))))

    def explain(
        self, prompt: Prompt | Request, params: SamplingParams | None = None, **known: Unpack[Known]
    ) -> Explanation:
        """Answer as :meth:`generate` does; return where drafts came from, and why none came where none did."""
        self._mode.check_one_answer()
        steps: list[StepRecord] = []
        request = replace(Request.of(prompt, params, **known), on_step=steps.append)
        deltas = list(self._gated(request))
        return explained(joined(deltas).text, deltas, steps)

    def astream(
        self, prompt: Prompt | Request, params: SamplingParams | None = None, **known: Unpack[Known]
    ) -> AsyncGenerator[TextDelta, None]:
        """Stream without blocking the event loop; cancelling stops decoding within one step.

        Concurrent streams share the model's steps; streams over the limits of memory or threads wait.
        """
        request = Request.of(prompt, params, **known)
        left = threading.Event()
        return iterate_in_thread(lambda: self._gated(request, left.is_set), left)

    async def agenerate(
        self, prompt: Prompt | Request, params: SamplingParams | None = None, **known: Unpack[Known]
    ) -> Generation:
        """Return the whole answer without blocking the event loop."""
        return joined([delta async for delta in self.astream(prompt, params, **known)])

    def warm(self, documents: Sequence[Prompt], progress: Progress | None = None) -> None:
        """Prefill documents ahead of questions and keep their keys and values, also in a ``cache_dir``.

        A text becomes the prefix of the first user message, messages that of a conversation. Later prompts reuse
        the longest common prefix. ``progress`` is called with tokens done and tokens in all.

        Raises:
            ContextOverflowError: A document leaves no room in the window; none was prefilled.
            ConfigurationError: A ``cache_dir`` is named, but this model cannot be told from others there.
        """
        self._engine.check_open()
        with at_work():
            self._engine.check_can_warm()
            self._pipeline(self._context).warm(documents, progress)

    def forget(self, text: str | None = None) -> int:
        """Forget the earlier answers of this namespace, or those that hold ``text``; return how many.

        A text of the store is not drafted from again either, until it is in another store.
        """
        memory = self._engine.memory
        return 0 if memory is None else memory.forget(text)

    def clear_cache(self) -> None:
        """Drop the keys and values of earlier prompts from memory, for all who share these weights.

        Changed weights (a training step, an adapter) are noticed without it. Files stay: ``rasd cache clear``
        removes them.
        """
        self._engine.clear_caches()

    def _pipeline(self, context: ContextMode, *, searches: bool = True) -> Pipeline:
        return Pipeline(
            planner=self._prompts(context, searches=searches),
            template=self._engine.template(), decoder=self._engine.decoder(),
            speculation=self._engine.options.speculation, retrieval=self._retrieval,
            context=context, namespace=self._engine.options.namespace,
            store=self._listed_store() if searches else None,
        )  # fmt: skip

    def _listed_store(self) -> object:
        """Return the store, if all that it returns may be drafted from."""
        may = self._retrieval.store_policy != "prompt" and self._engine.options.memory
        return self._source.source if self._source is not None and may else None

    def _gated(
        self, request: Request, cancelled: Callable[[], bool] = has_left
    ) -> Generator[TextDelta, None, None]:
        """Stream an answer that runs to its end by itself, once there is memory for it."""
        from rasd_integrations.runtime.admission import shared_admission

        self.ensure_loaded()
        admit = shared_admission(self._engine.decoder().target.device).admit
        return self._answer(request, partial(admit, cancelled=cancelled))

    def _answer(
        self, request: Request, gate: Gate | None = None
    ) -> Generator[TextDelta, None, None]:
        stats = DecodingStats()
        self._engine.check_open()
        span = AnswerSpan(self.model_name, request, stats)
        with at_work(), span.begun():
            pipelines = partial(self._pipeline, searches=request.searches)
            chunks = self._mode.reading(request.context).answer(pipelines, request, stats, gate)
        return self._counted(chunks, stats, span)

    def _counted(
        self, chunks: Generator[TextDelta, None, None], stats: DecodingStats, span: AnswerSpan
    ) -> Generator[TextDelta, None, None]:
        memory = self._engine.memory
        try:
            with nullcontext() if memory is None else memory.quiet.answer():
                yield from span.over(each_at_work(chunks))
        finally:
            self._count(stats)

    @locked
    def _count(self, stats: DecodingStats) -> None:
        self.stats.add(stats)
