"""Steps on a CPU as one compiled graph, run by OpenVINO (extra ``openvino``).

Eager torch spends a good part of a step between operations; a graph of the same module does not. It reads the
keys and values where they lie, in :class:`.kv.KVBuffer`'s own memory, with what is behind the prefix masked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rasd_integrations.engine.attention import Segment, StepContext
from rasd_integrations.engine.executor import EagerExecutor, Executor, StepOutput
from rasd_integrations.engine.kv import KVBuffer, Layout
from rasd_integrations.engine.tracing import Plan, TracedStep, in_float32, plan_of, quiet_trace
from rasd_integrations.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    import openvino as ov

logger = logging.getLogger(__name__)

_FORMAT = 2  # of kept graphs: raise it when a step's inputs, outputs or operations change
# Added to the score of a key that a row may not see: finite, so that no difference of two is undefined.
_HIDDEN = torch.finfo(torch.bfloat16).min / 4
# What lies so is read as it lies by OpenVINO's products (docs/explanation/experiments.md).
_LAYOUT = Layout(transposed_keys=False, transposed_values=True, tight=True)
_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Most that logits may be off eager ones, relative; those of a wrong graph are about 1 off.
_FAR = {torch.float32: 1e-3, torch.bfloat16: 0.2}


# A step of another width than the last takes as long as this many rows more (docs/explanation/experiments.md).
_CHANGE_ROWS = 12
_PERIOD = 8  # steps
_WIDEST = 64  # of a decoding step; prefill runs as it comes


class Widths:
    """As how many rows decoding steps are run: seldom another number than the last time."""

    def __init__(self) -> None:
        """Start with no width."""
        self.now = 0
        self._most = self._steps = 0

    def fit(self, n: int) -> int:
        """Return the rows to run a step of ``n`` as: ``4 k + 1``, and smaller than before once that pays."""
        self._most, self._steps = max(self._most, n), self._steps + 1
        needed = 1 + 4 * -(-(self._most - 1) // 4)
        if needed > self.now or self._steps * (self.now - needed) >= _CHANGE_ROWS:
            self.now = needed
        elif self._steps < _PERIOD:
            return self.now
        self._most = self._steps = 0
        return self.now


def is_available() -> bool:
    """Whether the extra ``openvino`` is installed."""
    return importlib.util.find_spec("openvino") is not None


class CompiledExecutor:
    """OpenVINO's graph of a stock module, for steps of one answer; a step of several runs eagerly.

    The graph has weights of its own, laid out for the processor. It is made once a model (traced and compiled
    in seconds) and then loaded from ``folder``.
    """

    def __init__(
        self, model: PreTrainedModel, *, folder: Path | None = None, identity: str | None = None
    ) -> None:
        """Trace and compile ``model``, or load its graph, and compare it with eager torch.

        Args:
            model: On a CPU, in float32 or bfloat16, its weights as transformers laid them.
            folder: Where graphs are kept; ``None`` keeps none.
            identity: Tells the weights from others'; ``None`` keeps no graph.

        Raises:
            MissingDependencyError: The extra ``openvino`` is not installed.
            ConfigurationError: The model cannot be compiled, or its graph says something else than eager torch.
        """
        if not is_available():
            package = "openvino"
            raise MissingDependencyError(package, package)
        places = {weight.device.type for weight in model.parameters()}
        if places != {"cpu"} or model.dtype not in _DTYPES:
            msg = (
                f"executor 'openvino' runs float32 and bfloat16 models on a CPU, but {type(model).__name__} is "
                f"{str(model.dtype).removeprefix('torch.')} on {', '.join(sorted(places))}. "
                f"Use executor='eager'."
            )
            raise ConfigurationError(msg)
        self._eager = EagerExecutor(model)
        self._plan = plan_of(model, self._eager)
        self._dtype = model.dtype
        path = None
        if folder is not None and identity is not None:
            path = folder / f"{_graph_name(model, identity)}.blob"
        self._request: Any = _compiled(model, self._plan, path).create_infer_request()
        layers = len(self._plan.layers)
        self._first_key = len(self._request.model_inputs) - 2 * layers
        self._widths = Widths()
        self.width = 0
        self._bound: Tensor | None = None
        self._held: list[Tensor] = []  # what the graph reads must outlive the request's tensors
        self._check(model)

    def step(self, ids: Tensor, context: StepContext, *, want_logits: bool) -> StepOutput:
        """Run ``ids`` ``[n]`` behind the prefix; the new rows are laid behind it."""
        segment = context.segments[0]
        if len(context.segments) > 1 or not self._bind(segment):
            return self._eager.step(ids, context, want_logits=want_logits)
        n, layers = len(ids), len(self._plan.layers)
        decodes = want_logits and n <= _WIDEST
        width = self._widths.fit(n) if decodes else n
        self.width = width if decodes else 0
        # Rows that are added repeat the last one; nobody sees them, and they go nowhere.
        ids, positions = (
            torch.cat([x, x[-1:].expand(width - n)]) for x in (ids, context.positions)
        )
        rows = torch.arange(0 if want_logits else n - 1, width)
        tables = [table for call in self._plan.angles for table in call.at(positions[None])]
        inputs = [ids[None], positions[None], rows, *tables, *self._masks(segment, width)]
        for index, tensor in enumerate(inputs):
            self._request.set_input_tensor(index, _shared(tensor))
        self._request.infer()
        new = [
            _tensor(self._request.get_output_tensor(2 + index).data) for index in range(2 * layers)
        ]
        for layer in range(layers):
            segment.buffer.write(layer, new[layer][:, :n], new[layers + layer][:, :n])
        # Copied by numpy: torch's threads would spin where the graph's next ones want to run.
        logits, hidden = (
            _tensor(self._request.get_output_tensor(index).data[:n].copy()) for index in range(2)
        )
        return StepOutput(logits if want_logits else logits[:0], hidden)

    def _masks(self, segment: Segment, width: int) -> list[Tensor]:
        """Return what is added to the scores of prefix and tail, for each kind of layer."""
        masks = []
        buffer, n = segment.buffer, segment.rows
        for window, group in self._plan.kinds:
            start, prefix = 0, buffer.length
            if window is not None and prefix + buffer.shift + 1 > window:
                start = buffer.first_from(prefix + buffer.shift + 1 - window)
            tail, head = segment.blocked(prefix - start, window, segment.positions.device)
            rows = 1 if head is None else width
            head_mask = torch.zeros(rows, buffer.capacity, dtype=self._dtype)
            head_mask[:, :start] = _HIDDEN
            head_mask[:, prefix:] = _HIDDEN
            if head is not None:
                head_mask[:n, start : start + head.shape[1]].masked_fill_(head, _HIDDEN)
                head_mask = head_mask.repeat(group, 1)
            tail_mask = torch.zeros(width, width, dtype=self._dtype)
            tail_mask[:n, n:] = _HIDDEN
            if tail is not None:
                tail_mask[:n, :n].masked_fill_(tail, _HIDDEN)
            masks += [head_mask[None], tail_mask.repeat(group, 1)[None]]
        return masks

    def _bind(self, segment: Segment) -> bool:
        """Hand the memory of the segment's buffer to the graph; whether it can be read there."""
        buffer = segment.buffer
        buffer.arrange(_LAYOUT, segment.rows)
        for index, shape in enumerate(self._plan.layers[buffer.num_layers :], buffer.num_layers):
            key = torch.empty(shape.kv_heads, 0, shape.key_dim, dtype=self._dtype)
            buffer.write(index, key, key.new_empty(shape.kv_heads, 0, shape.value_dim))
        if self._bound is not None and self._bound is buffer.memory:
            return True
        stores = [buffer.stores(layer) for layer in range(len(self._plan.layers))]
        tensors = [keys for keys, _ in stores] + [values.mT for _, values in stores]
        if not all(tensor.is_contiguous() for tensor in tensors):
            return False
        self._bound = None
        for index, tensor in enumerate(tensors, self._first_key):
            self._request.set_input_tensor(index, _shared(tensor))
        self._bound, self._held = buffer.memory, tensors
        return True

    @torch.inference_mode()
    def _check(self, model: PreTrainedModel) -> None:
        """Compare a chain from nothing, and a tree behind it, with eager torch.

        The median row decides: bfloat16 alone takes single rows of meaningless text far apart, and what is
        wrong in a graph (angles, masks) is wrong in most of them.
        """
        ids = 97 * torch.arange(1, 20) % int(model.config.get_text_config().vocab_size)
        executors: tuple[Executor, Executor] = self, self._eager
        buffers = KVBuffer(32), KVBuffer(32)
        tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
        off = []
        for first, last, positions, mask in (
            (0, 16, torch.arange(16), None),
            (16, 19, torch.tensor([16, 17, 17]), tree),
        ):
            ours, theirs = (
                executor.step(
                    ids[first:last],
                    StepContext(positions, (Segment(buffer, positions, mask),)),
                    want_logits=True,
                ).logits.float()
                for executor, buffer in zip(executors, buffers, strict=True)
            )
            for buffer in buffers:
                buffer.commit(range(last - first))
            off.append(float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).median()))
        if not max(off) <= _FAR[model.dtype]:
            msg = (
                f"{type(model).__name__} compiled by OpenVINO gives logits that are {max(off):.2g} off eager ones "
                f"(relative; at most {_FAR[model.dtype]:.2g}). Use executor='eager'."
            )
            raise ConfigurationError(msg)


def _compiled(model: PreTrainedModel, plan: Plan, path: Path | None) -> ov.CompiledModel:
    """Return the graph of ``model``, from ``path`` where it is kept."""
    import openvino as ov

    core = ov.Core()
    options = {
        "INFERENCE_PRECISION_HINT": _DTYPES[model.dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,
    }
    if path is not None and path.is_file():
        try:
            return core.import_model(path.read_bytes(), "CPU", options)
        except RuntimeError as err:
            logger.warning("%s is damaged or of another OpenVINO and is made anew (%s)", path, err)
    graph = core.compile_model(_traced(model, plan), "CPU", options)
    if path is not None:
        _keep(graph.export_model().getbuffer(), path)
    return graph


def _traced(model: PreTrainedModel, plan: Plan) -> ov.Model:
    """Return the graph of a step, its widths and the buffer's capacity left open."""
    import openvino as ov

    step = TracedStep(model, plan).eval()
    try:
        with quiet_trace(), in_float32(model), torch.inference_mode():
            some, more = step.examples(3, 5), step.examples(4, 7)
            graph = ov.convert_model(step, example_input=some)
    except (
        Exception
    ) as err:  # tracing runs the model's own code, and the converter knows not all of torch
        msg = (
            f"{type(model).__name__} cannot be compiled by OpenVINO: {str(err).strip().splitlines()[0]} "
            f"Use executor='eager'."
        )
        raise ConfigurationError(msg) from err
    if len(graph.inputs) != len(some):
        msg = f"{type(model).__name__} compiled by OpenVINO reads not all of a step. Use executor='eager'."
        raise ConfigurationError(msg)
    graph.reshape(
        {
            index: ov.PartialShape(
                [m if m == n else -1 for m, n in zip(a.shape, b.shape, strict=True)]
            )
            for index, (a, b) in enumerate(zip(some, more, strict=True))
        }
    )
    # Masks, keys and values come and go as the model's own type.
    kind = getattr(ov.Type, _DTYPES[model.dtype])
    edges = ov.preprocess.PrePostProcessor(graph)
    for index in range(len(some) - 2 * len(plan.layers) - 2 * len(plan.kinds), len(some)):
        edges.input(index).tensor().set_element_type(kind)
    for index in range(len(graph.outputs)):
        edges.output(index).tensor().set_element_type(kind)
    return edges.build()


def _shared(tensor: Tensor) -> ov.Tensor:
    """Return an OpenVINO tensor over the memory of ``tensor``, which must outlive it."""
    import openvino as ov

    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        return ov.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), ov.Type.bf16)
    return ov.Tensor(tensor.numpy(), shared_memory=True)


def _tensor(array: Any) -> Tensor:
    """Return a tensor over the memory of an output, whose bfloat16 numpy takes for float16."""
    if array.dtype == np.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _graph_name(model: PreTrainedModel, identity: str) -> str:
    """Return what tells a kept graph from others: weights, versions and the processor it was laid out for."""
    import openvino as ov

    processor = ov.Core().get_property("CPU", "FULL_DEVICE_NAME")
    said = (_FORMAT, identity, str(model.dtype), ov.__version__, torch.__version__, processor)
    return hashlib.blake2b(repr(said).encode(), digest_size=12).hexdigest()


def _keep(blob: memoryview, path: Path) -> None:
    """Write a graph in one move, so that no process ever sees a part of it; without room, keep none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as work:
            new = Path(work) / "new"
            new.write_bytes(blob)
            new.replace(path)
    except OSError as err:
        logger.warning(
            "cannot keep the compiled graph in %s (%s); it is made anew each time", path.parent, err
        )
