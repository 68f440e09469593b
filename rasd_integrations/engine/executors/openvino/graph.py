"""OpenVINO's graph of a traced step, with OpenVINO's paged attention inserted.

Every key head is a sequence of its own to that attention, so that pages are parts of ``KVBuffer``'s memory, read and
written without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import openvino as ov
import torch
from openvino import opset13 as opset
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from openvino.op import Constant, Parameter, _PagedAttentionExtension
from transformers import PreTrainedModel

from rasd_integrations.engine.executors.openvino.tracing import (
    Layer,
    TracedStep,
    TraceLayout,
    in_float32,
    quiet_trace,
)

PAGE = 32  # rows, fixed by OpenVINO's CPU kernels
SCALE_BYTES = 8  # of a row in 8 bits: scale and zero point
_LARGE = 1 << 14  # numbers of a constant that is a weight
_I32, _F32, _U8 = ov.Type.i32, ov.Type.f32, ov.Type.u8
# Inputs of the operation: prefix lengths, starts of the step's rows, pages and their starts, tree masks and their
# starts (both empty for chains).
_INDICES = (_I32, _I32, _I32, _I32, _U8, _I32)


def lacking(trace: TraceLayout, *, in_8_bits: bool) -> str | None:
    """Return what compiled steps cannot do of this model, if anything, and what to use instead."""
    scorings = [layer.scoring for layer in trace.layers]
    if any(scoring.softcap is not None for scoring in scorings):
        return "caps its scores, which compiled steps cannot. Use executor='eager'."
    if any(scoring.sinks is not None for scoring in scorings):
        # The operation takes one sink a head, and all our key heads are sequences of one head.
        return "has attention sinks, which compiled steps cannot. Use executor='eager'."
    if in_8_bits and any(scoring.window is not None for scoring in scorings):
        return (
            "has layers with a sliding window, some steps of which run eagerly, in 16 bits or more. "
            "Use executor='openvino'."
        )
    return None


def traced(model: PreTrainedModel, trace: TraceLayout) -> ov.Model:
    """Return the graph of a step without its attention, for any width.

    Raises:
        Exception: Whatever the model's own code and the converter raise.
    """
    step = TracedStep(model, trace).eval()
    is_narrow = model.dtype == torch.bfloat16
    with quiet_trace(), in_float32(model), torch.inference_mode():
        some, more = step.examples(3), step.examples(4)
        decoder = TorchScriptPythonDecoder(
            step, example_input=some, trace_kwargs={"check_trace": False}
        )
        graph = ov.convert_model(decoder, example_input=some)
        if len(graph.inputs) != len(some):
            msg = "its trace reads not all of a step."
            raise ValueError(msg)
        graph.reshape(
            {
                index: ov.PartialShape(
                    [m if m == n else -1 for m, n in zip(a.shape, b.shape, strict=True)]
                )
                for index, (a, b) in enumerate(zip(some, more, strict=True))
            }
        )
        _fold(graph)
        _fuse(graph)
        if is_narrow:
            _narrow(graph)
    return graph


def with_attention(
    graph: ov.Model, trace: TraceLayout, kind: ov.Type, *, in_8_bits: bool = False
) -> ov.Model:
    """Return ``graph`` with attention inserted.

    Inputs: those of the trace but for ``attended``, the longest total length, :func:`indices` of each number of key
    heads, keys and values of each layer ``[pages, 1, PAGE, head_dim]``. Outputs: logits and hidden states.

    Args:
        graph: Of :func:`traced`; it is changed.
        trace: Of the model.
        kind: Of keys, values, logits and hidden states.
        in_8_bits: Keys and values are bytes instead, each row after its :data:`SCALE_BYTES`.
    """
    _mark_widened(graph)
    parameters, results = graph.get_parameters(), graph.get_results()
    attended = parameters[len(parameters) - len(trace.layers) :]
    most = Parameter(_I32, ov.PartialShape([]))
    indices = {
        heads: [Parameter(type_, ov.PartialShape([-1])) for type_ in _INDICES]
        for heads in trace.head_counts
    }
    rows, more = (_U8, SCALE_BYTES) if in_8_bits else (kind, 0)
    keys, values = (
        [Parameter(rows, ov.PartialShape([-1, 1, PAGE, size + more])) for size in sizes]
        for sizes in zip(*((layer.key_dim, layer.value_dim) for layer in trace.layers), strict=True)
    )
    for index, layer in enumerate(trace.layers):
        reads = [result.input_value(0) for result in results[2 + 3 * index : 5 + 3 * index]]
        made = _attention(layer, reads, keys[index], values[index], indices[layer.kv_heads], most)
        for target in attended[index].output(0).get_target_inputs():
            target.replace_source_output(made)
    where = chain.from_iterable(indices.values())
    inputs = [*parameters[: -len(attended)], most, *where, *keys, *values]
    edges = ov.preprocess.PrePostProcessor(ov.Model(results[:2], inputs, "step"))
    for output in range(2):
        edges.output(output).tensor().set_element_type(kind)
    return edges.build()


class PageRange(NamedTuple):
    """The rows of one answer in a step.

    Attributes:
        prefix: Tokens before the step.
        rows: Of the step, ``n``.
        first_page: In the memory of a head.
        pages: Number of its pages there.
        sees: ``[n, n]``, True if a row sees a column; ``None`` for a chain.
    """

    prefix: int
    rows: int
    first_page: int
    pages: int
    sees: npt.NDArray[np.bool_] | None = None

    @property
    def end(self) -> int:
        """Tokens with the step's."""
        return self.prefix + self.rows

    @property
    def place(self) -> Place:
        """The part that is the same in steps of this width."""
        return Place(self.rows, self.first_page, self.pages, self.sees is not None)


class Place(NamedTuple):
    """The part of a :class:`PageRange` that does not change from step to step."""

    rows: int
    first_page: int
    pages: int
    is_tree: bool


def indices(heads: int, places: Sequence[Place], pages: int) -> list[npt.NDArray[Any]]:
    """Return the graph's inputs for ``heads`` key heads, head by head; :func:`refresh` fills lengths and masks in.

    Args:
        heads: Key heads.
        places: Of the step's answers, in the order of its rows.
        pages: Of each head.
    """
    mine = np.concatenate([np.arange(p.first_page, p.first_page + p.pages) for p in places])
    blocks = pages * np.arange(heads)[:, None] + mine
    squares = [p.rows**2 for p in places] if any(p.is_tree for p in places) else []
    return [
        np.empty(heads * len(places), np.int32),
        _begins([p.rows for p in places], heads),
        blocks.ravel().astype(np.int32),
        _begins([p.pages for p in places], heads),
        np.empty(heads * sum(squares), np.uint8),
        _begins(squares, heads) if squares else np.empty(0, np.int32),
    ]


def refresh(heads: int, spans: Sequence[PageRange], made: Sequence[npt.NDArray[Any]]) -> None:
    """Update the arrays of `indices` with new prefix lengths and tree masks."""
    made[0].reshape(heads, -1)[:] = [span.prefix for span in spans]
    if any(span.sees is not None for span in spans):
        masks = [np.tri(s.rows, dtype=np.bool_) if s.sees is None else s.sees for s in spans]
        made[4].reshape(heads, -1)[:] = np.concatenate([mask.ravel() for mask in masks])


def _begins(counts: Sequence[int], heads: int) -> npt.NDArray[np.int32]:
    """Return the cumulative sums, from 0, of ``counts`` repeated for each head."""
    return np.asarray([0, *accumulate([*counts] * heads)], np.int32)


def _attention(
    layer: Layer, reads: Sequence[ov.Output], keys: ov.Node, values: ov.Node,
    indices: Sequence[ov.Node], most: ov.Node,
) -> ov.Output:  # fmt: skip
    """Return the output of one layer's attention."""
    past, begins, blocks, block_begins, sees, sees_begins = (node.output(0) for node in indices)
    op = _PagedAttentionExtension(
        [
            *reads, keys.output(0), values.output(0), past, begins, blocks, block_begins,
            _number(layer.scoring.scale, _F32), _number(layer.scoring.window or 0, _I32),
            _nothing(_F32),  # slopes by distance
            most.output(0),
            _nothing(_I32), _nothing(_I32), _nothing(_I32), _nothing(_F32),  # scores out, rotation of pages
            _nothing(_F32), _number(0, _I32), _number(0, _I32),  # sparse attention
            _nothing(_F32, 4),  # sinks
            _number(0, _I32), _nothing(_I32), _nothing(_I32), _nothing(_I32),  # eviction of pages
            _nothing(_I32),  # kinds of tokens
            sees, sees_begins,
        ]
    )  # fmt: skip
    sizes = {"num_k_heads": 1, "num_v_heads": 1} | {
        "k_head_size": layer.key_dim,
        "v_head_size": layer.value_dim,
    }
    for name, size in sizes.items():
        op.get_rt_info()[name] = size
    return op.output(0)


def _number(value: float, kind: ov.Type) -> ov.Output:
    return Constant(kind, ov.Shape([]), [value]).output(0)


def _nothing(kind: ov.Type, rank: int = 1) -> ov.Output:
    return Constant(kind, ov.Shape([0] * rank), []).output(0)


def _fold(graph: ov.Model) -> None:
    """Fold converts of scalar constants; OpenVINO recognises RoPE only with a literal -1."""
    for node in graph.get_ops():
        if node.get_type_name() != "Convert":
            continue
        source = node.input_value(0).get_node()
        if source.get_type_name() == "Constant" and source.get_data().size == 1:
            number = Constant(
                node.get_element_type(),
                source.get_output_shape(0),
                source.get_data().ravel().tolist(),
            )
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(number.output(0))


def _narrow(graph: ov.Model) -> None:
    """Store weights that are bfloat16 numbers as such: half the file, and half the mapped memory."""
    for node in graph.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != _F32:
            continue
        bits = node.get_data().view(np.uint32)
        if bits.size < _LARGE or np.any(bits & 0xFFFF):
            continue
        narrow = ov.Tensor(ov.Type.bf16, ov.Shape(bits.shape))
        narrow.data[...] = (bits >> 16).astype(np.uint16).view(narrow.data.dtype)
        wide = opset.convert(Constant(narrow), "f32")
        node.output(0).replace(wide.output(0))


def _mark_widened(graph: ov.Model) -> None:
    """Have OpenVINO pack narrow weights as they are; otherwise it makes all of them wide first.

    The mark is OpenVINO's own for 16-bit weights, which a file of a graph made in Python does not keep.
    """
    for node in graph.get_ops():
        if node.get_type_name() == "Convert" and node.get_element_type() == _F32:
            source = node.input_value(0).get_node()
            if source.get_type_name() == "Constant" and source.get_element_type() == ov.Type.bf16:
                node.get_rt_info()["decompression_0"] = ""


def _fuse(graph: ov.Model) -> None:
    """Fuse products of one input with several weights (queries, keys, values; gate, up).

    Small products wait for threads longer than they run.
    """
    groups: dict[tuple[str, int], list[ov.Node]] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        how = node.get_attributes()
        weight = node.input_value(1).get_node()
        if weight.get_type_name() == "Constant" and how["transpose_b"] and not how["transpose_a"]:
            source = node.input_value(0)
            name = source.get_node().get_friendly_name()
            groups.setdefault((name, source.get_index()), []).append(node)
    for nodes in groups.values():
        if len(nodes) < 2:
            continue
        weights = [node.input_value(1).get_node().get_data() for node in nodes]
        weight = opset.constant(np.concatenate(weights), shared_memory=False)
        product = opset.matmul(nodes[0].input_value(0), weight, False, True)
        parts = opset.variadic_split(product, -1, [len(weight) for weight in weights])
        for index, node in enumerate(nodes):
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(parts.output(index))
