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

from rasd_integrations.drafters.base import Drafter
from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.dense import DenseDrafter
from rasd_integrations.drafters.fused import FusedDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.recycling import RecyclingDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.drafters.translated import TranslatedDrafter, Translation
from rasd_integrations.drafters.vocabulary import Vocabulary
from rasd_integrations.engine.packing import pack_linears
from rasd_integrations.engine.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import VocabularyMismatchError
from rasd_integrations.loading import load_model


class SharedModel:
    """One model's weights, its tokenizer, and the keys and values kept between its answers.

    Attributes:
        target: The weights, ready for steps.
        tokenizer: The model's own.
        name: What the model was loaded from.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
    ) -> None:
        """Wrap loaded objects; raise if the architecture cannot run speculative steps."""
        self.target = TargetModel(model)
        self.tokenizer = tokenizer
        self.name = name
        self._caches: dict[int, PrefixCache] = {}
        self._lock = threading.Lock()

    @cached_property
    def fingerprint(self) -> str:
        """A cheap identity of the weights: names, shapes and the first values of each, read once."""
        digest = hashlib.blake2b(digest_size=8)
        for name, weight in self.target.model.named_parameters():
            head = weight.detach().flatten()[:16].float().cpu().numpy().tobytes()
            digest.update(f"{name}{tuple(weight.shape)}".encode() + head)
        return digest.hexdigest()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What its tokens stand for.

        Raises:
            VocabularyMismatchError: The tokenizer cannot be read.
        """
        return Vocabulary(self.tokenizer, self.name, self.target.vocab_size)

    def prefix_cache(self, max_bytes: int) -> PrefixCache:
        """Return the cache of this size, the same for all that ask for it."""
        with self._lock:
            return self._caches.setdefault(max_bytes, PrefixCache(max_bytes))


_loaded: weakref.WeakValueDictionary[tuple[str, str], SharedModel] = weakref.WeakValueDictionary()
_wrapped: weakref.WeakValueDictionary[int, SharedModel] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def shared_model(name: str | Path, model_kwargs: Mapping[str, Any]) -> SharedModel:
    """Load a model, or return the one that is loaded already.

    Raises:
        ModelLoadError: The model is missing or broken.
        ConfigurationError: Its architecture cannot run speculative steps.
    """
    key = (str(name), repr(sorted(model_kwargs.items(), key=lambda item: item[0])))
    with _loading:  # two first calls at once must not load twice
        known = _loaded.get(key)
        if known is None:
            # In a thread that ends: OpenMP keeps a team for each that lives, and once the teams outnumber the
            # cores, every step of the others takes twice as long (docs/explanation/experiments.md).
            with ThreadPoolExecutor(1) as own:
                known = _loaded[key] = own.submit(_load, name, model_kwargs).result()
        return known


def _load(name: str | Path, model_kwargs: Mapping[str, Any]) -> SharedModel:
    loaded = load_model(name, model_kwargs)
    pack_linears(loaded.model)
    return SharedModel(loaded.model, loaded.tokenizer, loaded.name)


def wrapped_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> SharedModel:
    """Return the shared model round a loaded object: one an object, so that its kept prompts are found again."""
    with _loading:
        known = _wrapped.get(id(model))
        if known is None or known.target.model is not model or known.tokenizer is not tokenizer:
            known = _wrapped[id(model)] = SharedModel(model, tokenizer, name)
        return known


def make_drafter(
    spec: str | Path | Drafter | None,
    target: SharedModel,
    drafter_model: SharedModel | None,
    *,
    lossless: bool,
    model_kwargs: Mapping[str, Any],
    cache_bytes: int,
) -> Drafter | None:
    """Make the drafter that ``spec`` names.

    Args:
        spec: ``"auto"``, ``"self"``, a model's hub id or path, a drafter, or ``None``.
        target: The model that is drafted for.
        drafter_model: A drafter model that is loaded already.
        lossless: Whether the output follows the target alone; a lossy law needs a drafter's law.
        model_kwargs: For loading a drafter model.
        cache_bytes: Most memory for the drafter model's kept keys and values.

    Raises:
        ModelLoadError: The drafter model is missing or broken.
        VocabularyMismatchError: It has another vocabulary, which cannot be translated, or ``lossless`` is false.
    """
    if spec is None or not isinstance(spec, str | Path):
        return spec
    if drafter_model is None and spec not in ("auto", "self"):
        drafter_model = shared_model(spec, model_kwargs)
        if (difference := vocabulary_difference(target, drafter_model)) is not None:
            if not lossless:
                raise _needs_one_vocabulary(target, drafter_model, difference)
            return _translated(target, drafter_model, PrefixCache(cache_bytes))
    if drafter_model is None and spec == "auto" and lossless:
        return FusedDrafter(_free_parts())
    own = drafter_model or target
    model = ModelDrafter(
        own.target,
        vocab_size=target.target.vocab_size,
        needs_own_prompt=own is target,
        prefix_cache=PrefixCache(cache_bytes),
    )
    cascade = CascadeDrafter(model, SuffixDrafter())
    return FusedDrafter(_free_parts(), cascade) if spec == "auto" and lossless else cascade


def _free_parts() -> list[Drafter]:
    """Return drafters that cost next to nothing and need nothing but the prompt."""
    return [SuffixDrafter(tree=True), RecyclingDrafter(), DenseDrafter()]


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


def _translated(target: SharedModel, drafter: SharedModel, cache: PrefixCache) -> TranslatedDrafter:
    translation = Translation(
        target.vocabulary,
        drafter.vocabulary,
        target_ends=target.target.eos_ids,
        drafter_ends=drafter.target.eos_ids,
    )
    return TranslatedDrafter(
        translation,
        ModelDrafter(drafter.target, prefix_cache=cache),
        ModelDrafter(drafter.target, prefix_cache=cache, allowed=translation.allowed),
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
