"""Loaded models and what is made of them. Weights stand once in a process, however many wrappers use them."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rasd_integrations.config import ExecutorName, PrefixFolder
from rasd_integrations.drafters.base import Drafter
from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.fused import FusedDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.recycling import RecyclingDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.drafters.translated import TranslatedDrafter, Translation
from rasd_integrations.drafters.vocabulary import Vocabulary
from rasd_integrations.engine.executors.eager import Executor
from rasd_integrations.engine.executors.factory import make_executor
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.kv.prefix_files import PrefixFiles
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError, VocabularyMismatchError
from rasd_integrations.loading import load_model
from rasd_integrations.loading.gguf import cache_folder
from rasd_integrations.loading.identity import model_identity


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
        return PrefixFiles(
            folder.path,
            f"{self.kv_identity}-kv8" if self.target.in_8_bits else self.kv_identity,
            folder.max_bytes,
            self.target.device,
            by_rows=self.target.by_rows,
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
            what = name, model_kwargs, device, executor
            with ThreadPoolExecutor(1) as own:
                known = _loaded[key] = own.submit(_load, *what).result()
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


def named_drafter_model(
    spec: str | Path | Drafter | None,
    model_kwargs: Mapping[str, Any],
    device: str | None = None,
    executor: ExecutorName = "auto",
) -> SharedModel | None:
    """Load the model that ``spec`` names; ``None`` where it names none. Who keeps it spares others a second copy.

    Args:
        spec: As :func:`make_drafter` takes it.
        model_kwargs: For loading it.
        device: Where it goes; ``None``: as ``model_kwargs`` says.
        executor: The target's: a drafter model runs eagerly where that one was asked to, else as is best.

    Raises:
        ModelLoadError: The model is missing or broken.
        ConfigurationError: Its architecture cannot run speculative steps, or there is no such device.
    """
    if not isinstance(spec, str | Path) or spec in ("auto", "self"):
        return None
    return shared_model(spec, model_kwargs, device, "eager" if executor == "eager" else "auto")


def make_drafter(
    spec: str | Path | Drafter | None,
    target: SharedModel,
    drafter_model: SharedModel | None,
    *,
    lossless: bool,
    cache_bytes: int,
    folder: PrefixFolder | None = None,
    namespace: str = "",
) -> Drafter | None:
    """Make the drafter that ``spec`` names.

    Args:
        spec: ``"auto"``, ``"self"``, a model's hub id or path, a drafter, or ``None``.
        target: The model that is drafted for.
        drafter_model: The one that it names, or that was given beside it.
        lossless: Whether the output follows the target alone; a lossy law needs a drafter's law.
        cache_bytes: Most memory for the drafter model's kept keys and values.
        folder: Where keys and values of warmed documents lie.
        namespace: Whose files there are read.

    Raises:
        VocabularyMismatchError: The drafter model has another vocabulary, which cannot be translated, or the law is
            not ``lossless``.
    """
    if spec is None or not isinstance(spec, str | Path):
        return spec
    if (
        drafter_model is not None
        and (difference := vocabulary_difference(target, drafter_model)) is not None
    ):
        if not lossless:
            raise _needs_one_vocabulary(target, drafter_model, difference)
        cache = PrefixCache(cache_bytes, drafter_model.prefix_files(folder))
        return _translated(target, drafter_model, cache, namespace)
    if drafter_model is None and spec == "auto" and lossless:
        return FusedDrafter(_free_parts(target.target))
    own = drafter_model or target
    model = ModelDrafter(
        own.target,
        vocab_size=target.target.vocab_size,
        needs_own_prompt=own is target,
        prefix_cache=PrefixCache(cache_bytes, own.prefix_files(folder)),
        namespace=namespace,
    )
    cascade = CascadeDrafter(model, SuffixDrafter())
    return (
        FusedDrafter(_free_parts(target.target), cascade)
        if spec == "auto" and lossless
        else cascade
    )


def _free_parts(target: TargetModel) -> list[Drafter]:
    """Return drafters that need nothing but the prompt; others earned less than they took (ADR 9)."""
    # The prompt's own candidates take a CPU longer than they save, where the tree copies from it.
    return [SuffixDrafter(tree=True), RecyclingDrafter(prompt=target.device.type != "cpu")]


def vocabulary_difference(target: SharedModel, drafter: SharedModel) -> str | None:
    """Return the first token of the target's that the drafter has no row for under the same id.

    Tokens that only the drafter has do no harm: the target refuses them.
    """
    ours, theirs = target.tokenizer.get_vocab(), drafter.tokenizer.get_vocab()
    if ours.items() <= theirs.items():
        return None
    token = next(t for t in sorted(ours, key=ours.__getitem__) if theirs.get(t) != ours[t])
    return (
        f"token {token!r} is id {ours[token]} in the target and {theirs.get(token)} in the drafter"
    )


def _translated(
    target: SharedModel, drafter: SharedModel, cache: PrefixCache, namespace: str
) -> TranslatedDrafter:
    translation = Translation(
        target.vocabulary,
        drafter.vocabulary,
        target_ends=target.target.eos_ids,
        drafter_ends=drafter.target.eos_ids,
    )
    return TranslatedDrafter(
        translation,
        ModelDrafter(drafter.target, prefix_cache=cache, namespace=namespace),
        ModelDrafter(
            drafter.target, prefix_cache=cache, namespace=namespace, allowed=translation.allowed
        ),
    )


def _needs_one_vocabulary(
    target: SharedModel, drafter: SharedModel, difference: str
) -> VocabularyMismatchError:
    msg = (
        f"Drafter {drafter.name!r} and target {target.name!r} have different vocabularies ({difference}), but "
        f"knowledge_transfer and mixture need the drafter's law over the target's tokens. Use a drafter of the "
        f"target's family or 'self', or leave both at their defaults."
    )
    return VocabularyMismatchError(msg)
