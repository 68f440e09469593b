"""Loaded models. Weights stand once in a process, however many wrappers use them."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rasd_integrations.config import ExecutorName, PrefixFolder
from rasd_integrations.drafters.vocabulary import Vocabulary
from rasd_integrations.engine.executors.eager import Executor
from rasd_integrations.engine.executors.factory import make_executor
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.kv.prefix_files import PrefixFiles
from rasd_integrations.engine.kv.prefix_format import RowLayout
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.loading import load_model
from rasd_integrations.loading.gguf import cache_folder
from rasd_integrations.loading.identity import model_identity
from rasd_integrations.runtime.own_thread import in_own_thread


class SharedModel:
    """One model's weights, its tokenizer, and the keys and values kept between its answers.

    Attributes:
        target: The weights, ready for steps.
        tokenizer: The model's own.
        name: What the model was loaded from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        executor: Executor | None = None,
    ) -> None:
        """Wrap loaded objects, run eagerly where no executor is given.

        Raises:
            ConfigurationError: The architecture cannot run speculative steps.
        """
        self.target = TargetModel(model, executor=executor)
        self.tokenizer = tokenizer
        self.name = name
        self._caches: dict[tuple[int, PrefixFolder | None], PrefixCache] = {}
        self._lock = threading.Lock()

    @cached_property
    def fingerprint(self) -> str:
        """A cheap identity of the weights: names, shapes and the first values of each, read once."""
        digest = hashlib.blake2b(digest_size=8)
        for name, weight in self.target.model.named_parameters():
            # Of a shard, what this process has; offloaded weights are not here.
            here = getattr(weight, "to_local", weight.detach)()
            head = b"" if here.is_meta else here.flatten()[:16].float().cpu().numpy().tobytes()
            digest.update(f"{name}{tuple(weight.shape)}".encode() + head)
        return digest.hexdigest()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What its tokens stand for.

        Raises:
            VocabularyMismatchError: The tokenizer cannot be read.
        """
        return Vocabulary(self.tokenizer, self.name, self.target.vocab_size)

    @cached_property
    def kv_identity(self) -> str | None:
        """What decides keys and values, or ``None`` where that cannot be told; see :func:`model_identity`."""
        return model_identity(self.target.model)

    def prefix_cache(self, max_bytes: int, folder: PrefixFolder | None = None) -> PrefixCache:
        """Return the cache of this size and folder, the same for all that ask for it.

        Raises:
            ConfigurationError: A folder is asked for, but this model cannot be told from others.
        """
        with self._lock:
            known = self._caches.get((max_bytes, folder))
            if known is None:
                known = PrefixCache(max_bytes, self.prefix_files(folder))
                self._caches[max_bytes, folder] = known
            return known

    def prefix_files(self, folder: PrefixFolder | None) -> PrefixFiles | None:
        """Return this model's files in ``folder``.

        Raises:
            ConfigurationError: This model cannot be told from others.
        """
        if folder is None:
            return None
        if self.kv_identity is None:
            msg = (
                f"prefix_cache_dir is {str(folder.path)!r}, but the weights of {self.name!r} are offloaded, "
                f"sharded or of a type that cannot be read, so files could not be told from another model's. "
                f"Load it whole on one device, or leave the option out."
            )
            raise ConfigurationError(msg)
        identity = f"{self.kv_identity}-kv8" if self.target.in_8_bits else self.kv_identity
        return PrefixFiles(
            folder.path,
            lambda: identity,
            RowLayout(self.target.layer_rows(), self.target.hidden_size),
            folder.max_bytes,
            self.target.device,
            by_rows=self.target.by_rows,
            model=self.name,
        )


_loaded: weakref.WeakValueDictionary[tuple[str, ...], SharedModel] = weakref.WeakValueDictionary()
_wrapped: weakref.WeakValueDictionary[tuple[int, str], SharedModel] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def shared_model(
    name: str | Path,
    model_kwargs: Mapping[str, Any],
    device: str | None = None,
    executor: ExecutorName = "auto",
) -> SharedModel:
    """Load a model, onto ``device`` where one is given, or return the one that is loaded already.

    Raises:
        ModelLoadError: The model is missing or broken.
        ConfigurationError: Its architecture cannot run speculative steps, or there is no such device.
    """
    options = repr(sorted(model_kwargs.items(), key=lambda item: item[0]))
    key = (str(name), options, device or "", executor)
    with _loading:  # two first calls at once must not load twice
        known = _loaded.get(key)
        if known is None:
            # In a thread that ends: OpenMP keeps a team for each that lives, and once the teams outnumber the
            # cores, every step of the others takes twice as long (docs/explanation/experiments.md).
            load = partial(_load, name, model_kwargs, device, executor)
            known = _loaded[key] = in_own_thread(load)
        return known


def _load(
    name: str | Path, model_kwargs: Mapping[str, Any], device: str | None, executor: ExecutorName
) -> SharedModel:
    loaded = load_model(name, model_kwargs, device)
    identity = model_identity(loaded.model)  # here: packed weights cannot be read any more
    folder = cache_folder() / "compiled"
    run = make_executor(executor, loaded.model, owned=True, folder=folder, identity=identity)
    shared = SharedModel(loaded.model, loaded.tokenizer, loaded.name, run)
    shared.kv_identity = identity
    return shared


def name_of(model: PreTrainedModel) -> str:
    """Return what a loaded object was loaded from, else the name of its class."""
    return getattr(model, "name_or_path", "") or type(model).__name__


def wrapped_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    executor: ExecutorName = "auto",
) -> SharedModel:
    """Return the shared model round a loaded object: one an object, so that its kept prompts are found again.

    Raises:
        ConfigurationError: Its architecture cannot run speculative steps, or not by this executor.
    """
    key = id(model), executor
    with _loading:
        known = _wrapped.get(key)
        if known is None or known.target.model is not model or known.tokenizer is not tokenizer:
            run = make_executor(executor, model)
            known = _wrapped[key] = SharedModel(model, tokenizer, name, run)
        return known
