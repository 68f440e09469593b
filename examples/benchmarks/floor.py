"""The floor of a step: what it must read, at the speed at which this machine reads.

A plain step reads all weights but an input embedding that is not tied to the output, and the keys and values of
its context. Batch 1, drafting free: tokens/s x (W + k S) / B is the multiple of the floor, over 1 only where a
step yields more than one token; what a step must read / B / its time is the engine's efficiency, at most 1.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from rasd_integrations.loading import load_config

READS = 6


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What a plain step of one model reads.

    Attributes:
        weights: Bytes of weights.
        kv_token: Bytes of keys and values a token, in all layers.
        windows: For each layer, how many tokens back it looks; ``None`` is all.
        bits: Of one number of the keys and values.
    """

    weights: int
    kv_token: int
    windows: tuple[int | None, ...]
    bits: int

    def at(
        self, context: float, *, weights: int | None = None, kv_bits: int | None = None
    ) -> float:
        """Return the bytes of a step over ``context`` tokens, in the engine's own formats where it has such."""
        layer = self.kv_token / len(self.windows)
        kv = sum(layer * min(context, window or context) for window in self.windows)
        return (weights or self.weights) + kv * (kv_bits or self.bits) / self.bits


def step_bytes(model: str | Path, dtype: str) -> StepBytes:
    """Count the bytes of a model's plain step from its config; no weight is loaded."""
    config = load_config(model)
    size = getattr(torch, dtype).itemsize
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    count = sum(weight.numel() for weight in module.parameters())
    if module.get_output_embeddings().weight is not module.get_input_embeddings().weight:
        count -= module.get_input_embeddings().weight.numel()
    text: PretrainedConfig = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    layers = text.num_hidden_layers
    kv_token = 2 * layers * kv_heads * width * size
    return StepBytes(size * count, kv_token, tuple(_windows(text, layers)), 8 * size)


def _windows(text: Any, layers: int) -> list[int | None]:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def bandwidth(threads: int, buffer_bytes: int) -> float:
    """Return bytes/s of the fastest of some reads of a buffer: torch's sum over float32, all threads.

    The buffer must be many times what the caches hold; ``run.py`` takes 2 GiB.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffer = torch.ones(buffer_bytes // 4, device=device)
    times = []
    for _ in range(READS):
        start = time.perf_counter()
        buffer.sum().item()
        times.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return buffer_bytes / min(times)
