"""Loads models and tokenizers from a hub id, a folder or a GGUF file."""

from __future__ import annotations

from rasd_integrations.loading.model import (
    LoadedModel,
    check_device,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    load_window,
)
from rasd_integrations.loading.packaged import packaged_model

__all__ = [
    "LoadedModel",
    "check_device",
    "load_config",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
    "load_window",
    "packaged_model",
]
