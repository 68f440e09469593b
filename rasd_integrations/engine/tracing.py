"""One step of a stock transformers module as a pure function of tensors, which torch can trace.

``(ids, positions, rows, angles, masks, keys, values) -> (logits, hidden, new keys, new values)``. Nothing is
written: the new rows come out, and a cache only ever appends them. What a trace cannot hold stands outside:
rotary angles, which compilers would round to bfloat16 at positions that it cannot tell apart, and masks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rasd_integrations.engine.attention import Segment, StepContext
from rasd_integrations.engine.executor import EagerExecutor, NoCache, outputs_of
from rasd_integrations.engine.kv import KVBuffer

_ROTARY = "RotaryEmbedding"  # how transformers names the modules that make angles of positions


@dataclass(frozen=True, slots=True)
class Angles:
    """One call that the model makes of a rotary module in each step."""

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
    """Return an argument of a rotary module for other positions; of the states it reads only the type."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty(1, 1, 1) if value.is_floating_point() else positions


@dataclass(frozen=True, slots=True)
class Layer:
    """Shapes of one layer's attention, and the window of its keys."""

    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step of the model consists of.

    Attributes:
        angles: Calls of rotary modules, in their order.
        layers: By their index.
    """

    angles: tuple[Angles, ...]
    layers: tuple[Layer, ...]

    @property
    def kinds(self) -> tuple[tuple[int | None, int], ...]:
        """``(window, group)`` of the masks that layers read, each once."""
        return tuple(dict.fromkeys((layer.window, layer.group) for layer in self.layers))


class _Recorder(Segment):
    """Rows of an eager step that write down how each layer attends."""

    __slots__ = ("layers",)

    def __init__(self, buffer: KVBuffer, positions: Tensor) -> None:
        super().__init__(buffer, positions, None)
        self.layers: dict[int, Layer] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor,
        scale: float, window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        kv_heads = key.shape[1]
        self.layers[layer] = Layer(
            kv_heads, query.shape[1] // kv_heads, key.shape[-1], value.shape[-1], window
        )
        return super().attend(layer, query, key, value, scale, window, softcap)


@torch.inference_mode()
def plan_of(model: PreTrainedModel, eager: EagerExecutor) -> Plan:
    """Run two tokens and see what a step of ``model`` consists of."""
    positions = torch.arange(2)
    recorder = _Recorder(KVBuffer(2), positions)
    calls: list[Angles] = []
    hooks = [
        module.register_forward_hook(
            lambda module, args, kwargs, _out: calls.append(Angles(module, args, dict(kwargs))),
            with_kwargs=True,
        )
        for module in _rotary_modules(model)
    ]
    try:
        eager.step(
            torch.zeros(2, dtype=torch.long), StepContext(positions, (recorder,)), want_logits=False
        )
    finally:
        for hook in hooks:
            hook.remove()
    layers = tuple(recorder.layers[index] for index in range(len(recorder.layers)))
    return Plan(tuple(calls), layers)


def _rotary_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith(_ROTARY)]


class _TracedSegment:
    """The rows of a step that is traced: attention of plain operations over tensors that are handed in."""

    def __init__(
        self, plan: Plan, masks: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        self._masks = dict(zip(plan.kinds, zip(masks[::2], masks[1::2], strict=True), strict=True))
        self._plan, self._keys, self._values = plan, keys, values
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor,
        scale: float, window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        shape = self._plan.layers[layer]
        keys, values = self._keys[layer], self._values[layer]
        own_key, own_value = key[0].to(keys.dtype), value[0].to(values.dtype)
        self.new[layer] = own_key, own_value
        packed = (query * scale).to(keys.dtype).reshape(shape.kv_heads, -1, shape.key_dim)
        head, tail = packed @ keys.transpose(1, 2), packed @ own_key.transpose(1, 2)
        if softcap is not None:
            head, tail = (torch.tanh(part / softcap) * softcap for part in (head, tail))
        head_mask, tail_mask = self._masks[window, shape.group]
        scores = torch.cat([head + head_mask, tail + tail_mask], -1).softmax(-1)
        capacity = head.shape[-1]
        out = scores[..., :capacity] @ values.transpose(1, 2) + scores[..., capacity:] @ own_value
        heads = shape.kv_heads * shape.group
        return out.reshape(1, heads, -1, shape.value_dim).transpose(1, 2)


class TracedStep(nn.Module):
    """The pure step of a model; inputs and outputs in the order of :meth:`examples`."""

    def __init__(self, model: PreTrainedModel, plan: Plan) -> None:
        """Wrap ``model``, whose attention is routed through ours."""
        super().__init__()
        self._model = model
        self._plan = plan
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)

    def forward(
        self, ids: Tensor, positions: Tensor, rows: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """Return logits ``[rows, vocab]``, hidden states ``[n, hidden]`` and each layer's new rows."""
        layers = len(self._plan.layers)
        kinds = len(self._plan.kinds)
        tables = rest[: len(rest) - 2 * kinds - 2 * layers]
        masks = rest[len(tables) : len(tables) + 2 * kinds]
        segment = _TracedSegment(self._plan, masks, rest[-2 * layers : -layers], rest[-layers:])
        context: Any = StepContext(positions[0], (segment,))  # type: ignore[arg-type]
        with _angles_given(self._plan.angles, tables), outputs_of(self._model.base_model) as seen:
            out = self._model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self._mask,
                past_key_values=NoCache(),
                use_cache=True,
                logits_to_keep=rows,
                rasd_step=context,
            )
        new = [segment.new[layer] for layer in range(layers)]
        hidden = seen[0].last_hidden_state[0]
        return (out.logits[0], hidden, *(k for k, _ in new), *(v for _, v in new))

    @torch.inference_mode()
    def examples(self, n: int, capacity: int) -> tuple[Tensor, ...]:
        """Return inputs of ``n`` tokens over memory of ``capacity`` rows; what differs with the two is open."""
        positions = torch.arange(capacity, capacity + n)[None]
        dtype = self._model.dtype
        tables = [table for call in self._plan.angles for table in call.at(positions)]
        masks = []
        for window, group in self._plan.kinds:
            rows = 1 if window is None else group * n  # windows differ from row to row
            masks += [
                torch.zeros(1, rows, capacity, dtype=dtype),
                torch.zeros(1, group * n, n, dtype=dtype),
            ]
        layers = self._plan.layers
        keys = [torch.zeros(x.kv_heads, capacity, x.key_dim, dtype=dtype) for x in layers]
        values = [torch.zeros(x.kv_heads, x.value_dim, capacity, dtype=dtype) for x in layers]
        ids, rows_wanted = torch.zeros(1, n, dtype=torch.long), torch.arange(n - 1)
        return ids, positions, rows_wanted, *tables, *masks, *keys, *values


@contextmanager
def _angles_given(calls: Sequence[Angles], tables: Sequence[Tensor]) -> Iterator[None]:
    """Let the model's rotary modules return ``tables``, in the order of ``calls``."""
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
    """Let ``model`` hold its weights in float32: compilers know the operations of such a trace best.

    Where weights are narrower they are doubled for the while; afterwards the same memory is there again.
    """
    old = [(weight, weight.data) for weight in model.parameters()]
    for weight, data in old:
        weight.data = data.float()
    try:
        yield
    finally:
        for weight, data in old:
            weight.data = data


@contextmanager
def quiet_trace() -> Iterator[None]:
    """Silence what tracing says of shapes that it takes as constants; the check of the graph judges that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
