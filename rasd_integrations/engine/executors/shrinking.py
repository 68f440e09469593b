"""A small model of an architecture, with every kind of layer and every border of its config.

A checkpoint's windows are thousands of tokens long and its layers cost seconds each. Whether steps are right does not
depend on sizes, so a model of the same classes with smaller numbers is checked.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

BORDER = 24  # tokens of a shrunken window, chunk or rope border
_LEAST_LAYERS = 4  # enough for patterns such as "every second layer"
_HEADS, _HEAD_DIM = 4, 16
_MOST_WEIGHTS = 4_000_000
_BORDERS = r".*window(_size)?|.*chunk_size|.*block_size|original_max_position_embeddings"
# Of a part that reads images or sound, which no comparison runs.
_PART = {
    "num_hidden_layers": 1, "hidden_size": _HEADS * _HEAD_DIM, "intermediate_size": 32, "num_attention_heads": _HEADS,
    "encoder_layers": 1, "encoder_attention_heads": _HEADS, "encoder_ffn_dim": 32, "d_model": _HEADS * _HEAD_DIM,
}  # fmt: skip
_PLACES = r".*layer_(indices|ids)"  # lists of layers
# Heads of a state space, whose rows are those of the hidden size, expanded twice.
_STATE = {
    r"mamba_d_head|mamba_headdim|mamba_head_dim": _HEAD_DIM,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 2 * _HEADS,
    r"mamba_d_ssm|attention_hidden_size": 2 * _HEADS * _HEAD_DIM,
    r"attention_head_dim": 2 * _HEAD_DIM,
}
# Upper limit of a field, by the first pattern that matches its whole name.
_SIZES = {
    r"hidden_size|n_embd|d_model|dim|embed_dim|embedding_size|word_embed_proj_dim": _HEADS * _HEAD_DIM,
    r"vocab_size|vocab_size_per_layer_input|n_vocab": 64,
    r".*head_dim|kv_channels|rotary_dim|.*head_size": _HEAD_DIM,
    r"ssm_state_size|mamba_d_state": _HEAD_DIM,
    r".*layer_period": 2,
    r".*layer_offset": 1,
    r".*intermediate_size|.*ffn.*|n_inner|d_ff|inner_dim": 32,
    r".*_lora_rank|laurel_rank|hidden_size_per_layer_input": _HEAD_DIM,
    r"max_position_embeddings|n_positions|n_ctx|seq_length|max_seq_len": 256,
    r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts": 4,
    r"num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k": 2,
    r"num_kv_shared_layers": 0,
    r"n_group|topk_group|num_expert_group|num_limited_groups": 1,
    _BORDERS: BORDER,
}  # fmt: skip


def longest_border(config: PretrainedConfig) -> int:
    """Return the position of the last window, chunk or rope border that a config names; 0 for none."""
    text = config.get_text_config()
    fields = vars(text) | dict(getattr(text, "rope_parameters", None) or {})
    named = [v for k, v in fields.items() if _is_size(v) and re.fullmatch(_BORDERS, k)]
    return max(named, default=0)


def small_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a random model of ``model``'s class and :func:`shrunken` config, in float32 on the CPU.

    Raises:
        Exception: Whatever the class raises on numbers that do not fit together.
    """
    config = shrunken(model.config)
    config._attn_implementation = None  # the class's own choice: the user's may need another device
    build: Any = type(model)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        size = sum(weight.numel() for weight in build(copy.deepcopy(config)).parameters())
    if size > _MOST_WEIGHTS:
        msg = f"{size} weights are left."
        raise ValueError(msg)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        small: PreTrainedModel = build(config).float().eval().requires_grad_(requires_grad=False)
    for weight in small.parameters():
        if weight.dim() > 1:  # at the stock scale attention is uniform
            weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5, generator=generator)
        else:
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return small


def shrunken(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of ``config`` with small sizes and near borders, and at least one layer of each kind."""
    new = copy.deepcopy(config)
    text = new.get_text_config()
    fields, total = vars(text), int(text.num_hidden_layers)
    heads, kv_heads = (
        getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    per_layer = {
        k: v for k, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == total
    }
    kinds = getattr(text, "layer_types", None)  # of some classes computed from other fields
    kept = _layers(per_layer if kinds is None else per_layer | {"layer_types": kinds}, total)
    small: dict[str, Any] = {k: [v[i] for i in kept] for k, v in per_layer.items()}
    for name, value in fields.items():
        if re.fullmatch(_PLACES, name) and isinstance(value, (list, tuple)):
            small[name] = [kept.index(place) for place in value if place in kept]
            continue
        exact, most = _of(name, _STATE), _of(name, _SIZES)
        if exact is not None and _is_size(value):
            small[name] = exact
        elif most is not None and _is_size(value):
            small[name] = min(value, most)
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            small[name] = _rope(value)
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id") and value is not None:
            small[name] = 1
    small["num_hidden_layers"] = len(kept)
    if heads is not None:
        small["num_attention_heads"] = _HEADS
    elif _is_size(fields.get("num_heads")):  # of a state space alone (Mamba 2)
        small["num_heads"] = 2 * _HEADS
    if isinstance(kv_heads, int):
        small["num_key_value_heads"] = _HEADS if kv_heads == heads else min(kv_heads, 2)
    for name, value in small.items():
        setattr(text, name, value)
    _shrink_parts(new, text)
    return new


def _shrink_parts(config: PretrainedConfig, text: PretrainedConfig) -> None:
    """Set small sizes in all parts but ``text``."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not text and isinstance(part, PretrainedConfig):
            for field in _PART.keys() & vars(part).keys():
                setattr(part, field, _PART[field])


def _layers(per_layer: Mapping[str, Any], total: int) -> list[int]:
    """Return the indices of layers to keep: the first of each kind, and some more."""
    first: dict[str, int] = {}
    for index in range(total):
        first.setdefault(repr([values[index] for values in per_layer.values()]), index)
    kept = set(first.values())
    for index in range(total):
        if len(kept) < _LEAST_LAYERS:
            kept.add(index)
    return sorted(kept)


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope parameters whose lists fit the small heads."""
    new: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):  # of one kind of layer
            new[name] = _rope(value)
        elif name in ("short_factor", "long_factor"):
            new[name] = list(value)[: _HEAD_DIM // 2]
        elif name == "mrope_section":
            new[name] = [_HEAD_DIM // 4, _HEAD_DIM // 8, _HEAD_DIM // 8]
        else:
            new[name] = min(value, BORDER) if re.fullmatch(_BORDERS, name) and value else value
    return new


def _of(name: str, sizes: Mapping[str, int]) -> int | None:
    return next((size for pattern, size in sizes.items() if re.fullmatch(pattern, name)), None)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
