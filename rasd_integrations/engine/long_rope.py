"""longrope (Phi-3, MiniCPM): rotary angles with short factors up to a border, with long ones beyond it.

transformers takes the long factors for a whole forward once its last position is past
``original_max_position_embeddings``. So a longer prompt has other keys from its first token on, and keys of one side
cannot be used on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rasd_integrations.engine.module_copy import shared_copy

_JOINT = ("dynamic", "longrope")  # their angles depend on the longest sequence of a batch
ROTARY = "RotaryEmbedding"  # suffix of the class names of rotary modules in transformers


def has_joint_rope(config: PretrainedConfig) -> bool:
    """Return True if a token's rotary angles depend on the other tokens of its forward."""
    return any(kind.get("rope_type") in _JOINT for kind in _ropes(config))


def _ropes(text: PretrainedConfig) -> list[Mapping[str, Any]]:
    rope = getattr(text, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, Mapping))]


def long_rope_border(config: PretrainedConfig) -> int | None:
    """Return the longest text with short factors, in tokens; ``None`` for other models."""
    text = config.get_text_config()
    borders = [
        kind.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        for kind in _ropes(text)
        if kind.get("rope_type") == "longrope"
    ]
    return min((int(border) for border in borders if border), default=None)


def always_long(model: PreTrainedModel, border: int) -> PreTrainedModel:
    """Return a copy of ``model`` over the same weights that always takes long factors."""
    new = shared_copy(model)
    for module in new.modules():
        if type(module).__name__.endswith(ROTARY):
            module.forward = partial(_as_in_a_long_text, module.forward, border)
    return new


def _as_in_a_long_text(
    forward: Callable[..., Any],
    border: int,
    x: Tensor,
    position_ids: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """Return the angles of ``position_ids`` ``[1, n]`` in a text that passes the border."""
    more = torch.cat([position_ids, position_ids.new_full((len(position_ids), 1), border)], 1)
    return tuple(table[:, :-1] for table in forward(x, more, *args, **kwargs))
