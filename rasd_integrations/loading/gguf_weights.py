"""The tensors of a GGUF file by the names of transformers, in their blocks where a module can hold them.

Blocks become codes, scales and minimums with the same values, bit for bit. Layouts: gguf-py's ``quants.py``, which
follows llama.cpp's ``ggml-common.h``. Grids of the 1- to 3-bit "IQ" types and ternary and floating-point blocks have no
such form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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

from rasd_integrations.loading.quantised import Coding, QuantisedWeight, packed
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


_PART = 1 << 16  # blocks that are read at once
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_Parts = tuple[Tensor, Tensor, Tensor | None]  # codes, scales, minimums: [blocks, ...]


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of block: ``length`` numbers in ``nbytes``, as codes of ``coding``."""

    length: int
    nbytes: int
    coding: Coding
    read: Callable[[Tensor], _Parts]


def read_blocks(raw: Tensor, block: BlockType, rows: int) -> QuantisedWeight:
    """Return the weight of ``rows`` rows whose blocks are the bytes ``raw``."""
    blocks = raw.reshape(-1, block.nbytes)
    parts = [block.read(part) for part in blocks.split(_PART)]
    codes = torch.cat([packed(codes, block.coding.kind) for codes, _, _ in parts])
    scales = torch.cat([scales for _, scales, _ in parts])
    minimums = (
        torch.cat([m for _, _, m in parts if m is not None]) if parts[0][2] is not None else None
    )
    return QuantisedWeight(
        block.coding,
        codes.reshape(rows, -1),
        scales.reshape(rows, -1),
        None if minimums is None else minimums.reshape(rows, -1),
    )


def _half(blocks: Tensor, start: int) -> Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(data: Tensor, bits: int, width: int) -> Tensor:
    """Return the fields of ``bits`` bits: of each ``width`` bytes all lowest fields first, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return ((data.reshape(len(data), -1, 1, width) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _nibbles(blocks: Tensor, start: int) -> Tensor:
    return _fields(blocks[:, start : start + 16], 4, 16)


def _fives(blocks: Tensor, start: int) -> Tensor:
    """Return 32 numbers of 5 bits: their highest bits in 4 bytes, then nibbles."""
    high = (blocks[:, start : start + 4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return _nibbles(blocks, start + 4) | (high.flatten(1) << 4)


def _q4_0(b: Tensor) -> _Parts:
    return _nibbles(b, 2) ^ 8, _half(b, 0), None


def _q4_1(b: Tensor) -> _Parts:
    return _nibbles(b, 4), _half(b, 0), -_half(b, 2)


def _q5_0(b: Tensor) -> _Parts:
    return _fives(b, 2).view(torch.int8) - 16, _half(b, 0), None


def _q5_1(b: Tensor) -> _Parts:
    return _fives(b, 4), _half(b, 0), -_half(b, 2)


def _q8_0(b: Tensor) -> _Parts:
    return b[:, 2:34].contiguous(), _half(b, 0), None


def _iq4_nl(b: Tensor) -> _Parts:
    return _levels(_nibbles(b, 2)), _half(b, 0), None


def _levels(nibbles: Tensor) -> Tensor:
    return torch.tensor(_IQ4, dtype=torch.int8)[nibbles.int()]


def _iq4_xs(b: Tensor) -> _Parts:
    high = b[:, 2:4].contiguous().view(torch.int16).int()[:, :, None] >> torch.arange(0, 16, 2)
    low = (b[:, 4:8, None] >> torch.tensor([0, 4], dtype=torch.uint8)) & 15
    scales = (low.flatten(1).int() | ((high.flatten(1) & 3) << 4)) - 32
    return _levels(_fields(b[:, 8:136], 4, 16)), _half(b, 0) * scales.float(), None


def _q2_k(b: Tensor) -> _Parts:
    scales, minimums = b[:, :16] & 15, b[:, :16] >> 4
    return _fields(b[:, 16:80], 2, 32), _half(b, 80) * scales, _half(b, 82) * minimums


def _q3_k(b: Tensor) -> _Parts:
    low = _fields(b[:, 96:104], 4, 8)
    scales = low | (_fields(b[:, 104:108], 2, 4) << 4)
    high = _fields(b[:, :32], 1, 32)
    codes = _fields(b[:, 32:96], 2, 32).view(torch.int8) - ((high ^ 1) << 2).view(torch.int8)
    return codes, _half(b, 108) * (scales.view(torch.int8) - 32).float(), None


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Return eight scales and eight minimums, six bits each in 12 bytes, in float32."""
    d, m, both = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([d & 63, (both & 15) | ((d >> 2) & 48)], 1)
    minimums = torch.cat([m & 63, (both >> 4) | ((m >> 2) & 48)], 1)
    return _half(b, 0) * scales, _half(b, 2) * minimums


def _q4_k(b: Tensor) -> _Parts:
    return _fields(b[:, 16:144], 4, 32), *_k_scales(b)


def _q5_k(b: Tensor) -> _Parts:
    high = _fields(b[:, 16:48], 1, 32)
    return _fields(b[:, 48:176], 4, 32) | (high << 4), *_k_scales(b)


def _q6_k(b: Tensor) -> _Parts:
    codes = _fields(b[:, :128], 4, 64) | (_fields(b[:, 128:192], 2, 32) << 4)
    scales = b[:, 192:208].contiguous().view(torch.int8)
    return codes.view(torch.int8) - 32, _half(b, 208) * scales, None


BLOCKS = {
    "Q4_0": BlockType(32, 18, Coding("i4", 32, has_minimum=False), _q4_0),
    "Q4_1": BlockType(32, 20, Coding("u4", 32, has_minimum=True), _q4_1),
    "Q5_0": BlockType(32, 22, Coding("i8", 32, has_minimum=False), _q5_0),
    "Q5_1": BlockType(32, 24, Coding("u8", 32, has_minimum=True), _q5_1),
    "Q8_0": BlockType(32, 34, Coding("i8", 32, has_minimum=False), _q8_0),
    "Q2_K": BlockType(256, 84, Coding("u4", 16, has_minimum=True), _q2_k),
    "Q3_K": BlockType(256, 110, Coding("i4", 16, has_minimum=False), _q3_k),
    "Q4_K": BlockType(256, 144, Coding("u4", 32, has_minimum=True), _q4_k),
    "Q5_K": BlockType(256, 176, Coding("u8", 32, has_minimum=True), _q5_k),
    "Q6_K": BlockType(256, 210, Coding("i8", 16, has_minimum=False), _q6_k),
    "IQ4_NL": BlockType(32, 18, Coding("i8", 32, has_minimum=False), _iq4_nl),
    "IQ4_XS": BlockType(256, 136, Coding("i8", 32, has_minimum=False), _iq4_xs),
}
