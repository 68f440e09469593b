"""Folders of quantised models: how they are written, and how transformers reads them.

A folder is a checkpoint whose ``quantization_config`` lists the modules with a quantised weight, so ``from_pretrained``
does the rest. Tensors lie at multiples of 64 bytes, where OpenVINO reads them without a copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rasd_integrations.loading.quantised import (
    Coding,
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedWeight,
)

_METHOD = "rasd"
_ALIGNED = 64
_SHARD = 1 << 28  # bytes of a file, about
_TYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
    torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL",
}  # fmt: skip


@register_quantization_config(_METHOD)
class CodesConfig(QuantizationConfigMixin):
    """Which modules of a checkpoint have a quantised weight.

    Attributes:
        modules: By name, the fields of :class:`Coding` and the type of the scales.
        tied: The module that shares the input embedding's weight.
    """

    def __init__(
        self, modules: Mapping[str, Mapping[str, Any]], tied: str | None = None, **_more: Any
    ) -> None:
        """Hold what a folder's config says."""
        method: Any = _METHOD
        super().__init__(quant_method=method)
        self.modules = modules
        self.tied = tied


@register_quantizer(_METHOD)
class CodesQuantizer(HfQuantizer):
    """Puts quantised modules in the place of those that the config lists."""

    quantization_config: CodesConfig

    def _process_model_before_weight_loading(self, model: Any, **_more: Any) -> None:
        for name, how in self.quantization_config.modules.items():
            coding = Coding(how["kind"], how["group"], how["has_minimum"])
            module = model.get_submodule(name)
            with torch.device("meta"):
                rows, columns = module.weight.shape
                weight = QuantisedWeight.empty(coding, rows, columns, getattr(torch, how["scales"]))
            model.set_submodule(name, _replaced(module, weight, model.dtype))
        if self.quantization_config.tied is not None:  # has no weight of its own to be read
            model.set_submodule(self.quantization_config.tied, nn.Identity())

    def _process_model_after_weight_loading(self, model: Any, **_more: Any) -> Any:
        if (tied := self.quantization_config.tied) is not None:
            embedding: Any = model.get_input_embeddings()
            model.set_submodule(tied, QuantisedLinear(embedding.quantised))
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> None:
        """Return that no tensor changes its type: the folder was written for the model's."""
        del converter, param, dtype

    def is_serializable(self) -> bool:
        """Return False: the folder is the checkpoint."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False."""
        return False


def can_replace(module: nn.Module) -> bool:
    """Return True for a linear layer or an embedding that computes what its class is known for."""
    forward: object = type(module).forward
    return forward is nn.Linear.forward or (
        isinstance(module, nn.Embedding)
        and (forward is nn.Embedding.forward or "scalar_embed_scale" in vars(module))
    )


def _replaced(module: Any, weight: QuantisedWeight, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return QuantisedEmbedding(weight, dtype, float(vars(module).get("scalar_embed_scale", 1)))
    return QuantisedLinear(weight, module.bias)


def write_quantised(
    folder: Path,
    config: PretrainedConfig,
    generation: GenerationConfig | None,
    tensors: Iterable[tuple[str, Tensor | QuantisedWeight]],
    tied: str | None,
) -> None:
    """Write a checkpoint, a tensor at a time.

    Args:
        folder: An empty folder.
        config: Of the dense model; it is changed.
        generation: Its generation config.
        tensors: By name; a quantised weight by the name of its module.
        tied: The module that shares the input embedding's weight, if that is quantised.
    """
    modules: dict[str, dict[str, Any]] = {}
    where: dict[str, str] = {}
    for number, shard in enumerate(_shards(tensors, modules), start=1):
        file = f"model-{number:05d}.safetensors"
        _write_tensors(folder / file, shard)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tied is not None:
        config.tie_word_embeddings = False
    config.quantization_config = {"quant_method": _METHOD, "modules": modules, "tied": tied}
    config.save_pretrained(folder)
    if generation is not None:
        generation.save_pretrained(folder)


def _shards(
    tensors: Iterable[tuple[str, Tensor | QuantisedWeight]], modules: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Tensor]]:
    """Yield tensors by the names that they have in a file; list quantised ones in ``modules``."""
    shard: dict[str, Tensor] = {}
    for name, value in tensors:
        if isinstance(value, QuantisedWeight):
            scales = str(value.scales.dtype).removeprefix("torch.")
            modules[name] = {**asdict(value.coding), "scales": scales}
            for part, tensor in value.named_buffers():
                shard[f"{name}.quantised.{part}"] = tensor
        else:
            shard[name] = value
        if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD:
            yield shard
            shard = {}
    if shard:
        yield shard


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whose large tensors are aligned; its format allows spaces behind the header."""
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].nbytes % _ALIGNED != 0))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _TYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            out.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
