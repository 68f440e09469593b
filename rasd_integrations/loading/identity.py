"""What decides a model's answers, keys and values, as one digest; and what tells cheaply that it changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

# Of keys and values; the last two stand in the weights' names and types.
_SAYS_NOTHING = ("_name_or_path", "transformers_version", "architectures", "dtype")
# How layers of peft's kind say which adapters they add. A switch changes no weight.
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
_PROBED = 8  # values of each weight that are compared: what is written past torch's own counters changes most


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A digest of whole weights, and what else decides keys and values.

    Attributes:
        weights: Of names, types, shapes and every byte of the weights, and of the adapters that are on; 32 hex
            characters.
        kv: Of ``weights``, the config, the kind of device and the version of transformers. ``None`` for weights
            that are not plain memory of one device (offloaded, sharded): files could not be told from others'.
    """

    weights: str
    kv: str | None


def model_identity(model: PreTrainedModel) -> ModelIdentity:
    """Read all weights once, 1.3 GB/s on a core with SHA instructions.

    Where the model came from says nothing: a folder may be moved, and may hold other weights tomorrow.

    Args:
        model: Before its weights are packed or compiled away.
    """
    named = model.state_dict()
    digest = hashlib.sha256(repr(_adapters(model)).encode())
    is_whole = True
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = pool.map(_content, named.values())
        for (name, weight), content in zip(named.items(), parts, strict=True):
            digest.update(
                f"{name} {weight.dtype} {tuple(weight.shape)} ".encode() + (content or b"")
            )
            is_whole &= content is not None and weight.device == model.device
    weights = digest.hexdigest()[:32]
    config = {k: v for k, v in model.config.to_dict().items() if k not in _SAYS_NOTHING}
    said = (weights, transformers.__version__, model.device.type, json.dumps(config, default=str))
    kv = hashlib.sha256(repr(said).encode()).hexdigest()[:32]
    return ModelIdentity(weights, kv if is_whole else None)


@torch.inference_mode()
def weights_state(model: PreTrainedModel) -> Hashable:
    """Return what is another after a training step, a weight put in another's place, an adapter switched or merged.

    Cheap enough for every answer: where each weight lies, torch's counter of changes in place, and a few of its
    values, because changes through ``.data`` and of tensors made in inference mode are not counted.
    """
    buffers = (
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()  # noqa: SLF001 -- the rest is made of the config
        if buffer is not None and name not in module._non_persistent_buffers_set  # noqa: SLF001
    )
    weights = [
        getattr(w, "to_local", w.detach)()  # of a shard, what this process has
        for w in chain(model.parameters(), buffers)
        if not w.is_meta
    ]
    counts = tuple(0 if w.is_inference() else w._version for w in weights)  # noqa: SLF001 -- has no public name
    places = tuple(w.data_ptr() for w in weights)
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for weight in weights:
        flat = weight.reshape(-1)
        probe = flat[:: max(1, len(flat) // _PROBED)]
        by_kind.setdefault((weight.device, weight.dtype), []).append(probe)
    probes = tuple(
        torch.cat(parts).cpu().view(torch.uint8).numpy().tobytes() for parts in by_kind.values()
    )
    return counts, places, probes, repr(_adapters(model))


def _adapters(model: PreTrainedModel) -> list[tuple[str, object]]:
    return [
        (name, module.__dict__[name])
        for module in model.modules()
        if "merged_adapters" in module.__dict__
        for name in _ADAPTERS
        if name in module.__dict__
    ]


@torch.inference_mode()
def _content(weight: Any) -> bytes | None:
    """Return the digest of a weight's bytes, ``None`` where they are not here as plain memory."""
    try:
        # Of a shard, what this process has.
        here: Tensor = getattr(weight, "to_local", weight.detach)()
        if here.is_meta:
            return None
        content = here.contiguous().cpu().view(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(content.data).digest()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # no plain memory
        return None
    return digest
