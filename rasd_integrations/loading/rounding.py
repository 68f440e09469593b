"""Rounds the weights of a loaded model to 8 or 4 bits, each to the nearest code of its group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rasd_integrations.loading.gguf import written
from rasd_integrations.loading.identity import model_identity
from rasd_integrations.loading.progress import stage
from rasd_integrations.loading.quantised import CodeType, Coding, QuantisedWeight, packed
from rasd_integrations.loading.quantiser import can_replace, write_quantised
from rasd_integrations.storage.cache_folder import cache_folder, is_whole

WeightsAs = Literal["dense", "kept", "int8", "int4"]
_ROUNDING = 1  # to be raised when the rounding changes, so that older results are not read
_LEAST = 1 << 14  # numbers of a weight that is rounded
_GROUPS = (128, 64, 32, 16)  # columns that share a scale in 4 bits: the first that divides them
_PART = 1 << 22  # numbers that are rounded at once


def rounded_model(
    model: PreTrainedModel,
    bits: int,
    cache_dir: str | Path | None,
    name: str,
    *,
    trusts: bool = False,
) -> PreTrainedModel:
    """Return ``model`` with rounded weights, mapped from a folder that is made once.

    Args:
        model: A dense model on a CPU.
        bits: 8 or 4.
        cache_dir: Where the folder is; default the user's cache folder.
        name: Of the model, for people.
        trusts: The checkpoint's own code may run.
    """
    digest = model_identity(model).weights
    dtype = str(model.dtype).removeprefix("torch.")
    folder = cache_folder("models", cache_dir) / f"{digest}-{_ROUNDING}-{dtype}-int{bits}"
    nbytes = sum(weight.numel() for weight in model.parameters()) * bits // 8

    def write(to: Path) -> None:
        tensors, tied = rounded(model, bits), tied_head(model)
        write_quantised(to, model.config, model.generation_config, tensors, tied)

    with ExitStack() as stack:
        if not is_whole(folder):
            with stage(f"Rounding {Path(name).name} to {bits} bits, once"):
                folder = written(folder, write, name, nbytes, stack)
        made: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.dtype, local_files_only=True, trust_remote_code=trusts
        )
    quantised: PreTrainedModel = made
    return quantised


def rounded(model: PreTrainedModel, bits: int) -> Iterator[tuple[str, Tensor | QuantisedWeight]]:
    """Yield the model's tensors by name, the weights of linear layers and embeddings rounded.

    Args:
        model: On a CPU.
        bits: 8: a scale for each row. 4: for each group of columns, but embeddings and the head have 8.
    """
    head, tied = model.get_output_embeddings(), tied_head(model)
    done: set[str] = set()
    for name, module in model.named_modules():
        if can_round(module):
            done.add(f"{name}.weight")
            if name != tied:
                is_edge = isinstance(module, nn.Embedding) or module is head
                yield name, round_weight(module.weight, 8 if is_edge else bits)
    for name, tensor in model.state_dict().items():
        if name not in done:
            yield name, tensor


def can_round(module: Any) -> bool:
    """Return True for a linear layer or an embedding with a large weight."""
    return can_replace(module) and module.weight.numel() >= _LEAST


def tied_head(model: PreTrainedModel) -> str | None:
    """Return the name of the output head if it shares the input embedding's weight and that is rounded."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if not can_round(embedding) or head is None or head.weight is not embedding.weight:
        return None
    return next((name for name, module in _modules(model) if module is head), None)


def _modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    yield from model.named_modules()


@torch.inference_mode()
def round_weight(weight: Tensor, bits: int) -> QuantisedWeight:
    """Return ``weight`` ``[rows, columns]`` in 8 bits with a scale a row, or in 4 with one a group of columns."""
    columns = weight.shape[1]
    group = columns
    if bits == 4:
        group = next((size for size in _GROUPS if columns % size == 0), columns)
    kind: CodeType = "i8" if bits == 8 or columns % 2 else "i4"
    most = 127 if kind == "i8" else 7
    codes, scales = [], []
    for part in weight.split(max(1, _PART // columns)):
        grouped = part.float().reshape(len(part), -1, group)
        # 4 bits reach from -8 to 7: the largest number of a group takes -8.
        largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
        scale = largest.abs() / most if kind == "i8" else largest / -8
        code = (grouped / scale.where(scale != 0, 1)).round_().clamp_(-most - 1, most)
        codes.append(packed(code.to(torch.int8).reshape(len(part), columns), kind))
        scales.append(scale[..., 0])
    coding = Coding(kind, group, has_minimum=False)
    return QuantisedWeight(coding, torch.cat(codes), torch.cat(scales), None)
