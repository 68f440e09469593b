"""What dense stores are built of in tests: texts, tiny models, and hidden states by transformers itself."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.runtime.models import SharedModel

TEXTS = [f"Text {i}: the drafter of the target, number {i * i} of {i + 7}." for i in range(24)]


@cache
def model(seed: int = 0) -> SharedModel:
    return SharedModel(tiny_llama(seed), tiny_tokenizer(), f"tiny {seed}")


def encode(text: str) -> list[int]:
    return tiny_tokenizer()(text, split_special_tokens=True)["input_ids"]


def states(ids) -> np.ndarray:
    """Return the final hidden states of a fresh forward of transformers' own model."""
    with torch.inference_mode():
        out = tiny_llama()(torch.tensor([list(ids)]), output_hidden_states=True)
    return out.hidden_states[-1][0].numpy()
