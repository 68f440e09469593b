"""Attention of a step's tokens over a read-only prefix and themselves, for any architecture.

Registered in transformers' attention interface as ``"rasd"``. Grouped queries are packed as rows of their key head, so
keys and values are never repeated; only the small tail is masked, not the prefix (hybrid tree attention of LongSpec,
arXiv 2502.17421). Without a step it is transformers' sdpa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.errors import ConfigurationError

NAME = "rasd"
_FEW_ROWS = 64  # up to here scores fit in the CPU's cache, and plain matrix products win
_UNSUPPORTED = ("position_bias", "sinks")

_Blocked = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer turns queries and keys into weights.

    Attributes:
        scale: Of the scores.
        window: Keys that a row sees, itself included; ``None`` is all.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[heads]``, one more score of each row, without a value (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class Segment:
    """One answer's rows of a step.

    Attributes:
        buffer: Keys and values of the prefix, with room for the rows.
        positions: ``[n]``, by depth in the tree.
        rows: ``n``.
        tail_mask: ``[n, n]``, True if a row sees another one; ``None`` for a chain.
    """

    __slots__ = ("_blocked", "buffer", "positions", "rows", "tail_mask")

    def __init__(self, buffer: KVBuffer, positions: Tensor, tail_mask: Tensor | None) -> None:
        """Describe ``n`` rows."""
        self.buffer = buffer
        self.positions = positions
        self.rows = len(positions)
        self.tail_mask = tail_mask
        self._blocked: dict[tuple[int | None, torch.device], _Blocked] = {}

    @property
    def is_chain(self) -> bool:
        """True if each row sees all rows before it."""
        return self.tail_mask is None

    def blocked(self, prefix: int, window: int | None, device: torch.device) -> _Blocked:
        """Return masks of what rows may not see: ``[n, n]`` of the tail and ``[n, m]`` of the first ``m`` keys.

        Made once a step for layers of one window.
        """
        known = self._blocked.get((window, device))
        if known is None:
            known = self._blocked[window, device] = _blocked(self, prefix, window, device)
        return known

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        """Write the rows' keys and values to the buffer; attend to the prefix and themselves.

        Returns:
            ``[1, n, heads, value_dim]``.
        """
        return _attend(self, layer, query, key, value, scoring)


@dataclass(frozen=True, slots=True)
class StepContext:
    """A step, as the attention of every layer sees it.

    Attributes:
        positions: ``[rows]`` of all segments, one after the other.
        segments: One for each answer in the step.
        rows: Pad a decoding step to at least this width.
    """

    positions: Tensor
    segments: tuple[Segment, ...]
    rows: int = 0


def rasd_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    rasd_step: StepContext | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend ``query`` to the step's prefix and tail.

    Args:
        module: The attention layer; ``layer_idx`` names its place in the buffer.
        query: ``[1, heads, n, head_dim]``.
        key: ``[1, kv_heads, n, head_dim]``, the step's own.
        value: ``[1, kv_heads, n, value_dim]``.
        attention_mask: Not read during a step; nor is ``dropout``.
        scaling: Of the scores; ``None`` is ``head_dim ** -0.5``.
        dropout: Of transformers' sdpa.
        rasd_step: The step; ``None`` outside our executors.
        sliding_window: With ``softcap`` and ``s_aux`` (sinks), see :class:`Scoring`.
        softcap: As above.
        s_aux: As above.
        **kwargs: Other terms of the architecture.

    Returns:
        ``[1, n, heads, value_dim]`` and no weights.

    Raises:
        ConfigurationError: The architecture needs a term that this function does not know.
    """
    if rasd_step is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling,
            softcap=softcap, sliding_window=sliding_window, s_aux=s_aux, **kwargs,
        )  # fmt: skip
    for term in _UNSUPPORTED:
        if kwargs.get(term) is not None:
            msg = (
                f"{type(module).__name__} uses the attention term {term!r}, which is not supported. "
                f"Use another model."
            )
            raise ConfigurationError(msg)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, sliding_window, softcap, s_aux)
    segments = rasd_step.segments
    if len(segments) == 1:
        return segments[0].attend(layer, query, key, value, scoring), None
    outs, start = [], 0
    for segment in segments:
        end = start + segment.rows
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        outs.append(segment.attend(layer, q, k, v, scoring))
        start = end
    return torch.cat(outs, 1), None


def _attend(
    segment: Segment, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Do what :meth:`Segment.attend` says."""
    _, heads, n, dim = query.shape
    buffer, window = segment.buffer, scoring.window
    prefix = buffer.length
    keys, values = buffer.write(layer, key[0], value[0])
    if window is not None and buffer.next_position + 1 > window:
        # The first row's window; later rows see less of it.
        start = buffer.first_from(buffer.next_position + 1 - window)
        keys, values = keys[:, start:], values[:, start:]
        prefix -= start
    kv_heads = keys.shape[0]
    packed = query.reshape(kv_heads, heads // kv_heads * n, dim)
    blocked = segment.blocked(prefix, window, query.device)
    piece = segment.is_chain and n > _FEW_ROWS  # of a prefill: a long chain
    if (
        scoring.softcap is None
        and window is None
        and dim == values.shape[-1]
        and (_has_flash(packed) or (piece and not packed.is_cuda))
    ):
        out = _flash(packed, keys, values, prefix, n, None if piece else blocked[0], scoring)
    else:
        out = _matrix(packed, keys, values, n, blocked, scoring)
    return out.view(1, heads, n, -1).transpose(1, 2).contiguous()  # as the stock functions do


def _blocked(segment: Segment, prefix: int, window: int | None, device: torch.device) -> _Blocked:
    n, mask = segment.rows, segment.tail_mask
    tail: Tensor | None = None
    if mask is not None:
        tail = ~mask.to(device)
    elif n > 1:
        tail = torch.ones(n, n, dtype=torch.bool, device=device).triu_(1)
    if window is None:
        return tail, None
    positions, buffer = segment.positions.to(device), segment.buffer
    depth = positions - positions[0]  # [n]
    if n > window and tail is not None:
        tail = tail | (depth[:, None] - depth[None, :] >= window)
    lost = prefix if buffer.is_gathered else min(prefix, prefix + n - window)
    if lost <= 0:
        return tail, None
    start = buffer.length - prefix
    key_positions = buffer.positions(start, start + lost, device)
    return tail, positions[:, None] - key_positions[None, :] >= window


def _matrix(
    packed: Tensor, keys: Tensor, values: Tensor, n: int, blocked: _Blocked, scoring: Scoring
) -> Tensor:
    """Attend by plain matrix products, one softmax over prefix and tail; ``packed`` is ``[kv_heads, g * n, dim]``."""
    kv_heads, rows, _ = packed.shape
    scores = torch.bmm(packed * scoring.scale, keys.mT)  # [kv_heads, g * n, prefix + n]
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    grouped = scores.view(kv_heads, rows // n, n, -1)
    tail, head = blocked
    if tail is not None:
        grouped[..., -n:].masked_fill_(tail, float("-inf"))
    if head is not None:
        grouped[..., : head.shape[1]].masked_fill_(head, float("-inf"))
    return with_sinks(torch.bmm(scores.softmax(-1), values), scores, scoring.sinks)


def with_sinks(out: Tensor, scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Rescale ``out`` ``[kv_heads, g * n, dim]`` for the weight that goes to the sinks.

    Args:
        out: Attention by the softmax of ``scores``.
        scores: ``[kv_heads, g * n, keys]``, or their log-sum-exps ``[kv_heads, g * n]``.
        sinks: ``[kv_heads * g]``.
    """
    if sinks is None:
        return out
    kv_heads, rows = scores.shape[:2]
    lse = scores.float().logsumexp(-1) if scores.dim() == 3 else scores
    sink = sinks.float().view(kv_heads, -1, 1)
    kept = torch.sigmoid(lse.view(kv_heads, sink.shape[1], -1) - sink).view(kv_heads, rows, 1)
    return (out * kept).to(out.dtype)


def _has_flash(packed: Tensor) -> bool:
    return packed.is_cuda and packed.dtype in (torch.float16, torch.bfloat16)


def _flash(
    packed: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: int,
    n: int,
    blocked: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    """Merge unmasked flash attention over the prefix with the tail's (causal if long) by log-sum-exp."""
    kv_heads, rows, dim = packed.shape
    group, scale = rows // n, scoring.scale
    key_tail, value_tail = keys[:, prefix:], values[:, prefix:]
    if blocked is None and n > 1:  # a piece of a prefill
        tail, lse_tail = _flash_op(
            packed.view(1, kv_heads * group, n, dim),
            key_tail.repeat_interleave(group, 0)[None],
            value_tail.repeat_interleave(group, 0)[None],
            scale,
            causal=True,
        )
        tail, lse_tail = tail.reshape(packed.shape), lse_tail.reshape(kv_heads, rows)
    else:
        tail, lse_tail = tail_attention(packed, key_tail, value_tail, n, blocked, scale)
    if prefix == 0:
        return with_sinks(tail, lse_tail, scoring.sinks).to(packed.dtype)
    head, lse_head = _flash_op(
        packed[None], keys[None, :, :prefix], values[None, :, :prefix], scale, causal=False
    )
    parts = (head[0], lse_head.view(kv_heads, rows)), (tail, lse_tail)
    return merged(*parts, scoring.sinks).to(packed.dtype)


def merged(
    head: tuple[Tensor, Tensor], tail: tuple[Tensor, Tensor], sinks: Tensor | None
) -> Tensor:
    """Join two outputs ``[kv_heads, rows, dim]`` by their log-sum-exps ``[kv_heads, rows]``, in float32."""
    weight = torch.sigmoid(head[1] - tail[1])[..., None]
    out = torch.lerp(tail[0].float(), head[0].float(), weight)
    return out if sinks is None else with_sinks(out, torch.logaddexp(head[1], tail[1]), sinks)


def tail_attention(
    packed: Tensor, keys: Tensor, values: Tensor, n: int, blocked: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention within the tail and its log-sum-exp, in float32."""
    kv_heads, rows, _ = packed.shape
    scores = torch.bmm(packed.float() * scale, keys.float().mT)
    if blocked is not None:
        scores.view(kv_heads, rows // n, n, n).masked_fill_(blocked, float("-inf"))
    return torch.bmm(scores.softmax(-1), values.float()), scores.logsumexp(-1)


def _flash_op(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return flash attention ``[1, heads, rows, dim]`` and its log-sum-exp ``[1, heads, rows]``."""
    if query.device.type == "cpu":
        keys = keys.contiguous()  # one copy for each prefill piece, none in decoding
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, causal, scale=scale
        )
        return out, lse
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, causal, False, scale=scale
    )
    return out, lse[..., : query.shape[2]]


AttentionInterface.register(NAME, rasd_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
