"""Steps on a CPU as one graph compiled by OpenVINO (extra ``openvino``).

It saves the time between eager operations, and reads keys and values in ``KVBuffer``'s own memory. Only
:mod:`..factory` imports this module, if OpenVINO is installed.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rasd_integrations.engine.attention import Segment, StepContext
from rasd_integrations.engine.executors.base import Executor, StepOutput
from rasd_integrations.engine.executors.eager import EagerExecutor, rows_at
from rasd_integrations.engine.executors.openvino.attention import SCALE_BYTES, Place, Span
from rasd_integrations.engine.executors.openvino.choosing import attention_of
from rasd_integrations.engine.executors.openvino.compiling import (
    DTYPES,
    compiled,
    graph_path,
    options_of,
)
from rasd_integrations.engine.executors.openvino.inputs import Frame
from rasd_integrations.engine.executors.openvino.tracing import trace_layout
from rasd_integrations.engine.kv.buffer import GRANULE, KVArena, KVBuffer
from rasd_integrations.engine.mapped import release, releasing
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.loading.progress import stage
from rasd_integrations.storage.marked import marked

_COPIED = (
    1 << 29
)  # bytes of weights; OpenVINO keeps a further one of each where the graph has copies
_FRAMES = 8  # kept, of the last step shapes
_USUAL_ROWS = 17  # widths up to here are run once at first: kernels are made for each width
_JOINT = 8  # a batch is as wide as the widest of its last so many steps
_MARK = 0x7FA5  # bits of a bfloat16 NaN that arithmetic does not make (it sets the highest bit of the fraction)
_OUT_OF_MEMORY = ("alloc", "out of memory")  # in OpenVINO's RuntimeError
# Largest relative error of logits against eager ones; a wrong graph is about 1 off.
_FAR, _FAR_IN_8_BITS = {torch.float32: 1e-3, torch.bfloat16: 0.2}, 0.3


class CompiledExecutor(Executor):
    """Runs OpenVINO's graph of a stock module, for one answer or a batch.

    The graph has weights of its own, packed for the processor. It is traced once, then loaded from ``cache_dir``.
    """

    def __init__(
        self, model: PreTrainedModel, *,
        cache_dir: Path | None = None, identity: str | None = None, in_8_bits: bool = False,
    ) -> None:  # fmt: skip
        """Trace and compile ``model``, or load its graph, and compare it with eager torch.

        Args:
            model: On a CPU, in float32 or bfloat16, unpacked.
            cache_dir: Where graphs are kept; default the user's cache folder.
            identity: Digest of the weights; ``None`` keeps no graph.
            in_8_bits: Keep keys and values in bytes, each row of a head with its own scale and zero point.

        Raises:
            ConfigurationError: The model cannot be compiled, or its graph differs from eager torch.
        """
        places = {weight.device.type for weight in model.parameters()}
        if places != {"cpu"} or model.dtype not in DTYPES:
            msg = (
                f"executor 'openvino' runs float32 and bfloat16 models on a CPU, but {type(model).__name__} is "
                f"{str(model.dtype).removeprefix('torch.')} on {', '.join(sorted(places))}. "
                f"Use executor='eager'."
            )
            raise ConfigurationError(msg)
        self._eager = EagerExecutor(model)
        self._trace = trace_layout(self._eager)
        options = options_of(model.dtype, in_8_bits=in_8_bits)
        attention, why = attention_of(
            self._trace, model.dtype, options, cache_dir, in_8_bits=in_8_bits
        )
        if attention is None:
            other = "openvino" if in_8_bits else "eager"
            msg = f"{type(model).__name__} {why}. Use executor={other!r}."
            raise ConfigurationError(msg)
        self._attention = attention
        # The graph reads this memory, and a model's owner may give its parameters other.
        self._weights = [w.detach() for w in chain(model.parameters(), model.buffers())]
        if sum(weight.nbytes for weight in self._weights) > _COPIED:
            attention.widths = ()
        # Fitting the graph to another width takes a third of a plain step (docs/explanation/experiments.md).
        self.layout = replace(
            self._eager.layout, row_multiple=4, order=attention.order, in_8_bits=in_8_bits
        )
        self._dtype = model.dtype
        path = graph_path(model, identity, cache_dir)
        self._arena: Callable[[], KVArena | None] = lambda: None
        self._joint: deque[int] = deque(maxlen=_JOINT)  # widths of the last batches
        self._frame_of = lru_cache(_FRAMES)(partial(Frame, self._attention))
        self._framed: Frame | None = None
        self._bound: Tensor | None = None
        self._held: list[Tensor] = []  # memory of the request's tensors
        kept = path is not None and marked(path) is not None
        try:
            with stage(None if kept else f"Compiling {type(model).__name__} for this CPU, once"):
                self._compile = partial(compiled, self._eager.model, attention, path, options)
                with releasing(model):
                    self._request: Any = self._compile().create_infer_request()
                    self._check(model, path)
        except ConfigurationError:
            raise
        except Exception as err:
            # Tracing runs the model's own code, and OpenVINO does not know all of torch.
            msg = (
                f"{type(model).__name__} cannot be compiled by OpenVINO {ov.__version__}: "
                f"{str(err).strip().splitlines()[0]} Use executor='eager'."
            )
            raise ConfigurationError(msg) from err

    @property
    def name(self) -> str:
        """Class, OpenVINO's version, and which attention."""
        return f"{type(self).__name__} {ov.__version__}, {self._attention.name}"

    def step(self, ids: Tensor, context: StepContext, *, num_logits: int) -> StepOutput:
        """Run ``ids`` ``[n]`` behind the prefixes."""
        segments = context.segments
        if not all(map(self._can_run, segments)):
            return self._eager.step(ids, context, num_logits=num_logits)
        n = len(ids)
        # A prefill piece is not padded, and always makes the logits of its last row.
        decodes = num_logits == n
        width = self._width(n, context) if decodes else n
        if self._request is None:
            with _memory_ends():
                self._request = self._compile().create_infer_request()
        rows = self._bind([segment.buffer for segment in segments], width)
        spans = _spans(segments, width - n)
        frame = self._frame(tuple(span.place for span in spans), rows, 0 if decodes else n - 1)
        frame.fill(ids, context.positions, spans)
        # Copied by numpy: torch's threads would spin while the graph's next ones start.
        logits, hidden = (
            _tensor(output[:n].copy()) for output in self._run(width if decodes else 1, width)
        )
        return StepOutput(logits[:num_logits], hidden)

    def _run(self, *rows: int) -> list[npt.NDArray[Any]]:
        """Run the graph and return logits and hidden states of ``rows`` rows each.

        Raises:
            MemoryError: Memory ran out; the next step compiles the graph again.
        """
        try:
            return self._outputs(rows)
        except MemoryError:
            # Some of the graph's own buffers are half resized now, so later steps would fail too.
            self._request = self._framed = self._bound = None
            self._held = []
            raise

    def _outputs(self, rows: Sequence[int]) -> list[npt.NDArray[Any]]:
        """Run the graph once.

        If memory runs out, OpenVINO may return without an error and without having written its outputs, so each row is
        marked beforehand.

        Raises:
            MemoryError: Some row was not written, or OpenVINO is out of memory.
        """
        for index in range(len(rows)):
            _mark(self._request.get_output_tensor(index).data)
        with _memory_ends():
            self._request.infer()
        outputs = [self._request.get_output_tensor(index).data for index in range(len(rows))]
        for output, wanted in zip(outputs, rows, strict=True):
            if len(output) != wanted or _is_marked(output):
                msg = f"OpenVINO returned from a step of {wanted} rows without having run it."
                raise MemoryError(msg)
        return outputs

    def _frame(self, places: tuple[Place, ...], rows: int, first_row: int) -> Frame:
        """Return the request's inputs for answers at ``places``."""
        frame = self._frame_of(places, rows, first_row)
        if self._framed is not frame:
            self._framed = None
            for index, tensor in enumerate(frame.tensors):
                self._request.set_input_tensor(index, tensor)
            self._framed = frame
        return frame

    def _can_run(self, segment: Segment) -> bool:
        """Return True if the graph has the angles, and its windows see what they should."""
        if segment.buffer.long_rope:
            return False
        end = segment.buffer.next_position + segment.rows
        inside = all(
            layer.scoring.window is None or end <= layer.scoring.window
            for layer in self._trace.layers
        )
        can = segment.is_chain or self._attention.windows_in_trees
        return inside or (can and not segment.buffer.is_gathered)

    def _width(self, n: int, context: StepContext) -> int:
        """Return the padded width of a decoding step of ``n`` tokens."""
        width = rows_at(n, self.layout.row_multiple)
        if len(context.segments) == 1:
            return max(width, context.rows)
        # The width of a batch changes each time, and one row more costs less than a change.
        self._joint.append(width)
        return min(max(self._joint), n + GRANULE)

    def _bind(self, buffers: Sequence[KVBuffer], rows: int) -> int:
        """Bind the buffers to the graph (a single one with ``rows`` spare rows); return the rows of its memory."""
        if len(buffers) == 1:
            buffers[0].reserve(rows)
            buffers[0].leave_arena()
        dtype, more = (torch.uint8, SCALE_BYTES) if self.layout.in_8_bits else (self._dtype, 0)
        for buffer in buffers:
            buffer.lay(self._attention.order)
            shapes = self._trace.layers
            for index, shape in enumerate(shapes[buffer.num_layers :], buffer.num_layers):
                key = torch.empty(shape.kv_heads, 0, shape.key_dim + more, dtype=dtype)
                buffer.append(index, key, key.new_empty(shape.kv_heads, 0, shape.value_dim + more))
        if len(buffers) > 1:
            self._join(buffers)
        stores = [buffers[0].stores(layer) for layer in range(len(self._trace.layers))]
        memory = stores[0][0]
        if self._bound is not memory:
            self._bound = None
            self._attention.bind(self._request, stores)
            self._bound, self._held = memory, [*chain.from_iterable(stores)]
        return int(memory.shape[1])

    def _join(self, buffers: Sequence[KVBuffer]) -> None:
        """Move all ``buffers`` into one arena, reusing the current one if they fit."""
        arena = self._arena()
        if arena is not None and all(arena.holds(b) or arena.admit(b) for b in buffers):
            return
        # Twice the room, so that not every new stream moves all.
        arena = KVArena(buffers[0], 2 * sum(buffer.capacity for buffer in buffers))
        self._arena = weakref.ref(arena)
        for buffer in buffers:
            arena.admit(buffer)

    @torch.inference_mode()
    def _check(self, model: PreTrainedModel, path: Path | None) -> None:
        """Compare a prefill, and a tree behind it, with eager torch; release what was read for it.

        The median row decides: bfloat16 alone moves single rows of random text far, and a fault of the graph (angles,
        masks) shows in most rows.
        """
        ids = 97 * torch.arange(1, 20) % int(model.config.get_text_config().vocab_size)
        tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)

        def run(executor: Executor, buffer: KVBuffer) -> Iterator[Tensor]:
            for first, last, positions, mask in (
                (0, 16, torch.arange(16), None),
                (16, 19, torch.tensor([16, 17, 17]), tree),
            ):
                context = StepContext(positions, (Segment(buffer, positions, mask),))
                step = executor.step(ids[first:last], context, num_logits=last - first)
                buffer.commit(range(last - first))
                yield step.logits.float()

        buffer = KVBuffer(32)
        theirs = [*run(self._eager, KVBuffer(32))]
        release(model, path)  # before the graph's own weights are read
        ours = [*run(self, buffer)]
        off = [
            float(((a - b).norm(dim=1) / b.norm(dim=1)).median())
            for a, b in zip(ours, theirs, strict=True)
        ]
        self.layout = replace(self.layout, layers=buffer.layers)
        for rows in range(1, _USUAL_ROWS + 1, self.layout.row_multiple):
            segment = Segment(buffer, len(ids) + torch.arange(rows), None)
            self.step(ids[:rows], StepContext(segment.positions, (segment,)), num_logits=rows)
        release(model, path)
        far = _FAR_IN_8_BITS if self.layout.in_8_bits else _FAR[model.dtype]
        if not max(off) <= far:
            msg = (
                f"{type(model).__name__} compiled by OpenVINO gives logits that are {max(off):.2g} off eager ones "
                f"(relative; at most {far:.2g}). Use executor='eager'."
            )
            raise ConfigurationError(msg)


def _mark(output: npt.NDArray[Any]) -> None:
    """Write a NaN that arithmetic does not make into each row of an output."""
    if output.size:
        bits = output.view(np.int16 if output.itemsize == 2 else np.int32)
        bits[..., -1] = _MARK if output.itemsize == 2 else _MARK << 16


def _is_marked(output: npt.NDArray[Any]) -> bool:
    """Return True if some row of an output still has the mark."""
    bits = output.view(np.int16 if output.itemsize == 2 else np.int32)
    mark = _MARK if output.itemsize == 2 else _MARK << 16
    return bool((bits[..., -1] == mark).any())


@contextmanager
def _memory_ends() -> Iterator[None]:
    """Turn OpenVINO's out-of-memory errors into `MemoryError`."""
    try:
        yield
    except RuntimeError as err:
        if any(word in str(err) for word in _OUT_OF_MEMORY):
            raise MemoryError(str(err)) from err
        raise


def _spans(segments: Sequence[Segment], spare: int) -> list[Span]:
    """Return the rows of each answer, and ``spare`` padding rows that no other row sees."""
    alone = len(segments) == 1
    spans = []
    for segment in segments:
        buffer, rows = segment.buffer, segment.rows + spare * alone
        depths = np.arange(
            rows, dtype=np.int32
        )  # each padding row sees itself, also in a narrow window
        depths[: segment.rows] = segment.positions.numpy() - buffer.next_position
        sees = None if segment.is_chain else _sees(segment, rows)
        spans.append(Span(buffer.length, rows, buffer.origin, buffer.capacity, depths, sees))
    if spare and not alone:
        # In an arena's first rows, which are reserved.
        spans.append(Span(0, spare, 0, GRANULE, np.arange(spare, dtype=np.int32)))
    return spans


def _sees(segment: Segment, width: int) -> npt.NDArray[np.bool_]:
    """Return a tree's attention mask ``[width, width]``; padding rows see everything."""
    sees = np.ones((width, width), dtype=np.bool_)
    sees[: segment.rows, segment.rows :] = False
    if segment.tail_mask is not None:
        sees[: segment.rows, : segment.rows] = segment.tail_mask.numpy()
    return sees


def _tensor(array: Any) -> Tensor:
    """Return a tensor over the memory of an output (numpy sees bfloat16 as float16)."""
    if array.dtype == np.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
