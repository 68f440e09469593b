"""OpenVINO's graph of a traced step, with weights and attention inserted."""

from __future__ import annotations

from collections.abc import Sequence

import openvino as ov
import torch
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
from rasd_integrations.engine.executors.openvino.weights import Weight, insert


def traced(model: PreTrainedModel, trace: TraceLayout, weights: Sequence[Weight]) -> ov.Model:
    """Return the graph of a step without its attention and large ``weights``, for any width.

    Raises:
        Exception: Whatever the model's own code and the converter raise.
    """
    step = TracedStep(model, trace, weights).eval()
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
    return graph


def whole(
    graph: ov.Model, weights: Sequence[Weight], attention: Attention, kind: ov.Type
) -> ov.Model:
    """Return ``graph`` with weights and attention inserted.

    Inputs: those of the trace but for ``attended``, then :meth:`Attention.parameters`, then flags (:mod:`.copies`).
    Outputs: logits and hidden states.

    Args:
        graph: Of :func:`traced`; it is changed.
        weights: Of the model.
        attention: Of the model.
        kind: Of logits and hidden states.
    """
    layers = attention.trace.layers
    graph = insert(graph, weights, len(graph.inputs) - len(layers) - len(weights))
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
