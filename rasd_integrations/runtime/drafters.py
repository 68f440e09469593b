"""Makes the drafter that the option ``drafter`` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rasd_integrations.config import CacheDir, ExecutorName
from rasd_integrations.datastores.tokens.memory import Memory
from rasd_integrations.drafters.base import Drafter
from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.datastore import AnswersDrafter, CollectionDrafter
from rasd_integrations.drafters.fused import FusedDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.papers.translated import TranslatedDrafter, Translation
from rasd_integrations.drafters.recycling import RecyclingDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import VocabularyMismatchError
from rasd_integrations.runtime.models import SharedModel, shared_model


def named_drafter_model(
    spec: str | Path | Drafter | None,
    model_kwargs: Mapping[str, Any],
    device: str | None = None,
    executor: ExecutorName = "auto",
    cache_dir: Path | None = None,
) -> SharedModel | None:
    """Load the drafter model that ``spec`` names, or return ``None``. Shared while any caller holds it.

    Raises:
        ModelLoadError: The model is missing or broken.
        ConfigurationError: Its architecture cannot run speculative steps, or there is no such device.
    """
    if not isinstance(spec, str | Path) or spec in ("auto", "self"):
        return None
    # Eager like its target, if that was asked for; else whatever is best for it.
    own: ExecutorName = "eager" if executor == "eager" else "auto"
    return shared_model(spec, model_kwargs, device, own, cache_dir)


def make_drafter(
    spec: str | Path | Drafter | None,
    target: SharedModel,
    drafter_model: SharedModel | None,
    *,
    lossless: bool,
    cache_bytes: int,
    kept: CacheDir,
    namespace: str = "",
    memory: Memory | None = None,
) -> Drafter | None:
    """Make the drafter that ``spec`` names.

    Args:
        spec: ``"auto"``, ``"self"``, a model's hub id or path, a drafter, or ``None``.
        target: The model that is drafted for.
        drafter_model: The one that ``spec`` names, or that was given besides.
        lossless: The output follows the target alone; otherwise the drafter must give probabilities.
        cache_bytes: Most memory for the drafter model's prefix cache.
        kept: Where its prefixes are kept on disk, if a folder is named.
        namespace: Of these.
        memory: What "auto" also drafts from.

    Raises:
        VocabularyMismatchError: The drafter model has another vocabulary, which cannot be translated, or
            ``lossless`` is false.
    """
    if spec is None or not isinstance(spec, str | Path):
        return spec
    if (
        drafter_model is not None
        and (difference := vocabulary_difference(target, drafter_model)) is not None
    ):
        if not lossless:
            raise _needs_one_vocabulary(target, drafter_model, difference)
        cache = drafter_model.new_cache(cache_bytes, kept)
        return _translated(target, drafter_model, cache, namespace)
    if drafter_model is None and spec == "auto" and lossless:
        return FusedDrafter(_free_parts(target.target, memory))
    own = drafter_model or target
    model = ModelDrafter(
        own.target,
        vocab_size=target.target.vocab_size,
        needs_own_prompt=own is target,
        prefix_cache=own.new_cache(cache_bytes, kept),
        namespace=namespace,
    )
    cascade = CascadeDrafter(model, SuffixDrafter())
    return (
        FusedDrafter(_free_parts(target.target, memory), cascade)
        if spec == "auto" and lossless
        else cascade
    )


def _free_parts(target: TargetModel, memory: Memory | None) -> list[Drafter]:
    """Return the parts of "auto" that run no model (ADR 9)."""
    known = [] if memory is None else [AnswersDrafter(memory), CollectionDrafter(memory)]
    # On a CPU the prompt's own candidates cost more than they save beside the tree.
    recycling = RecyclingDrafter(prompt=target.device.type != "cpu")
    return [SuffixDrafter(tree=True), *known, recycling]


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
        f"knowledge_transfer and mixture need the drafter's distribution over the target's tokens. Use a drafter of "
        f"the target's family or 'self', or leave both at their defaults."
    )
    return VocabularyMismatchError(msg)
