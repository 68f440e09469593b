"""Makes the drafter that the option ``drafter`` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rasd_integrations.config import ExecutorName, WeightsName
from rasd_integrations.datastores.tokens.memory import Memory
from rasd_integrations.decoding.steps import FixedSteps, Steps
from rasd_integrations.decoding.teacher import TeacherModel
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
    weights: WeightsName = "auto",
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
    # Rounded like its target; the target's "kept" is of its own file.
    how: WeightsName = "auto" if weights == "kept" else weights
    return shared_model(spec, model_kwargs, device, own, cache_dir, how)


def make_drafter(
    spec: str | Path | Drafter | None,
    target: SharedModel,
    drafter_model: SharedModel | None,
    *,
    lossless: bool,
    cache: PrefixCache,
    namespace: str = "",
    memory: Memory | None = None,
) -> Drafter | None:
    """Make the drafter that ``spec`` names.

    Args:
        spec: ``"auto"``, ``"self"``, a model's hub id or path, a drafter, or ``None``.
        target: The model that is drafted for.
        drafter_model: The one that ``spec`` names, or that was given besides.
        lossless: The output follows the target alone; otherwise the model that ``spec`` names is the teacher.
        cache: The drafter model's.
        namespace: Of the cache.
        memory: What "auto" also drafts from.

    Raises:
        VocabularyMismatchError: The drafter model has another vocabulary, which cannot be translated.
    """
    if spec is None or not isinstance(spec, str | Path):
        return spec
    if not lossless:  # a model named here teaches; it need not draft as well
        return FusedDrafter(_free_parts(target.target, memory))
    if drafter_model is not None and vocabulary_difference(target, drafter_model) is not None:
        return _translated(target, drafter_model, cache, namespace)
    if drafter_model is None and spec == "auto":
        return FusedDrafter(_free_parts(target.target, memory))
    own = drafter_model or target
    model = ModelDrafter(
        own.target,
        vocab_size=target.target.vocab_size,
        needs_own_prompt=own is target,
        prefix_cache=cache,
        namespace=namespace,
    )
    cascade = CascadeDrafter(model, SuffixDrafter())
    return FusedDrafter(_free_parts(target.target, memory), cascade) if spec == "auto" else cascade


def make_teacher(
    target: SharedModel,
    drafter_model: SharedModel | None,
    steps: Steps,
    cache: PrefixCache,
    drafter_cache: PrefixCache,
    *,
    lossless: bool,
    namespace: str,
) -> TeacherModel | None:
    """Return whose distribution knowledge transfer joins with the target's: the drafter model, else the target.

    Args:
        target: Whose answers are joined.
        drafter_model: A model that was named or given.
        steps: The target's.
        cache: The target's.
        drafter_cache: The drafter model's.
        lossless: Only single calls may ask for transfer: a model that cannot teach is then ``None``.
        namespace: Of the caches.

    Raises:
        VocabularyMismatchError: The drafter model has another vocabulary, and ``lossless`` is false.
        ConfigurationError: Its steps are not deterministic as the target's are, and ``lossless`` is false.
    """
    size = target.target.vocab_size
    if drafter_model is None or drafter_model is target:
        return TeacherModel(target.target, steps, cache, namespace, size, needs_own_prompt=True)
    difference = vocabulary_difference(target, drafter_model)
    if lossless and (difference is not None or steps.is_fixed):
        return None
    if difference is not None:
        raise _needs_one_vocabulary(target, drafter_model, difference)
    own = (FixedSteps if steps.is_fixed else Steps)(drafter_model.target)
    return TeacherModel(
        drafter_model.target, own, drafter_cache, namespace, size, needs_own_prompt=False
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
        f"knowledge_transfer needs the drafter's distribution over the target's tokens. Use a drafter of the "
        f"target's family or 'self', or leave knowledge_transfer out."
    )
    return VocabularyMismatchError(msg)
