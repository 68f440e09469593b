"""The large weights of a step: its trace leaves them out, and its graph reads them where they lie.

No weight is copied to be traced. What is kept of a trace has the small ones only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as opset
from openvino.op import Constant
from torch import Tensor, nn
from transformers import PreTrainedModel

from rasd_integrations.loading.quantised import (
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedWeight,
)

LARGE = 1 << 14  # numbers of a weight that is left out
_SMALL = 1 << 21  # numbers of a weight whose product is fused with others
_HUGE = 2.0**23
_ACTIVATIONS = {"Swish", "Gelu"}  # as OpenVINO finds them in an MLP


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight and where the model uses it.

    Attributes:
        value: The weight.
        places: Modules that use it, with the name of their parameter; tied weights have several.
    """

    value: Tensor | QuantisedWeight
    places: tuple[tuple[nn.Module, str], ...]


def weights_of(model: PreTrainedModel) -> list[Weight]:
    """Return the model's large weights, each once, in the order of its modules."""
    values: dict[int, Tensor | QuantisedWeight] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        if isinstance(module, (QuantisedLinear, QuantisedEmbedding)):
            values[id(module.quantised)] = module.quantised
            places.setdefault(id(module.quantised), []).append((module, "quantised"))
        for name, weight in module._parameters.items():
            if weight is not None and weight.numel() >= LARGE:
                values[id(weight)] = weight
                places.setdefault(id(weight), []).append((module, name))
    return [Weight(value, tuple(places[key])) for key, value in values.items()]


def zero_weights(weights: Sequence[Weight], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return zeros of the weights' shapes, all in one piece of memory that is never written."""
    sizes = [math.prod(weight.value.shape) for weight in weights]
    room = np.zeros(max(sizes, default=1) * dtype.itemsize, np.uint8)
    zeros = torch.from_numpy(room).view(dtype)  # the system's one page of zeros, many times
    return [
        zeros[:size].view(*weight.value.shape) for weight, size in zip(weights, sizes, strict=True)
    ]


@contextmanager
def given(weights: Sequence[Weight], values: Sequence[Tensor]) -> Iterator[None]:
    """Make the model use ``values`` for its weights inside the block."""
    undo: list[Callable[[], Any]] = []
    for weight, value in zip(weights, values, strict=True):
        for module, name in weight.places:
            if isinstance(module, (QuantisedLinear, QuantisedEmbedding)):
                undo.append(partial(setattr, module, "forward", module.forward))
                module.forward = partial(module.run, weight=value)  # type: ignore[method-assign]
            else:
                table: dict[str, Any] = module._parameters
                undo.append(partial(table.__setitem__, name, table[name]))
                table[name] = value
    try:
        yield
    finally:
        for back in undo:
            back()


def insert(graph: ov.Model, weights: Sequence[Weight], first: int) -> ov.Model:
    """Put ``weights`` in the place of the graph's inputs from ``first`` on; products of one input are fused.

    They are not copied, but for small ones that are fused.
    """
    parameters = graph.get_parameters()
    inputs = parameters[first : first + len(weights)]
    values = {node.get_friendly_name(): w.value for node, w in zip(inputs, weights, strict=True)}
    _fuse(graph, values)
    _keep_apart(graph)
    for node, weight in zip(inputs, weights, strict=True):
        # One constant for each use: a tied weight is looked up by rows in one and multiplied in the other.
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(_constant(weight.value))
    kept = [*parameters[:first], *parameters[first + len(weights) :]]
    return ov.Model(graph.get_results(), kept, graph.get_friendly_name())


def _constant(value: Tensor | QuantisedWeight, *, shared: bool = True) -> ov.Output:
    """Return a weight in float32, of a constant that lies where the weight does."""
    if isinstance(value, QuantisedWeight):
        return _dequantised(value)
    shared = shared and value.is_contiguous()
    kind = ov.Type.f32 if value.dtype == torch.float32 else ov.Type.bf16
    plain = value.detach().contiguous()
    constant = _placed(
        plain if kind == ov.Type.f32 else plain.view(torch.int16), value.shape, kind, shared
    )
    return constant.output(0) if kind == ov.Type.f32 else _marked(constant)


def _dequantised(weight: QuantisedWeight) -> ov.Output:
    """Return ``scale * (code - minimum / scale)``, the one form with a minimum that OpenVINO multiplies unexpanded."""
    coding, (rows, columns) = weight.coding, weight.shape
    by_group = [rows, columns // coding.group, coding.group]
    kind = getattr(ov.Type, coding.kind)
    codes = opset.convert(_placed(weight.codes, by_group, kind, shared=True), "f32")
    scales = weight.scales.float()[..., None]
    if weight.minimums is not None:
        minimums = weight.minimums.float()[..., None]
        # Where the scale is 0 all numbers are -minimum: a tiny scale and a large zero point, exact to 2 ** -19.
        zeros = torch.where(scales == 0, _HUGE * (minimums != 0), minimums / scales)
        scales = torch.where(scales == 0, minimums / _HUGE, scales)
        codes = opset.subtract(codes, opset.constant(zeros.numpy()))
    scaled = opset.multiply(codes, opset.constant(scales.numpy()))
    return opset.reshape(scaled, np.array([rows, columns]), special_zero=False).output(0)


def _placed(value: Tensor, shape: Sequence[int], kind: ov.Type, shared: bool) -> ov.Node:
    """Return a constant; a ``shared`` one does not keep ``value`` alive, as the model does."""
    return Constant(ov.Tensor(value.numpy(), ov.Shape([*shape]), kind), shared_memory=shared)


def _marked(narrow: ov.Node) -> ov.Output:
    """Return narrow weights in float32, marked so that OpenVINO packs them as they are.

    Otherwise it makes all of them wide first. The mark is OpenVINO's own for 16-bit weights.
    """
    wide = opset.convert(narrow, "f32")
    wide.get_rt_info()["decompression_0"] = ""
    return wide.output(0)


def _keep_apart(graph: ov.Model) -> None:
    """Hide from OpenVINO that three products are an MLP, by a reshape that changes nothing.

    Its fused MLP, of CPUs with AMX, keeps two of the three weights a second time, is no faster, and ends the process
    with SIGFPE on a single thread (2026.4.1).
    """
    for node in graph.get_ordered_ops():
        gated = node.input_value(0) if node.get_type_name() == "MatMul" else None
        if gated is None or gated.get_node().get_type_name() != "Multiply":
            continue
        factors = {v.get_node().get_type_name() for v in gated.get_node().input_values()}
        if factors & _ACTIVATIONS:
            rank = gated.get_partial_shape().rank.get_length()
            same = np.array([0] * (rank - 1) + [-1])  # 0 is the size that is there
            node.input(0).replace_source_output(
                opset.reshape(gated, same, special_zero=True).output(0)
            )


def _fuse(graph: ov.Model, values: dict[str, Tensor | QuantisedWeight]) -> None:
    """Fuse products of one input with several small weights (queries, keys, values; gate, up).

    Small products wait for threads longer than they run.
    """
    groups: dict[tuple[str, int], list[ov.Node]] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        how = node.get_attributes()
        value = values.get(node.input_value(1).get_node().get_friendly_name())
        if (
            isinstance(value, Tensor)
            and value.numel() < _SMALL
            and how["transpose_b"]
            and not how["transpose_a"]
        ):
            source = node.input_value(0)
            name = source.get_node().get_friendly_name()
            groups.setdefault((name, source.get_index()), []).append(node)
    for nodes in groups.values():
        if len(nodes) < 2:
            continue
        weights: list[Any] = [
            values[n.input_value(1).get_node().get_friendly_name()] for n in nodes
        ]
        weight = _constant(torch.cat(weights), shared=False)
        product = opset.matmul(nodes[0].input_value(0), weight, False, True)
        parts = opset.variadic_split(product, -1, [len(weight) for weight in weights])
        for index, node in enumerate(nodes):
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(parts.output(index))
