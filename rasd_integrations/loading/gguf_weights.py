"""The tensors of a GGUF file by the names of transformers, in their blocks where a module can hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from rasd_integrations.loading.gguf_blocks import BLOCKS, read_blocks
from rasd_integrations.loading.quantised import QuantisedWeight
from rasd_integrations.loading.quantiser import can_replace


class UnknownLayoutError(ValueError):
    """transformers rearranges this file's tensors in a way that is not known here."""


@contextmanager
def read_once() -> Iterator[None]:
    """Have transformers and gguf parse a file once inside the block.

    Parsing 150,000 tokens takes seconds, and transformers does it for each of config, tokenizer and weights; so does
    making the table of names, for each module.
    """
    library: Any = gguf
    reader, name_map = library.GGUFReader, library.get_tensor_name_map
    library.GGUFReader, library.get_tensor_name_map = cache(reader), cache(name_map)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = reader, name_map


class GgufWeights:
    """The tensors of a file for a model.

    Attributes:
        tied: The module that shares the input embedding's weight, if that stays quantised.
        num_kept: Tensors that stay in their blocks.
    """

    def __init__(self, path: Path, model: PreTrainedModel) -> None:
        """Plan how the tensors of ``path`` fill ``model``, which may have no memory.

        Raises:
            UnknownLayoutError: Some tensor becomes several, or a part of one.
            Exception: Whatever transformers raises for a family that it does not read.
        """
        self._reader = gguf.GGUFReader(str(path))
        field = self._reader.fields["general.architecture"]
        family = str(bytes(field.parts[field.data[0]]), "utf-8")
        processor: Any = TENSOR_PROCESSORS.get(family, TensorProcessor)
        self._processor = processor(config=model.config.to_dict())
        self._names = get_gguf_hf_weights_map(model, self._processor)
        self._modules = dict(model.named_modules())
        self._orders: Mapping[str, Tensor] = {
            tensor.name: order
            for tensor in self._reader.tensors
            if (order := self._order(tensor)) is not None
        }
        self.num_kept = len(self._orders)
        embedding = model.get_input_embeddings()
        inputs = {name for name, module in self._modules.items() if module is embedding}
        stays = any(self._names[name].removesuffix(".weight") in inputs for name in self._orders)
        head = model.get_output_embeddings()
        heads = [name for name, module in self._modules.items() if module is head]
        self.tied = heads[0] if stays and model.config.tie_word_embeddings else None

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor | QuantisedWeight]]:
        """Yield each tensor, dense ones in ``dtype``."""
        named = [tensor for tensor in self._reader.tensors if tensor.name in self._names]
        with ThreadPoolExecutor(2) as pool:  # not more: each holds a tensor
            for first in range(0, len(named), 2):
                yield from pool.map(partial(self._read, dtype=dtype), named[first : first + 2])

    def _read(self, tensor: Any, dtype: torch.dtype) -> tuple[str, Tensor | QuantisedWeight]:
        name, order = self._names[tensor.name], self._orders.get(tensor.name)
        if order is None:
            dense = self._processed(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
            return name, torch.from_numpy(np.copy(dense)).to(dtype)
        raw = torch.from_numpy(np.copy(tensor.data)).view(torch.uint8)
        weight = read_blocks(raw, BLOCKS[tensor.tensor_type.name], len(order))
        moves = not torch.equal(order, torch.arange(len(order)))
        return name.removesuffix(".weight"), weight.rows(order) if moves else weight

    def _order(self, tensor: Any) -> Tensor | None:
        """Return the order of the rows in the model if they stay in their blocks."""
        name = self._names.get(tensor.name, "")
        module = self._modules.get(name.removesuffix(".weight"))
        if not name.endswith(".weight") or module is None or tensor.tensor_type.name not in BLOCKS:
            return None
        rows, columns = reversed(tensor.shape.tolist())
        whole = isinstance(module, (nn.Linear, nn.Embedding)) and can_replace(module)
        if not whole or tuple(module.weight.shape) != (rows, columns):
            return None
        numbered = self._processed(tensor.name, np.arange(rows, dtype=np.float64)[:, None])
        order = torch.from_numpy(numbered.reshape(-1).astype(np.int64))
        is_order = torch.equal(order.sort().values, torch.arange(rows))
        return order if is_order else None

    def _processed(self, name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        done = self._processor.process(
            weights=values,
            name=name,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": {}},
        )
        if done.name != name:
            msg = f"{name} becomes several tensors"
            raise UnknownLayoutError(msg)
        weights: np.ndarray[Any, Any] = done.weights
        return weights
