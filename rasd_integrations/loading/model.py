"""Loads a model and its tokenizer from a hub id, a folder or a GGUF file."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rasd_integrations.errors import (
    ConfigurationError,
    DeviceMemoryError,
    MissingDependencyError,
    ModelLoadError,
    advice,
)
from rasd_integrations.loading.gguf import LOADING, model_folder, tokenizer_folder
from rasd_integrations.loading.options import load_options
from rasd_integrations.loading.progress import transformers_stage
from rasd_integrations.loading.rounding import WeightsAs, rounded_model

# fmt: off
_HUB_KWARGS = ("revision", "trust_remote_code", "cache_dir", "token", "local_files_only", "subfolder")
_USUAL_KWARGS = (*_HUB_KWARGS, "attn_implementation", "device_map", "dtype", "quantization_config")
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8": 8, "q6": 7, "q5": 6}  # a weight, by the name of a .gguf file
PLACEMENT = {"device_map", "tp_plan", "device_mesh"}  # options that decide device placement
# fmt: on


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode, its tokenizer, and the name they were loaded from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    name: str | Path,
    model_kwargs: Mapping[str, Any] | None = None,
    device: str | None = None,
    cache_dir: str | Path | None = None,
    weights: WeightsAs = "dense",
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: Hub id, local folder, or path of a ``.gguf`` file (dequantised once, then cached).
        model_kwargs: Passed to ``from_pretrained``; ``dtype`` defaults to bfloat16.
        device: Overrides ``device_map`` and ``tp_plan``; default the CUDA device, if there is one.
        cache_dir: Where conversions are kept, here and below; default the user's cache folder.
        weights: ``"dense"``, ``"kept"`` (the blocks of a GGUF file), ``"int8"`` or ``"int4"``; all but the first for
            a CPU. Rounded weights are kept in ``cache_dir``.

    Raises:
        ConfigurationError: There is no such device, or ``model_kwargs`` or ``weights`` cannot be honoured.
        ModelLoadError: Names what is missing or broken, and the next step.
        DeviceMemoryError: The weights do not fit.
        MissingDependencyError: A GGUF file needs the extra ``gguf``.
    """
    check_device(device)
    options = load_options(model_kwargs or {})
    if device is not None:
        options = {key: value for key, value in options.items() if key not in PLACEMENT}
    if weights != "dense":
        _check_quantised(name, weights, options, device)
    tokenizer = load_tokenizer(name, options, cache_dir)
    keeps_blocks = weights == "kept"
    with (
        LOADING,
        _explained(name),
        _weights(name, options, cache_dir, keeps_blocks=keeps_blocks) as (source, where),
    ):
        _check_causal(name, AutoConfig.from_pretrained(source, **where))
        # The progress of a GGUF file was shown while it was converted.
        with transformers_stage(None if _is_gguf(_source(name)) else f"Reading {name}"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, **{**options, **where, "output_loading_info": True}
            )
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            msg = (
                f"The weights of {str(name)!r} lack {missing[0]} and {len(missing) - 1} more of a "
                f"{type(model).__name__}. Use a complete checkpoint of a causal language model."
            )
            raise ModelLoadError(msg)
        if weights in ("int8", "int4"):
            if getattr(model, "hf_quantizer", None) is not None:
                msg = f"weights is {weights!r}, but {str(name)!r} is quantised already. Use weights='dense'."
                raise ConfigurationError(msg)
            trusts = bool(options.get("trust_remote_code"))
            model = rounded_model(model, int(weights[3:]), cache_dir, str(name), trusts=trusts)
        if _is_gguf(_source(name)):
            model.name_or_path = str(name)  # not the folder of the conversion
        placed = (
            bool(options.keys() & PLACEMENT) or getattr(model, "hf_quantizer", None) is not None
        )
        if device is not None:
            model.to(device)
        elif not placed and torch.cuda.is_available():
            model.to("cuda")
    return LoadedModel(model.eval().requires_grad_(requires_grad=False), tokenizer, str(name))


def check_device(device: str | None) -> None:
    """Raise ``ConfigurationError`` if torch has no such ``device``; ``None`` is none in particular."""
    if device is None:
        return
    accelerator, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        asked = None
    here = 1 if asked is None or asked.type == "cpu" else count
    if asked is None or asked.type not in kinds or (asked.index or 0) >= here:
        names = ["cpu", *(f"{kind}:{i}" for kind in kinds[1:] for i in range(count))]
        msg = f"drafter_device is {device!r}, but torch has here: {', '.join(names)}. Use one of them."
        raise ConfigurationError(msg)


def load_tokenizer(
    name: str | Path,
    model_kwargs: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer without its weights.

    Raises:
        ModelLoadError: It is missing or broken.
        MissingDependencyError: A GGUF file needs the extra ``gguf``.
    """
    with _explained(name, "tokenizer"):
        source = _source(name)
        where = _hub_kwargs(source, model_kwargs or {})
        is_gguf = _is_gguf(source)
        opened = (
            tokenizer_folder(Path(source), cache_dir) if is_gguf else contextlib.nullcontext(source)
        )
        with opened as folder:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **where)
    return tokenizer


def load_config(
    name: str | Path,
    model_kwargs: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> PretrainedConfig:
    """Load a model's config without its weights; a GGUF file is dequantised if it was not yet.

    Raises:
        ModelLoadError: It is missing or broken.
        MissingDependencyError: A GGUF file needs the extra ``gguf``.
    """
    with _explained(name), _weights(name, model_kwargs or {}, cache_dir) as (source, where):
        config: PretrainedConfig = AutoConfig.from_pretrained(source, **where)
    return config


def load_window(
    name: str | Path,
    model_kwargs: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> int:
    """Return the longest sequence that a model reads, in tokens, from its config.

    Raises:
        ModelLoadError: The config is missing or broken, or names no window.
        MissingDependencyError: A GGUF file needs the extra ``gguf``.
    """
    config = load_config(name, model_kwargs, cache_dir).get_text_config()
    window = getattr(config, "max_position_embeddings", None)
    if not isinstance(window, int):
        msg = (
            f"The config of {str(name)!r} names no max_position_embeddings, so its window is not known. "
            f"Add the field to its config.json."
        )
        raise ModelLoadError(msg)
    return window


def load_generation_config(
    name: str | Path,
    model_kwargs: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> GenerationConfig | None:
    """Return the checkpoint's generation config without its weights; ``None`` if it has none.

    Raises:
        ModelLoadError: The model is missing, or the file is broken.
        MissingDependencyError: A GGUF file needs the extra ``gguf``.
    """
    with _explained(name), _weights(name, model_kwargs or {}, cache_dir) as (source, where):
        try:
            return GenerationConfig.from_pretrained(source, **where)
        except OSError:  # no such file: the model itself was found
            return None


def gguf_file(name: str | Path) -> Path | None:
    """Return the path of the GGUF file that ``name`` names.

    Raises:
        ModelLoadError: There is no such file or folder.
    """
    source = _source(name)
    return Path(source) if _is_gguf(source) else None


def least_bytes(name: str | Path) -> dict[str, int]:
    """Return the least memory that each form of a local model's weights takes, in bytes; nothing of a hub id.

    Weights of a folder are taken for 16 bits once loaded, those of a ``.gguf`` file for what its name says, else 5.
    """
    source = Path(_source(name))
    if not source.exists():
        return {}
    if not _is_gguf(str(source)):
        dense = sum(file.stat().st_size for file in source.glob("model*.safetensors"))
        if '"float32"' in (source / "config.json").read_text(encoding="utf-8"):
            dense //= 2
        return {"dense": dense, "int8": dense // 2, "int4": dense // 4}
    size = source.stat().st_size
    bits = next((bits for word, bits in _BITS.items() if word in source.name.lower()), 5)
    dense = size * 16 // bits
    return {"dense": dense, "kept": size, "int8": dense // 2, "int4": dense // 4}


def _check_quantised(
    name: str | Path, weights: WeightsAs, options: Mapping[str, Any], device: str | None
) -> None:
    """Raise unless this model's weights can be quantised as asked, on a CPU."""
    if weights == "kept" and gguf_file(name) is None:
        msg = (
            f"weights is 'kept', but {str(name)!r} is no GGUF file. Use 'int8', 'int4' or 'dense'."
        )
        raise ConfigurationError(msg)
    placed = device not in (None, "cpu") or (device is None and torch.cuda.is_available())
    if placed or options.keys() & PLACEMENT or "quantization_config" in options:
        msg = (
            f"weights is {weights!r}, which is for a CPU, but the model is placed elsewhere or quantised by "
            f"model_kwargs. Leave weights out, and give model_kwargs={{'quantization_config': ...}} for a GPU."
        )
        raise ConfigurationError(msg)


@contextlib.contextmanager
def _weights(
    name: str | Path,
    options: Mapping[str, Any],
    cache_dir: str | Path | None,
    *,
    keeps_blocks: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the source of config and weights, and the options that locate it."""
    source = _source(name)
    where = _hub_kwargs(source, options)
    if _is_gguf(source):
        dtype = load_options(options)["dtype"]
        with model_folder(Path(source), dtype, cache_dir, keeps_blocks=keeps_blocks) as folder:
            yield str(folder), where
    else:
        yield source, where


def _source(name: str | Path) -> str:
    """Return the path of a folder or a GGUF file, or a hub id."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return str(files[0])
        found = f"{len(files)} .gguf files" if files else "no .gguf file"
        msg = (
            f"The folder {path} has no config.json and {found}. Give the folder that save_pretrained "
            f"wrote, or the path of one .gguf file."
        )
        raise ModelLoadError(msg)
    if path.exists():
        msg = f"{path} is neither a folder nor a .gguf file. Give a model folder or a .gguf file."
        raise ModelLoadError(msg)
    text = str(name)
    if isinstance(name, Path) or path.suffix == ".gguf" or text.count("/") > 1 or text[:1] in "./~":
        msg = f"There is no file or folder {path}. Check the path, or give a hub id such as 'Qwen/Qwen3-8B'."
        raise ModelLoadError(msg)
    return text


def _is_gguf(source: str) -> bool:
    return source.endswith(".gguf")


def _hub_kwargs(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    where = {key: options[key] for key in _HUB_KWARGS if key in options}
    if Path(source).exists():
        where["local_files_only"] = True  # never look up local files on the network
    return where


def _check_causal(name: str | Path, config: PretrainedConfig) -> None:
    """Raise if the model is not causal, although transformers would load it as such."""
    declared = config.architectures or ()
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if declared and known.isdisjoint(declared) and not getattr(config, "auto_map", None):
        msg = (
            f"{str(name)!r} is a {declared[0]}, not a causal language model. Use a model whose config.json "
            f"names one under 'architectures', such as LlamaForCausalLM."
        )
        raise ModelLoadError(msg)


@contextlib.contextmanager
def _explained(name: str | Path, part: str = "model") -> Iterator[None]:
    """Wrap any loading error in ``ModelLoadError`` or a sibling, with advice."""
    try:
        yield
    except (ModelLoadError, MissingDependencyError, DeviceMemoryError, ConfigurationError):
        raise
    except torch.OutOfMemoryError as err:
        msg = (
            f"The weights of {str(name)!r} do not fit in the device's memory: {_first_line(err)} Use a "
            f"smaller or quantised model, or model_kwargs={{'device_map': 'auto'}}."
        )
        raise DeviceMemoryError(msg) from err
    except TypeError as err:
        if (unknown := re.search(r"unexpected keyword argument '(\w+)'", str(err))) is None:
            raise ModelLoadError(_not_loaded(name, part, err)) from err
        msg = f"model_kwargs has {unknown[1]!r}, which this model does not take. {advice(unknown[1], _USUAL_KWARGS)}"
        raise ConfigurationError(msg) from err
    except Exception as err:  # broken files raise nearly anything: struct, safetensors, json, ...
        raise ModelLoadError(_not_loaded(name, part, err)) from err


def _not_loaded(name: str | Path, part: str, err: Exception) -> str:
    return f"Cannot load the {part} of {str(name)!r}: {_first_line(err)} {_next_step(name, part)}"


def _first_line(err: Exception) -> str:
    text = str(err).strip()
    line = text.splitlines()[0] if text else type(err).__name__
    return line if line.endswith((".", "!")) else f"{line}."


def _next_step(name: str | Path, part: str) -> str:
    if Path(name).expanduser().exists():
        if part == "tokenizer":
            return "Check that its folder has a whole tokenizer.json and tokenizer_config.json."
        return "Check that its files are whole, and that it is a causal language model."
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no"):
        return (
            "HF_HUB_OFFLINE is set and it is not among the downloaded models: download it first, "
            "or give the path of a folder or a .gguf file."
        )
    return "Check the id and the connection, or give the path of a folder or a .gguf file."
