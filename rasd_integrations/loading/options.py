"""Normalises ``model_kwargs`` and refuses what ``from_pretrained`` would not honour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rasd_integrations.errors import ConfigurationError

# Steps use our own attention; outside of them the model runs with one of these anyway.
_ATTENTION = (None, "sdpa", "rasd")
_OURS = ("output_loading_info", "gguf_file", "return_dict")


def load_options(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with ``dtype`` as a torch type or ``"auto"``; default bfloat16.

    Raises:
        ConfigurationError: ``dtype`` and ``torch_dtype`` differ, a value is unknown, or an option cannot be
            honoured.
    """
    options = dict(model_kwargs)
    old = options.pop("torch_dtype", None)
    asked = options.get("dtype")
    if old is not None and asked is not None and _dtype(old) != _dtype(asked):
        msg = f"model_kwargs have dtype={asked!r} and torch_dtype={old!r}, two names of one option. Leave one out."
        raise ConfigurationError(msg)
    options["dtype"] = _dtype(old if asked is None else asked)
    if options.get("attn_implementation") not in _ATTENTION:
        msg = (
            f"model_kwargs have attn_implementation={options['attn_implementation']!r}, but steps run through the "
            f"engine's own attention. Leave it out; executor= says what runs steps."
        )
        raise ConfigurationError(msg)
    options.pop("attn_implementation", None)
    for name in _OURS:
        if name in options:
            msg = f"model_kwargs have {name}={options[name]!r}, which the engine sets itself. Leave it out."
            raise ConfigurationError(msg)
    return options


def _dtype(value: object) -> torch.dtype | str:
    if value is None:
        return torch.bfloat16
    if isinstance(value, torch.dtype):
        return value
    if isinstance(value, str) and value == "auto":
        return value
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    if isinstance(found, torch.dtype):
        return found
    msg = (
        f"dtype in model_kwargs is {value!r}, which is no type of torch. Use torch.bfloat16, 'float32', 'float16' or "
        f"'auto' (the checkpoint's own)."
    )
    raise ConfigurationError(msg)
