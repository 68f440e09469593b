"""Converts GGUF files, once, to cached folders that transformers loads directly."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rasd_integrations.errors import MissingDependencyError
from rasd_integrations.loading.progress import transformers_stage
from rasd_integrations.loading.quantiser import write_quantised
from rasd_integrations.loading.turns import turn_end_ids
from rasd_integrations.storage.cache_folder import cache_folder, file_digest, is_whole, title_of
from rasd_integrations.storage.marked import made_folder

if TYPE_CHECKING:
    from rasd_integrations.loading.gguf_weights import GgufWeights

logger = logging.getLogger(__name__)

# To be raised when the conversion changes, so that older results are not read.
_CONVERTER = 1
# transformers changes torch's initialisers and default device while it loads: one model at a time.
LOADING = threading.RLock()
_TEXT_END = "<|endoftext|>"
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}


@contextlib.contextmanager
def tokenizer_folder(path: Path, cache_dir: str | Path | None = None) -> Iterator[Path]:
    """Yield a folder with the tokenizer of the GGUF file ``path``, kept in ``cache_dir``.

    Raises:
        MissingDependencyError: The extra ``gguf`` is not installed.
    """
    with _folder(path, "tokenizer", lambda: _read_tokenizer(path), cache_dir) as folder:
        yield folder


@contextlib.contextmanager
def model_folder(
    path: Path, dtype: object, cache_dir: str | Path | None = None, *, keeps_blocks: bool = False
) -> Iterator[Path]:
    """Yield a folder with the config and the weights of the GGUF file ``path``, kept in ``cache_dir``.

    Dense weights are float32 or float16 if ``dtype`` asks for that, else bfloat16.

    Args:
        path: The file.
        dtype: Of dense weights.
        cache_dir: Where the folder is; default the user's cache folder.
        keeps_blocks: Keep weights in the file's own blocks, where a module can hold them.

    Raises:
        MissingDependencyError: The extra ``gguf`` is not installed.
    """
    name = str(dtype).removeprefix("torch.")
    kind = name if name in _DTYPES else "bfloat16"
    make = _dequantise
    if keeps_blocks:
        make, kind = _in_blocks, f"{kind}-blocks"
    dense = _DTYPES[kind.removesuffix("-blocks")]
    with _folder(path, kind, lambda: make(path, dense, cache_dir), cache_dir) as folder:
        yield folder


@contextlib.contextmanager
def _folder(
    path: Path, kind: str, make: Callable[[], Any], cache_dir: str | Path | None
) -> Iterator[Path]:
    """Yield the cached conversion of a file, found by the digest of its content."""
    with contextlib.ExitStack() as stack:
        with LOADING:
            name = f"{file_digest(path, cache_dir)[:32]}-{_CONVERTER}-{kind}"
            folder = cache_folder("models", cache_dir) / name
            if not is_whole(folder):
                what = None if kind == "tokenizer" else f"Converting {path.name}, once"
                with transformers_stage(what):
                    folder = _made(path, folder, make, stack)
        yield folder


def _made(path: Path, folder: Path, make: Callable[[], Any], stack: contextlib.ExitStack) -> Path:
    """Make and save a conversion."""
    made = make()
    parameters = made.parameters() if isinstance(made, torch.nn.Module) else ()
    nbytes = sum(weight.nbytes for weight in parameters)
    if isinstance(made, _Blocks):
        nbytes = 2 * path.stat().st_size  # codes of 5 and 6 bits take 8
    return written(folder, made.save_pretrained, str(path), nbytes, stack)


def written(
    folder: Path, write: Callable[[Path], Any], name: str, nbytes: int, stack: contextlib.ExitStack
) -> Path:
    """Return ``folder``, filled by ``write``; a temporary one if the cache cannot be written.

    Args:
        folder: In the cache.
        write: Fills an empty folder.
        name: Of the model.
        nbytes: What it will take.
        stack: Removes a temporary folder.
    """
    try:
        with made_folder(folder, "models", title_of(name), nbytes) as new:
            write(new)
    except Exception as err:  # noqa: BLE001 -- tokenizers raises a plain Exception if the disk is full
        warnings.warn(
            f"Cannot write to {folder.parent} ({err}), so {Path(name).name} is converted again each time. "
            f"Set cache_dir or RASD_CACHE to a folder with space that is writable.",
            RuntimeWarning,
            stacklevel=2,
        )
        temporary = tempfile.TemporaryDirectory(prefix="rasd-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        write(folder)
    return folder


def _read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    _check_dependencies()
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True
    )
    _split_digits(tokenizer)
    return tokenizer


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Split digits if no token of a byte-level vocabulary has two in a row.

    transformers reads such a file (SmolLM, StarCoder) with GPT-2's pattern, which joins a space and
    digits; the vocabulary was learned from text split at each digit.
    """
    backend: Any = tokenizer.backend_tokenizer
    plain = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    if plain and not any(re.search(r"[0-9Ġ][0-9]", token) for token in tokenizer.get_vocab()):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def _dequantise(path: Path, dtype: torch.dtype, cache_dir: str | Path | None) -> Any:
    _check_dependencies()
    from transformers import GgufConfig

    logger.info("dequantising %s, once", path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    # The weights are dense now; a folder that says otherwise would be read as a GGUF file.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _name_ends(model, path, cache_dir)
    return model


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A model without memory, and the tensors of its file."""

    model: PreTrainedModel
    weights: GgufWeights
    dtype: torch.dtype

    def save_pretrained(self, folder: Path) -> None:
        """Write the folder, a few tensors at a time."""
        tensors, tied = self.weights.tensors(self.dtype), self.weights.tied
        model = self.model
        write_quantised(folder, model.config, model.generation_config, tensors, tied)


def _in_blocks(path: Path, dtype: torch.dtype, cache_dir: str | Path | None) -> Any:
    """Return what writes the file's own blocks; the dense model if none can be kept."""
    _check_dependencies()
    from rasd_integrations.loading.gguf_weights import GgufWeights, read_once  # an extra

    with read_once():
        config = AutoConfig.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        try:
            weights = GgufWeights(path, model)
            why = "" if weights.num_kept else "no module can hold its blocks"
        except Exception as err:  # noqa: BLE001 -- a family that transformers reads in another way raises anything
            why = str(err) or type(err).__name__
    if why:
        logger.warning("%s is converted to dense weights: %s", path.name, why)
        return _dequantise(path, dtype, cache_dir)
    _name_ends(model, path, cache_dir)
    return _Blocks(model, weights, dtype)


def _name_ends(model: Any, path: Path, cache_dir: str | Path | None) -> None:
    with tokenizer_folder(path, cache_dir) as folder:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    ends = _end_ids(tokenizer)
    model.generation_config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # A GGUF file names one end token; chat models end a turn and a plain text by different ones.
    ids = set(turn_end_ids(tokenizer, str(tokenizer.chat_template or "")))
    if (end := tokenizer.get_vocab().get(_TEXT_END)) is not None:
        ids.add(end)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def _check_dependencies() -> None:
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(module, "gguf")
