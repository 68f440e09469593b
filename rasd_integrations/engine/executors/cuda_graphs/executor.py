"""Decoding steps as CUDA graphs: a step's thousand small kernels are recorded once and launched as one.

A graph holds the addresses and shapes of one padded step (:mod:`.fixed`) over the memory of one :class:`KVBuffer`, and
is dropped when the buffer grows or is freed. (One arena for all streams would hold a long prefix twice, 17 GB for 128K
tokens of an 8B model.) Recording costs a few steps, so a shape is recorded when it comes for the second time.

On a CPU a recorded step is the step itself, so padding, masks and writes are tested there. Never run on a GPU so far:
see docs/how-to/use-gpus.md.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, MutableMapping
from functools import partial

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from rasd_integrations.engine.attention import Segment, StepContext
from rasd_integrations.engine.executors.base import Drawn, Executor, Sampler, StepOutput
from rasd_integrations.engine.executors.cuda_graphs.fixed import (
    FixedInputs,
    FixedSegment,
    PrefixAttention,
    flash_prefix,
)
from rasd_integrations.engine.executors.cuda_graphs.loop import ROOM, Loop
from rasd_integrations.engine.executors.eager import EagerExecutor
from rasd_integrations.engine.kv.buffer import GRANULE, KVBuffer

logger = logging.getLogger(__name__)

ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 32, 64)
FIRST_KV_BUCKET = 4096  # rows; each next one is half as long again
_MOST_GRAPHS = 128  # beyond it all are dropped
# Largest root mean square difference from eager, in standard deviations of the logits.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}

Run = Callable[[], StepOutput]
"""A step over fixed memory."""
Recorder = Callable[[Run], Run]
"""Runs a step once or more and returns a function that runs its kernels on the same memory again."""
_Shape = int | Sampler  # so many rows, or one row whose successor is drawn
_Runs = dict[tuple[_Shape, int], Run | None]  # by shape and bucket; None after it came once


def is_available(device: torch.device | str) -> bool:
    """Return whether steps on ``device`` can be recorded as CUDA graphs."""
    return torch.device(device).type == "cuda" and torch.cuda.is_available()


def kv_bucket(rows: int, capacity: int) -> int:
    """Return how many rows of a buffer a graph reads that needs ``rows`` of them."""
    bucket = FIRST_KV_BUCKET
    while bucket < rows:
        bucket = -(-bucket * 3 // (2 * GRANULE)) * GRANULE
    return min(bucket, capacity)


def run_again(run: Run) -> Run:
    """Record nothing: a CPU launches no kernels, so the step itself is run again."""
    return run


class CudaRecorder:
    """Records CUDA graphs, all in one pool: none runs while another does, and outputs are copied out."""

    def __init__(self, device: torch.device) -> None:
        """Make a stream for warm-ups and recordings."""
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Warm up, record, and return the replay."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # libraries initialise here: they may not during capture
        graph = torch.cuda.CUDAGraph()
        # Other threads prepare steps meanwhile; their calls are not captured.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            out = run()
        current.wait_stream(self._stream)

        def replay() -> StepOutput:
            graph.replay()
            return out

        return replay


def _flash_prefix_for(model: PreTrainedModel) -> PrefixAttention | None:
    """Return :func:`flash_prefix` if this torch has it for the model's device and dtype."""
    if model.device.type != "cuda" or model.dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return flash_prefix if "seqused_k" in inspect.signature(varlen_attn).parameters else None


class GraphExecutor(Executor):
    """Runs one answer's step of up to 64 rows as a graph, and draws a drafter's tokens on the device.

    Prefills, batches, gathered buffers, empty prefixes and models over several devices are run by
    :class:`EagerExecutor`. So is everything, with one warning, if the check at construction finds that graphs cannot be
    recorded or give other logits.
    """

    def __init__(self, model: PreTrainedModel, *, recorder: Recorder | None = None) -> None:
        """Wrap ``model`` and compare graphs with eager on two small steps.

        Args:
            model: On one device.
            recorder: ``None`` is the device's own.

        Raises:
            ConfigurationError: The architecture cannot take an attention function.
        """
        self._eager = EagerExecutor(model)
        self.layout = self._eager.layout
        self._recorder = recorder or _recorder_for(model.device)
        self._inputs: dict[int, FixedInputs] = {}
        self._loops: dict[int, Loop] = {}  # by the size of the vocabulary
        self._graphs: MutableMapping[Tensor, _Runs] = WeakTensorKeyDictionary()
        self._prefix: PrefixAttention | None = None
        self._records_draws = True
        self.is_off = False  # for good
        if len({parameter.device for parameter in model.parameters()}) > 1:
            self._turn_off("the model is on several devices")
            return
        faults = []
        for prefix in dict.fromkeys((_flash_prefix_for(model), None)):
            self._prefix = prefix
            fault = self._fault(model)
            if fault is None:
                return
            logger.info("graphs with %s: %s", prefix or "masked attention", fault)
            faults.append(fault)
        self._turn_off("; ".join(faults))

    @property
    def num_graphs(self) -> int:
        """Graphs that are held now."""
        return sum(run is not None for runs in self._graphs.values() for run in runs.values())

    @torch.inference_mode()
    def step(self, ids: Tensor, context: StepContext, *, num_logits: int) -> StepOutput:
        """Run the graph of this shape, or eagerly if there is none."""
        segment, n = context.segments[0], len(ids)
        run = None
        if num_logits == n and len(context.segments) == 1 and self.can_record(segment.buffer, n):
            bucket = kv_bucket(segment.buffer.length + n, segment.buffer.capacity)
            record = partial(self._record, ids, segment, bucket)
            run = self._known(_row_bucket(n), bucket, segment.buffer, record)
        if run is None:
            return self._eager.step(ids, context, num_logits=num_logits)
        return self._replayed(run, ids, segment)

    @torch.inference_mode()
    def draw(self, ids: Tensor, segment: Segment, sampler: Sampler, uniform: Tensor) -> Drawn:
        """Run ``ids``, then draw a token for each number of ``uniform`` and run all of them but the last."""
        buffer, n = segment.buffer, len(uniform)
        context = StepContext(segment.positions, (segment,))
        logits = self.step(ids, context, num_logits=len(ids)).logits[-1:]
        first = sampler(logits, uniform[:1])
        vocab_size = first[-1].shape[-1]
        if vocab_size not in self._loops:
            self._loops[vocab_size] = Loop(vocab_size, ids.device)
        loop, read = self._loops[vocab_size], buffer.length + len(ids)
        begin = partial(loop.begin, first, uniform, read, read - 1)
        if n == 1:
            begin()
            return loop.drawn(1)
        bucket = kv_bucket(read + n - 1, buffer.capacity)
        plain = partial(self._drawing, loop, sampler, buffer, bucket)

        def record() -> Run:
            begin()  # since recording runs the step
            return self._recorder(plain())

        run = self._known(sampler, bucket, buffer, record) or plain()
        begin()
        for _ in range(n - 1):
            run()
        return loop.drawn(n)

    def max_drawn(self, buffer: KVBuffer, n: int) -> int:
        """Return how many tokens can be drawn in a row behind ``n`` more."""
        return ROOM if self.can_record(buffer, n) and not buffer.keeps_hidden else 0

    def can_record(self, buffer: KVBuffer, rows: int) -> bool:
        """Return True if one answer's step of so many rows can run over fixed memory."""
        fits = not self.is_off and rows <= ROW_BUCKETS[-1]
        return fits and buffer.memory is not None and not buffer.is_gathered and buffer.length > 0

    def _replayed(self, run: Run, ids: Tensor, segment: Segment) -> StepOutput:
        n = len(ids)
        self._inputs[_row_bucket(n)].fill(ids, segment)
        out = run()
        # The next step overwrites the outputs, and a drafter keeps its logits for longer.
        return StepOutput(out.logits[:n].clone(), out.hidden[:n].clone())

    def _known(
        self, shape: _Shape, bucket: int, buffer: KVBuffer, record: Callable[[], Run]
    ) -> Run | None:
        """Return the graph of a step, recorded when its shape comes for the second time."""
        if isinstance(shape, Sampler) and not self._records_draws:
            return None
        memory = buffer.stores(0)[0]
        runs = self._graphs.setdefault(memory, {})
        if (shape, bucket) not in runs:
            for old in [key for key in runs if key[1] < bucket]:
                del runs[old]  # the prefix has outgrown them
            runs[shape, bucket] = None
        elif runs[shape, bucket] is None:
            if self.num_graphs >= _MOST_GRAPHS:
                self._graphs.clear()
                runs = self._graphs.setdefault(memory, {})
            try:
                runs[shape, bucket] = record()
            except RuntimeError as err:
                if isinstance(shape, int):
                    self._turn_off(f"a step of {shape} rows cannot be recorded: {err}")
                else:
                    self._records_draws = False
                    logger.warning("drafts are drawn without CUDA graphs: %s", err)
                return None
        return runs[shape, bucket]

    def _record(self, ids: Tensor, segment: Segment, bucket: int) -> Run:
        """Record a step of the shape of ``ids``, over the buffer's memory."""
        rows = _row_bucket(segment.rows)
        if rows not in self._inputs:
            self._inputs[rows] = FixedInputs(rows, segment.positions.device)
        inputs = self._inputs[rows]
        inputs.fill(ids, segment)  # since recording runs the step
        return self._recorder(partial(self._fixed_step, inputs, segment.buffer.pinned(bucket)))

    def _drawing(self, loop: Loop, sampler: Sampler, buffer: KVBuffer, bucket: int) -> Run:
        """Return a step that reads the last drawn token and draws the next."""
        pinned = buffer.pinned(bucket)

        def run() -> StepOutput:
            out = self._fixed_step(loop.inputs, pinned)
            loop.take(sampler, out.logits)
            return out

        return run

    def _fixed_step(self, inputs: FixedInputs, pinned: KVBuffer) -> StepOutput:
        """Run ``inputs`` over the rows of ``pinned``, without a copy to the host."""
        fixed = FixedSegment(inputs, pinned, self._prefix)
        context = StepContext(inputs.positions, (fixed,))
        return self._eager.step(inputs.ids, context, num_logits=len(inputs.ids))

    @torch.inference_mode()
    def _fault(self, model: PreTrainedModel) -> str | None:
        """Return how graphs of a chain and a tree differ from eager steps, if they do."""
        device, vocab = model.device, int(model.config.get_text_config().vocab_size)
        ids = torch.arange(7, 20, device=device) % vocab
        buffer = KVBuffer(GRANULE)
        places = torch.arange(8, device=device)
        prefill = StepContext(places, (Segment(buffer, places, None),))
        self._eager.step(ids[:8], prefill, num_logits=0)
        buffer.commit(range(8))
        tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool, device=device)
        cases = (
            (torch.tensor([8], device=device), None),
            (torch.tensor([8, 9, 9], device=device), tree),
        )
        tolerance = _TOLERANCE.get(model.dtype, 0.1)
        for positions, mask in cases:
            segment, rows = Segment(buffer, positions, mask), ids[8 : 8 + len(positions)]
            wanted = self._eager.step(
                rows, StepContext(positions, (segment,)), num_logits=len(rows)
            )
            try:
                run = self._record(rows, segment, buffer.capacity)
                got = self._replayed(run, rows, segment)
            except RuntimeError as err:
                return f"a step of {len(rows)} rows cannot be recorded: {err}"
            expected = wanted.logits.float()
            error = (got.logits.float() - expected).square().mean().sqrt() / expected.std()
            if not float(error) <= tolerance:
                return (
                    f"a step of {len(rows)} rows is off by {float(error):.2g} of the logits' spread"
                )
        return None

    def _turn_off(self, why: str) -> None:
        self.is_off = True
        self._graphs.clear()
        logger.warning("steps run eagerly, without CUDA graphs: %s", why)


def _row_bucket(rows: int) -> int:
    return next(bucket for bucket in ROW_BUCKETS if bucket >= rows)


def _recorder_for(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else run_again
