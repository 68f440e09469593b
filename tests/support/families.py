"""Every causal family of the installed transformers, built tiny, with every kind of layer that its code knows."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fakes import ScriptedDrafter, as_tree, oracle
from tiny import seed_draws
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.engine.executors.shrinking import shrunken
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.stats import DecodingStats

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
_BEGIN = "##"
MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WINDOW = 24  # of what looks back on a part of the text; also the border of longrope
_KINDS = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "conv",
    "mamba",
    "hybrid",
    "moe",
)
_MOST_WEIGHTS = 30_000_000
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": WINDOW,
    "short_factor": [1.0 + 0.02 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
# Fields that the general rules of `shrunken` do not know or that a default config leaves open.
_FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "ministral": {"head_dim": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "longcat_flash": {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2},
}


def variants(model_type: str) -> Iterator[tuple[str, PretrainedConfig | Exception]]:
    """Yield what makes this family's small configs differ, and the configs, or why there is none."""
    try:
        base = shrunken(CONFIG_MAPPING[model_type]())
        text = base.get_text_config()
        for name, value in _FIELDS.get(model_type, {}).items():
            setattr(text, name, value)
    except Exception as err:  # noqa: BLE001 - a config class may refuse numbers in any way
        yield "default", err
        return
    yield "default", base
    if not hasattr(text, "max_position_embeddings"):
        other = copy.deepcopy(base)
        other.get_text_config().max_position_embeddings = 256
        yield "named window", other
        return
    own = set(getattr(text, "layer_types", None) or ())
    for kind in sorted(_kinds_in_code(text) - own):
        if getattr(text, "layer_types", None):
            other = copy.deepcopy(base)
            layers = other.get_text_config().layer_types
            if kind == "sliding_attention" and not getattr(text, "sliding_window", None):
                _set_window(other.get_text_config())
            try:
                other.get_text_config().layer_types = [kind, *layers[1:]]
            except AttributeError:  # made of other fields
                continue
            yield kind, other
    if "sliding_window" in vars(text) and not own & {"sliding_attention"}:
        other = copy.deepcopy(base)
        _set_window(other.get_text_config())
        yield "window", other
    if model_type in ("llama", "phi3", "phimoe"):
        other = copy.deepcopy(base)
        rope = (
            dict(_LONG_ROPE, short_mscale=1.0, long_mscale=1.0)
            if model_type == "phimoe"
            else _LONG_ROPE
        )
        other.rope_parameters = dict(rope)
        other.original_max_position_embeddings = WINDOW
        yield "longrope", other


def tiny(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a random model whose answers are lively."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, model_class.config_class):  # as from_pretrained does
        config = config.get_text_config()
    with torch.device("meta"):
        size = sum(weight.numel() for weight in model_class(copy.deepcopy(config)).parameters())
    if size > _MOST_WEIGHTS:
        msg = f"{size} weights"
        raise ValueError(msg)
    seed_draws(seed)
    model: PreTrainedModel = model_class(config).float().eval().requires_grad_(requires_grad=False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 2 * weight.shape[-1] ** -0.5)
        else:
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


def _set_window(config: PretrainedConfig) -> None:
    config.sliding_window = WINDOW
    if "use_sliding_window" in vars(config):
        config.use_sliding_window = True


def _kinds_in_code(config: PretrainedConfig) -> set[str]:
    """Return the kinds of layers that the family's module names."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        return set()
    source = inspect.getsource(sys.modules[model_class.__module__])
    return {kind for kind in _KINDS if re.search(rf"[\"']{kind}[\"']", source)}


_WHY = {
    "keep a state": "state",
    "attention interface": "interface",
    "off those of its own": "other mask",
    "over our cache": "other cache",
    "no max_position_embeddings": "no window",
    "cannot be compared": "not comparable",
}


def outcome(config: PretrainedConfig | Exception, lengths: tuple[int, ...], n: int) -> str:
    """Return ``equal``, why the family is refused, or that it is not built.

    Raises:
        AssertionError: It is taken, and an answer is another than that of ``generate``.
    """
    if isinstance(config, Exception):
        return "not built"
    try:
        model = tiny(config)
    except Exception:  # noqa: BLE001 - a config class may refuse numbers in any way
        return "not built"
    try:
        target = TargetModel(model)
    except ConfigurationError as err:
        return next(short for said, short in _WHY.items() if said in str(err))
    if not target.layout.one_by_one:
        target._pieces = (16, 16) if target.keeps_states else (64, 64)  # of a short text
    plain = SpeculativeDecoder(target)
    cached = SpeculativeDecoder(target, prefix_cache=PrefixCache(1 << 26))
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        ids = torch.randint(2, min(target.vocab_size, 60), (length,), generator=generator).tolist()
        wanted = generated(model, ids, n)
        script = as_tree(oracle(wanted), target.vocab_size)
        drafted = SpeculativeDecoder(
            target, ScriptedDrafter(script), config=SpeculationConfig(num_draft_tokens=6)
        )
        for decoder in (plain, drafted, cached, cached):
            stats = DecodingStats()
            assert answered(decoder, ids, n, stats) == wanted, (length, decoder.drafter)
        assert length < 60 or stats.cached_prompt_tokens >= 48 or target.layout.one_by_one
    return "equal"


def answered(
    decoder: SpeculativeDecoder, ids: list[int], n: int, stats: DecodingStats | None = None
) -> list[int]:
    """Return an answer of ``n`` tokens."""
    blocks = decoder.generate(ids, SamplingParams(max_tokens=n, ignore_eos=True), stats=stats)
    return [token for block in blocks for token in block.token_ids]


def generated(model: PreTrainedModel, ids: list[int], n: int) -> list[int]:
    """Return the stock answer of ``n`` tokens."""
    tensor, options = torch.tensor([ids]), {"do_sample": False, "max_new_tokens": n}
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(tensor)
    out: Any = model.generate(tensor, attention_mask=mask, pad_token_id=0, **options)
    return out[0, len(ids) :].tolist()


def documented() -> tuple[dict[str, dict[str, str]], str]:
    """Return what docs/reference/families.md says of each family's variants, and of which transformers."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| (.+?) \|$", text, re.MULTILINE)
    version = re.search(r"transformers (5\.\d+\.\d+)", text)
    said = {name: dict(cell.split(": ") for cell in cells.split("; ")) for name, cells in rows}
    return said, version[1] if version else ""


def write_page() -> None:
    """Write the table again, below what the page says of it."""
    import transformers

    head = PAGE.read_text(encoding="utf-8").split(_BEGIN)[0]
    found = {t: {k: outcome(c, (7, 60), 12) for k, c in variants(t)} for t in MODEL_TYPES}
    is_equal = {t: all(v == "equal" for v in said.values()) for t, said in found.items()}
    some = sum("equal" in said.values() for said in found.values())
    unbuilt = sum(set(said.values()) == {"not built"} for said in found.values())
    counted = (
        f"Of {len(found)}, {some} are equal to `generate` ({sum(is_equal.values())} with every kind of layer tried), "
        f"{len(found) - some - unbuilt} are refused, {unbuilt} are not built by the tests. None is wrong."
    )
    lines = [
        f"{_BEGIN} Families with transformers {transformers.__version__}",
        "",
        counted,
        "",
        "| family | kinds of layers: result |",
        "|---|---|",
    ]
    for name, said in found.items():
        lines.append(f"| `{name}` | {'; '.join(f'{k}: {v}' for k, v in said.items())} |")
    PAGE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_page()
