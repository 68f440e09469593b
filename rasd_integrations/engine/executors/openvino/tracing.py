"""One step of a stock transformers module as a pure function of tensors, which torch can trace.

``(ids, positions, rows, angles, weights, attended) -> (logits, hidden, queries, keys, values)``. Attention is left out,
since the compiled graph reads the cache by its own; so are large weights, which it reads where they lie, and rotary
angles, which compilers would round to bfloat16, where positions become equal.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rasd_integrations.engine.attention import Scoring, Segment, StepContext
from rasd_integrations.engine.executors.eager import (
    EagerExecutor,
    NoCache,
    cache_argument,
    outputs_of,
)
from rasd_integrations.engine.executors.openvino.weights import (
    LARGE,
    Weight,
    given,
    weights_of,
    zero_weights,
)
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.long_rope import ROTARY


@dataclass(frozen=True, slots=True)
class Angles:
    """One call of a rotary module in a step of the model."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.inference_mode()
    def at(self, positions: Tensor) -> list[Tensor]:
        """Return the angles at ``positions`` ``[1, n]``, in float32."""
        args = [_at(value, positions) for value in self.args]
        kwargs = {name: _at(value, positions) for name, value in self.kwargs.items()}
        return list(self.module(*args, **kwargs))


def _at(value: Any, positions: Tensor) -> Any:
    """Return an argument of a rotary module for other positions; of hidden states it reads only the type."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty(1, 1, 1) if value.is_floating_point() else positions


@dataclass(frozen=True, slots=True)
class Layer:
    """Shapes and scoring of one layer's attention."""

    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    scoring: Scoring


@dataclass(frozen=True, slots=True)
class TraceLayout:
    """The rotary calls and layers of a model's step.

    Attributes:
        angles: Calls of rotary modules, in their order.
        layers: By their index.
    """

    angles: tuple[Angles, ...]
    layers: tuple[Layer, ...]

    @property
    def head_counts(self) -> tuple[int, ...]:
        """Numbers of key heads in the layers, each once."""
        return tuple(dict.fromkeys(layer.kv_heads for layer in self.layers))


class _LayerRecorder(Segment):
    """Records how each layer of an eager step attends."""

    __slots__ = ("layers",)

    def __init__(self, buffer: KVBuffer, positions: Tensor) -> None:
        super().__init__(buffer, positions, None)
        self.layers: dict[int, Layer] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        kv_heads = key.shape[1]
        group = query.shape[1] // kv_heads
        self.layers[layer] = Layer(kv_heads, group, key.shape[-1], value.shape[-1], scoring)
        return super().attend(layer, query, key, value, scoring)


@torch.inference_mode()
def trace_layout(eager: EagerExecutor) -> TraceLayout:
    """Run two tokens, over large weights of zeros, and record the rotary calls and layers."""
    positions = torch.arange(2)
    recorder = _LayerRecorder(KVBuffer(2), positions)
    calls: list[Angles] = []
    hooks = [
        module.register_forward_hook(
            lambda module, args, kwargs, _out: calls.append(Angles(module, args, dict(kwargs))),
            with_kwargs=True,
        )
        for module in _rotary_modules(eager.model)
    ]
    weights = weights_of(eager.model)
    try:
        with given(weights, zero_weights(weights, eager.model.dtype)):
            eager.step(
                torch.zeros(2, dtype=torch.long), StepContext(positions, (recorder,)), num_logits=0
            )
    finally:
        for hook in hooks:
            hook.remove()
    layers = tuple(recorder.layers[index] for index in range(len(recorder.layers)))
    return TraceLayout(tuple(calls), layers)


def _rotary_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith(ROTARY)]


class _TracedSegment:
    """The sequence of a traced step: attention's inputs become outputs of the trace, and its outputs inputs."""

    def __init__(self, trace: TraceLayout, attended: Sequence[Tensor]) -> None:
        self._trace, self._attended = trace, attended
        self.read: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        shape = self._trace.layers[layer]
        heads, group = shape.kv_heads, shape.group
        grouped = query.reshape(heads, group, -1, shape.key_dim).transpose(1, 2)
        self.read[layer] = (
            grouped.reshape(-1, group * shape.key_dim),
            key.reshape(-1, shape.key_dim),
            value.reshape(-1, shape.value_dim),
        )
        rows = self._attended[layer].reshape(heads, -1, group * shape.value_dim).transpose(0, 1)
        return rows.reshape(1, -1, heads * group, shape.value_dim)


class TracedStep(nn.Module):
    """The pure step of a model; inputs in the order of :meth:`examples`.

    A layer's attention takes queries ``[kv_heads * n, group * key_dim]``, new keys ``[kv_heads * n, key_dim]`` and new
    values ``[kv_heads * n, value_dim]``, and returns ``[kv_heads * n, group * value_dim]``.
    """

    def __init__(
        self, model: PreTrainedModel, trace: TraceLayout, weights: Sequence[Weight]
    ) -> None:
        """Wrap an executor's copy of a model with these large ``weights``."""
        super().__init__()
        self._model = model
        self._trace = trace
        self._weights = weights
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)

    def forward(
        self, ids: Tensor, positions: Tensor, rows: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """Return logits ``[rows, vocab]``, hidden states ``[n, hidden]`` and each layer's queries, keys, values."""
        layers = len(self._trace.layers)
        tables = len(rest) - len(self._weights) - layers
        segment = _TracedSegment(self._trace, rest[-layers:])
        context: Any = StepContext(positions[0], (segment,))  # type: ignore[arg-type]
        with (
            _angles_given(self._trace.angles, rest[:tables]),
            given(self._weights, rest[tables:-layers]),
            outputs_of(self._model.base_model) as seen,
        ):
            out = self._model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self._mask,
                use_cache=True,
                logits_to_keep=rows,
                rasd_step=context,
                **{cache_argument(self._model.base_model): NoCache()},
            )
        hidden = seen[0].last_hidden_state[0]
        return out.logits[0], hidden, *(x for layer in range(layers) for x in segment.read[layer])

    @torch.inference_mode()
    def examples(self, n: int) -> tuple[Tensor, ...]:
        """Return inputs of ``n`` tokens."""
        positions = torch.arange(n)[None]
        tables = [table for call in self._trace.angles for table in call.at(positions)]
        attended = [
            torch.zeros(layer.kv_heads * n, layer.group * layer.value_dim)
            for layer in self._trace.layers
        ]
        ids, rows = torch.zeros(1, n, dtype=torch.long), torch.arange(n - 1)
        return ids, positions, rows, *tables, *zero_weights(self._weights), *attended


@contextmanager
def _angles_given(calls: Sequence[Angles], tables: Sequence[Tensor]) -> Iterator[None]:
    """Make the model's rotary modules return ``tables``, in the order of ``calls``."""
    left = iter(tables)
    per_call = len(tables) // len(calls) if calls else 0

    def given(*_args: Any, **_kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(next(left) for _ in range(per_call))

    modules = {id(call.module): call.module for call in calls}.values()
    old: list[Callable[..., Any]] = [module.forward for module in modules]
    for module in modules:
        module.forward = given
    try:
        yield
    finally:
        for module, forward in zip(modules, old, strict=True):
            module.forward = forward


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Give an executor's copy of a model small weights in float32, which compilers handle best, inside the block."""
    old = [(module._parameters, dict(module._parameters)) for module in model.modules()]
    wide: dict[int, nn.Parameter] = {}  # tied weights stay one
    for table, weights in old:
        for name, weight in weights.items():
            if weight is not None and weight.numel() < LARGE:
                if id(weight) not in wide:
                    wide[id(weight)] = nn.Parameter(weight.data.float(), requires_grad=False)
                table[name] = wide[id(weight)]
    try:
        yield
    finally:
        for table, weights in old:
            table.update(weights)


@contextmanager
def quiet_trace() -> Iterator[None]:
    """Silence tracing's warnings about constant shapes, and transformers' about properties that openvino reads."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
