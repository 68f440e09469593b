"""OpenVINO's graph of a traced step, with attention inserted."""

from __future__ import annotations

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as opset
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from openvino.op import Constant
from transformers import PreTrainedModel

from rasd_integrations.engine.executors.openvino.attention import Attention
from rasd_integrations.engine.executors.openvino.copies import with_copies
from rasd_integrations.engine.executors.openvino.tracing import (
    TracedStep,
    TraceLayout,
    in_float32,
    quiet_trace,
)

_LARGE = 1 << 14  # numbers of a constant that is a weight
_F32 = ov.Type.f32


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


def with_attention(graph: ov.Model, attention: Attention, kind: ov.Type) -> ov.Model:
    """Return ``graph`` with attention inserted.

    Inputs: those of the trace but for ``attended``, then :meth:`Attention.parameters`, then flags (:mod:`.copies`).
    Outputs: logits and hidden states.

    Args:
        graph: Of :func:`traced`; it is changed.
        attention: Of the model.
        kind: Of logits and hidden states.
    """
    _mark_widened(graph)
    layers = attention.trace.layers
    parameters, results = graph.get_parameters(), graph.get_results()
    attended = parameters[len(parameters) - len(layers) :]
    own = attention.parameters()
    for index in range(len(layers)):
        reads = [result.input_value(0) for result in results[2 + 3 * index : 5 + 3 * index]]
        made = attention.output(index, reads, own)
        for target in attended[index].output(0).get_target_inputs():
            target.replace_source_output(made)
    inputs = [*parameters[: -len(attended)], *own]
    edges = ov.preprocess.PrePostProcessor(
        with_copies(ov.Model(results[:2], inputs, "step"), len(attention.widths))
    )
    for output in range(2):
        edges.output(output).tensor().set_element_type(kind)
    return edges.build()


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
