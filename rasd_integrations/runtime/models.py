"""Loads each model once per process, however many wrappers use it."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rasd_integrations.config import CacheDir, ExecutorName, WeightsName
from rasd_integrations.datastores.tokens.memory import Memories
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.decoding.steps import roundings
from rasd_integrations.drafters.papers.vocabulary import Vocabulary
from rasd_integrations.engine.executors.base import Executor
from rasd_integrations.engine.executors.factory import has_openvino, make_executor
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.kv.prefix_files import PrefixFiles
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError, DecodingError, DeviceMemoryError
from rasd_integrations.loading import load_model
from rasd_integrations.loading.gguf import LOADING
from rasd_integrations.loading.identity import ModelIdentity, model_identity, weights_state
from rasd_integrations.loading.model import PLACEMENT, gguf_file, least_bytes
from rasd_integrations.loading.options import load_options
from rasd_integrations.loading.rounding import WeightsAs
from rasd_integrations.process import has_lost_team, in_own_thread
from rasd_integrations.runtime.admission import memory_available, shared_admission
from rasd_integrations.storage.cache_folder import cache_folder, title_of

logger = logging.getLogger(__name__)

_NOWHERE = CacheDir()

_MOST_DECODERS = 64  # of a model, the last used
_CACHE_SHARE = 1 / 8  # of the free memory; running answers may take half of it (admission.py)
# Peak of a load with dense bfloat16 weights, in sizes of a file of 4 to 5 bits a weight (docs/explanation/results.md).
_DENSE_PEAK = 8
_GB = 1e9


class SharedModel:
    """One model's weights, its tokenizer and its prefix caches.

    Attributes:
        target: The weights, ready for steps.
        tokenizer: The model's own.
        name: What the model was loaded from.
        memories: What its answers are drafted from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        executor: Executor | None = None,
        *,
        owned: bool = False,
        identity: ModelIdentity | None = None,
    ) -> None:
        """Wrap loaded objects; steps are eager without an ``executor``.

        ``owned``: no other code holds the model, so its weights never change. ``identity``: of the weights, if they
        cannot be read any more.

        Raises:
            ConfigurationError: The architecture cannot run speculative steps.
        """
        self.target = TargetModel(model, executor=executor)
        self.tokenizer = tokenizer
        self.memories = Memories(tokenizer, name)
        self.name = name
        self._owned = owned
        # Eager steps use the model's own parameters; compiled and recorded steps have copies.
        self._follows = self.target.shares_weights
        self._built_from = None if owned else self._state_of_build()
        self._identity: tuple[Hashable, ModelIdentity] | None = (
            None if identity is None else (None, identity)
        )
        self._shared_caches: dict[tuple[int, CacheDir, bool], PrefixCache] = {}
        self._caches: weakref.WeakSet[PrefixCache] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._decoders: OrderedDict[Hashable, SpeculativeDecoder] = OrderedDict()

    @property
    def identity(self) -> ModelIdentity:
        """Digests of the current weights; read on first use."""
        state = self._weights_state()
        with self._lock:
            if self._identity is None or self._identity[0] != state:
                self._identity = state, model_identity(self.target.model)
            return self._identity[1]

    @property
    def fingerprint(self) -> str:
        """The digest of the weights, of whatever device and version."""
        return self.identity.weights

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens' bytes.

        Raises:
            VocabularyMismatchError: The tokenizer cannot be read.
        """
        return Vocabulary(self.tokenizer, self.name, self.target.vocab_size)

    def _weights_state(self) -> Hashable:
        """Return a value that changes with the weights, if other code holds the model.

        Raises:
            DecodingError: They changed, but the steps run the old ones.
        """
        if self._owned:
            return None
        if self.is_stale:
            how = (
                "put in others' place" if self._follows else "changed after its steps were compiled"
            )
            msg = f"Weights of {self.name!r} were {how}. Make a new instance with from_model."
            raise DecodingError(msg)
        return weights_state(self.target.model)

    @property
    def is_stale(self) -> bool:
        """True if its steps run weights that the model has no longer."""
        return not self._owned and self._built_from != self._state_of_build()

    def _state_of_build(self) -> Hashable:
        """Return a value that must not change; the ids of parameters that the steps hold are never reused."""
        model = self.target.model
        return tuple(map(id, model.parameters())) if self._follows else weights_state(model)

    def decoder(self, key: Hashable, make: Callable[[], SpeculativeDecoder]) -> SpeculativeDecoder:
        """Return the decoder of the options ``key``, made once: it keeps what its drafter and schedule have learned."""
        with self._lock:
            if key not in self._decoders:
                self._decoders[key] = make()
            self._decoders.move_to_end(key)
            while len(self._decoders) > _MOST_DECODERS:
                self._decoders.popitem(last=False)
            return self._decoders[key]

    def cache_bytes(self, wanted: int | None) -> int:
        """Return the limit of a prefix cache; by default a share of the memory that is free when first asked."""
        return self._cache_share if wanted is None else wanted

    @cached_property
    def _cache_share(self) -> int:
        return int(_CACHE_SHARE * memory_available(self.target.device))

    def prefix_cache(
        self, max_bytes: int, kept: CacheDir = _NOWHERE, *, deterministic: bool = False
    ) -> PrefixCache:
        """Return the shared cache of this size, folder and kind of steps."""
        key = max_bytes, kept, deterministic
        with self._lock:
            known = self._shared_caches.get(key)
            if known is None:
                known = self.new_cache(max_bytes, kept, deterministic=deterministic)
                self._shared_caches[key] = known
            return known

    def new_cache(
        self, max_bytes: int, kept: CacheDir = _NOWHERE, *, deterministic: bool = False
    ) -> PrefixCache:
        """Return a new cache, for a drafter."""
        files = self._prefix_files(kept, deterministic=deterministic)
        cache = PrefixCache(max_bytes, files, self._weights_state)
        self._caches.add(cache)
        return cache

    def clear_caches(self) -> None:
        """Drop all prefix caches in memory and read the weights' digest again; files stay."""
        with self._lock:
            for cache in list(self._caches):
                cache.clear()
            if not self._owned:
                self._identity = None

    def check_can_keep(self, kept: CacheDir) -> None:
        """Raise ``ConfigurationError`` if prefixes are kept on disk, but this model's cannot be."""
        if kept.path is not None:
            self.target.check_stateless(f"cache_dir={str(kept.path)!r}")
        if kept.path is not None and self.identity.kv is None:
            msg = (
                f"cache_dir is {str(kept.path)!r}, but the weights of {self.name!r} are offloaded, sharded or of a "
                f"type that cannot be read, so warmed documents could not be told from another model's there. Load "
                f"it whole on one device, or leave cache_dir out."
            )
            raise ConfigurationError(msg)

    def _prefix_files(self, kept: CacheDir, *, deterministic: bool) -> PrefixFiles | None:
        """Return this model's files in a named folder; ``deterministic`` steps have separate files."""
        if kept.path is None or self.target.keeps_states:
            return None
        layout = self.target.layout
        kind = "-kv8" if layout.in_8_bits else ""
        if deterministic:
            layout = replace(layout, order=layout.order.fixed)
            kind += f"-{roundings(self.target)}"
        return PrefixFiles(
            cache_folder("prefixes", kept.path),
            lambda: self.identity.kv and f"{self.identity.kv}{kind}",
            layout,
            kept.prefix_bytes,
            self.target.device,
            model=title_of(self.name),
        )


_loaded: weakref.WeakValueDictionary[tuple[str, ...], SharedModel] = weakref.WeakValueDictionary()
_wrapped: weakref.WeakValueDictionary[tuple[int, str], SharedModel] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def _after_fork() -> None:
    """Reset after a fork: loaded models cannot run here, and locks may have been held."""
    _loaded.clear()
    _wrapped.clear()
    shared_admission.cache_clear()
    for lock in (_loading, LOADING):
        lock._at_fork_reinit()  # type: ignore[union-attr]  # noqa: SLF001  (what the standard library does with its own)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _check_can_run() -> None:
    """Raise unless steps can run in this process.

    Raises:
        ConfigurationError: It was forked by a thread that had run a model.
    """
    if has_lost_team() and torch.get_num_threads() > 1:
        msg = (
            "This process was forked by a thread that had run a model, and torch's helper threads of it did not come "
            "along. Fork before the first answer, start processes with 'spawn', or call torch.set_num_threads(1) here."
        )
        raise ConfigurationError(msg)


def shared_model(
    name: str | Path,
    model_kwargs: Mapping[str, Any],
    device: str | None = None,
    executor: ExecutorName = "auto",
    cache_dir: Path | None = None,
    weights: WeightsName = "auto",
) -> SharedModel:
    """Load a model, onto ``device`` if given, or return the loaded one, wherever its files are kept.

    Raises:
        ModelLoadError: The model is missing or broken.
        ConfigurationError: Its architecture cannot run speculative steps, there is no such device, or
            ``model_kwargs`` cannot be honoured.
    """
    model_kwargs = load_options(model_kwargs)
    _check_can_run()
    options = repr(sorted(model_kwargs.items(), key=lambda item: item[0]))
    key = (str(name), options, device or "", executor, weights)
    with _loading:  # two first calls at once must not load twice
        known = _loaded.get(key)
        if known is None:
            # In a thread that ends: OpenMP keeps a team for each that lives, and once the teams outnumber the
            # cores, every step of the others takes twice as long (docs/explanation/experiments.md).
            load = partial(_load, name, model_kwargs, device, executor, cache_dir, weights)
            known = _loaded[key] = in_own_thread(load)
        return known


def _load(
    name: str | Path,
    model_kwargs: Mapping[str, Any],
    device: str | None,
    executor: ExecutorName,
    cache_dir: Path | None,
    weights: WeightsName,
) -> SharedModel:
    how = _fitting_weights(name, model_kwargs, device, executor) if weights == "auto" else weights
    _check_room(name, how, device)
    loaded = load_model(name, model_kwargs, device, cache_dir, how)
    # On a CPU now: packed and compiled weights cannot be read any more.
    identity = model_identity(loaded.model) if loaded.model.device.type == "cpu" else None
    run = make_executor(
        executor,
        loaded.model,
        owned=True,
        cache_dir=cache_dir,
        identity=None if identity is None else identity.kv,
    )
    return SharedModel(
        loaded.model, loaded.tokenizer, loaded.name, run, owned=True, identity=identity
    )


def _fitting_weights(
    name: str | Path, model_kwargs: Mapping[str, Any], device: str | None, executor: ExecutorName
) -> WeightsAs:
    """Return how to load ``name``: dense, but a GGUF file that would not fit so keeps its blocks.

    Dense weights are no slower on a processor with bfloat16 products, and much quicker to verify drafts with. Eager
    steps and other devices have dense weights always.
    """
    compiles = executor in ("auto", "openvino", "openvino-kv8") and has_openvino()
    if not compiles or device not in (None, "cpu") or torch.cuda.is_available():
        return "dense"
    file = None if PLACEMENT & model_kwargs.keys() else gguf_file(name)
    if file is None:
        return "dense"
    need, free = _DENSE_PEAK * file.stat().st_size, memory_available(torch.device("cpu"))
    if need <= free:
        return "dense"
    logger.warning(
        "%s stays in its blocks: dense weights need about %.1f GB to load and %.1f are free. With more memory, "
        "weights='dense' verifies drafts in less time.",
        file.name, need / _GB, free / _GB,
    )  # fmt: skip
    return "kept"


def _check_room(name: str | Path, how: WeightsAs, device: str | None) -> None:
    """Raise if not even the weights fit into a CPU's memory; of a hub id nothing is known before it is fetched.

    Raises:
        DeviceMemoryError: Names the need, what is free, and a form that fits.
    """
    if device not in (None, "cpu") or (device is None and torch.cuda.is_available()):
        return
    needs = least_bytes(name)
    need, free = needs.get(how, 0), memory_available(torch.device("cpu"))
    if need > free:
        fit = [form for form in ("int8", "kept", "int4") if needs.get(form, free + 1) <= free]
        advice = (
            f"weights={fit[0]!r} needs {needs[fit[0]] / _GB:.1f}" if fit else "use a smaller model"
        )
        msg = (
            f"The weights of {str(name)!r} need at least {need / _GB:.1f} GB of memory and {free / _GB:.1f} are free: "
            f"{advice}."
        )
        raise DeviceMemoryError(msg)


def wrapped_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    executor: ExecutorName = "auto",
) -> SharedModel:
    """Wrap a loaded model; the same object returns the same `SharedModel` and prefix cache.

    Raises:
        ConfigurationError: Its architecture cannot run speculative steps, or not by this executor.
    """
    _check_can_run()
    key = id(model), executor
    with _loading:
        known = _wrapped.get(key)
        fits = known is not None and known.target.model is model and known.tokenizer is tokenizer
        if known is None or not fits or known.is_stale:
            run = make_executor(executor, model)
            known = _wrapped[key] = SharedModel(model, tokenizer, name, run)
        return known
