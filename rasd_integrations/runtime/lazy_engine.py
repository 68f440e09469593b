"""Loads what one `RASD` decodes with on first use: weights, drafter and chat template."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from rasd_integrations.config import (
    CacheDir,
    ContextMode,
    ExecutorName,
    SamplingParams,
    SpeculationConfig,
    WeightsName,
)
from rasd_integrations.drafters.base import Drafter
from rasd_integrations.errors import ConfigurationError, DecodingError
from rasd_integrations.text.prompt.template import ChatTemplate
from rasd_integrations.transfer import rule_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rasd_integrations.datastores.tokens.memory import Memory
    from rasd_integrations.decoding.decoder import SpeculativeDecoder
    from rasd_integrations.retrieval import GuardedSource
    from rasd_integrations.runtime.models import SharedModel


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What to load, and how; see :class:`~rasd_integrations.runtime.rasd.RASD`."""

    model: str
    drafter: str | Path | Drafter | None
    drafter_device: str | None
    executor: ExecutorName
    weights: WeightsName
    model_kwargs: Mapping[str, Any]
    template_kwargs: Mapping[str, Any]
    speculation: SpeculationConfig
    deterministic: bool
    prefix_cache_bytes: int | None
    kept: CacheDir
    namespace: str
    memory: bool | str | Path


def name_of(model: PreTrainedModel) -> str:
    """Return the path or id that a model was loaded from, else the name of its class."""
    return getattr(model, "name_or_path", "") or type(model).__name__


class LoadedName(str):
    """The name of a model, with the loaded objects; printed, dumped or pickled it is the name alone.

    Frameworks copy models field by field, so the objects travel in the field ``model``.
    """

    __slots__ = ("drafter_model", "model", "tokenizer")
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    drafter_model: PreTrainedModel | None

    def __new__(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter_model: PreTrainedModel | None,
    ) -> Self:
        """Take the name from ``model``, or its class."""
        self = super().__new__(cls, name_of(model))
        self.model, self.tokenizer, self.drafter_model = model, tokenizer, drafter_model
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Leave the weights out of a pickle."""
        return str, (str(self),)


class LazyEngine:
    """Loads tokenizer, config and weights separately, each when it is first needed; safe across threads.

    Attributes:
        options: What to load, and how.
        memory: What is drafted from besides the prompt, if that is wanted and the model is loaded.
    """

    def __init__(self, options: EngineOptions) -> None:
        """Load nothing."""
        self.options = options
        self.memory: Memory | None = None
        self._weights: dict[str, str] = {}
        self._taken = False
        self._lock = threading.RLock()
        self._shared: SharedModel | None = None
        self._drafter_model: SharedModel | None = None
        self._decoder: SpeculativeDecoder | None = None
        self._template: ChatTemplate | None = None
        self._window: int | None = None
        self._max_tokens: int | None = None
        self._closed = False
        self._loaded_in: int | None = None  # the process

    def take(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter_model: PreTrainedModel | None,
    ) -> None:
        """Use objects that are loaded already; the drafter model shares the tokenizer.

        Raises:
            ConfigurationError: The options ask for weights of another form.
        """
        from rasd_integrations.runtime.models import wrapped_model

        if self.options.weights not in ("auto", "dense"):
            msg = (
                f"weights is {self.options.weights!r}, but a loaded model is used as it is. Leave it out, or load the "
                f"model by its name."
            )
            raise ConfigurationError(msg)
        self._loaded_in = os.getpid()
        shared = wrapped_model(model, tokenizer, self.options.model, self.options.executor)
        self._shared, self._window = shared, shared.target.window
        self._taken = True
        if drafter_model is not None:
            self._drafter_model = wrapped_model(drafter_model, tokenizer, name_of(drafter_model))

    @property
    def weights(self) -> dict[str, str]:
        """Current digests of weights that were given loaded; empty for a model loaded by name."""
        shared, drafter = self._shared, self._drafter_model
        if self._taken and shared is not None:  # else closed: what was known last
            self._weights = {"weights": shared.fingerprint}
            if drafter is not None:
                self._weights["drafter_weights"] = drafter.fingerprint
        return self._weights

    def identity(self, context: ContextMode, source: GuardedSource | None) -> dict[str, Any]:
        """Return all that affects the output besides prompt and sampling; see :attr:`RASD.identity`."""
        own, speculation, weights = self.options, self.options.speculation, self.weights
        out: dict[str, Any] = {
            "model": own.model,
            "context": context,
            "kv8": own.executor == "openvino-kv8",
            "quantised": own.weights,
            "deterministic": own.deterministic,
            "knowledge_transfer": rule_name(speculation.knowledge_transfer),
            "chat_template_kwargs": {k: repr(v) for k, v in sorted(own.template_kwargs.items())},
        }
        # Drafter and store are part of it only if they may change what is said.
        if speculation.lossless:
            out |= {name: digest for name, digest in weights.items() if name == "weights"}
        else:
            drafter = own.drafter
            named = isinstance(drafter, str | Path)
            out |= {**weights, "drafter": str(drafter) if named else type(drafter).__name__}
        if source is not None and not (speculation.lossless and context == "prompt"):
            out["store"] = source.fingerprint()
        return out

    def clear_caches(self) -> None:
        """Drop the prefix caches in memory."""
        with self._lock:
            for model in (self._shared, self._drafter_model):
                if model is not None:
                    model.clear_caches()

    def close(self) -> None:
        """Free the weights and the prefix cache; running streams finish first."""
        with self._lock:
            self._closed = True
            self._decoder = self._template = self._shared = self._drafter_model = None
            self.memory = None

    def check_open(self) -> None:
        """Raise if it was closed or loaded before a fork; takes no lock, as a fork may leave it held.

        Raises:
            DecodingError: It was, or it was loaded before this process was forked.
        """
        if self._closed:
            msg = "This model was closed. Make a new instance."
            raise DecodingError(msg)
        if self._loaded_in not in (None, os.getpid()):
            msg = (
                f"This model was loaded in process {self._loaded_in}, which forked this one ({os.getpid()}). The "
                f"threads that run its steps did not come along. Load after the fork: make the first call, or "
                f"load(), in the child. Or start processes with 'spawn' instead."
            )
            raise DecodingError(msg)

    def decoder(self) -> SpeculativeDecoder:
        """Return the decoder; the first call loads the weights.

        Raises:
            ModelLoadError: The model is missing or broken.
            VocabularyMismatchError: The drafter model's vocabulary cannot be translated.
            DecodingError: It was closed.
        """
        self.check_open()
        self._loaded_in = os.getpid()
        with self._lock:
            self.check_open()
            if self._decoder is None:
                # Here, not above: torch and transformers are imported when a model is.
                from rasd_integrations.loading import check_device
                from rasd_integrations.runtime.drafters import named_drafter_model
                from rasd_integrations.runtime.models import shared_model

                own = self.options
                check_device(own.drafter_device)
                if self._shared is None:
                    self._shared = shared_model(
                        own.model, own.model_kwargs, None, own.executor, own.kept.path, own.weights
                    )
                self._window = self._shared.target.window
                self._drafter_model = self._drafter_model or named_drafter_model(
                    own.drafter,
                    own.model_kwargs,
                    own.drafter_device,
                    own.executor,
                    own.kept.path,
                    own.weights,
                )
                kept_in = None if isinstance(own.memory, bool) else own.memory
                memories = self._shared.memories
                self.memory = memories.of(own.namespace, kept_in) if own.memory else None
                make = partial(self._new_decoder, self._shared)
                # What "auto" learns outlives this object; other drafters hold models of their own.
                learns = own.drafter == "auto" and self._drafter_model is None
                key = (
                    own.speculation, own.prefix_cache_bytes, own.kept, own.deterministic, own.namespace, self.memory,
                )  # fmt: skip
                self._decoder = self._shared.decoder(key, make) if learns else make()
            return self._decoder

    def _new_decoder(self, shared: SharedModel) -> SpeculativeDecoder:
        from rasd_integrations.decoding.decoder import SpeculativeDecoder
        from rasd_integrations.decoding.steps import FixedSteps, Steps
        from rasd_integrations.runtime.drafters import make_drafter, make_teacher

        own = self.options
        cache_bytes = shared.cache_bytes(own.prefix_cache_bytes)
        cache = shared.prefix_cache(cache_bytes, own.kept, deterministic=own.deterministic)
        lossless = own.speculation.lossless
        drafter_cache = (self._drafter_model or shared).new_cache(
            cache_bytes // 4,
            own.kept,
            deterministic=own.deterministic and not lossless,  # a teacher's steps; else a drafter's
        )
        steps = (FixedSteps if own.deterministic else Steps)(shared.target)
        return SpeculativeDecoder(
            shared.target,
            make_drafter(
                own.drafter,
                shared,
                self._drafter_model,
                lossless=lossless,
                cache=drafter_cache,
                namespace=own.namespace,
                memory=self.memory,
            ),
            config=own.speculation,
            prefix_cache=cache,
            steps=steps,
            teacher=make_teacher(
                shared, self._drafter_model, steps, cache, drafter_cache,
                lossless=lossless, namespace=own.namespace,
            ),
        )  # fmt: skip

    def check_can_warm(self) -> None:
        """Raise ``ConfigurationError`` if what is warmed must be kept on disk and cannot be."""
        self.decoder()
        if (shared := self._shared) is not None:
            shared.check_can_keep(self.options.kept)

    def template(self) -> ChatTemplate:
        """Return the chat template; loads the tokenizer only.

        Raises:
            DecodingError: It was closed.
        """
        self.check_open()
        with self._lock:
            self.check_open()
            if self._template is None:
                from rasd_integrations.loading import load_tokenizer

                own = self.options
                tokenizer = (
                    self._shared.tokenizer
                    if self._shared is not None
                    else load_tokenizer(own.model, own.model_kwargs, own.kept.path)
                )
                self._template = ChatTemplate(tokenizer, own.template_kwargs)
            return self._template

    @property
    def window(self) -> int:
        """Longest sequence of prompt and answer, in tokens; reads the model's config only."""
        self.check_open()
        if self._window is None:
            from rasd_integrations.loading import load_window

            own = self.options
            self._window = load_window(own.model, own.model_kwargs, own.kept.path)
        return self._window

    @property
    def max_tokens(self) -> int:
        """Longest answer of a call without ``max_tokens``: the checkpoint's, else 512; reads one config file."""
        self.check_open()
        if self._max_tokens is None:
            from rasd_integrations.engine.generation_config import checkpoint_sampling, sampling_of
            from rasd_integrations.loading import load_generation_config

            own = self.options
            asked = (
                checkpoint_sampling(self._shared.target.model)
                if self._shared is not None
                else sampling_of(load_generation_config(own.model, own.model_kwargs, own.kept.path))
            )
            self._max_tokens = SamplingParams().settled(asked).max_tokens
        return self._max_tokens
