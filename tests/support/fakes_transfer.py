"""Transfer rules as their sources state them, in float64, and teachers for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rasd_integrations.decoding.steps import Steps
from rasd_integrations.decoding.teacher import TeacherModel
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel

NAMES = ("confidence", "cautious", "agreement:1", "mixture", "mixture:0.75", "rapid", "rapid:2")


def entropy(p: Tensor) -> Tensor:
    """Return the entropy of each row, a zero counting nothing."""
    return -(p * torch.where(p > 0, p, 1.0).log()).sum(-1, keepdim=True)


def gain(p: Tensor, q: Tensor, token: int) -> float:
    """Return by how much the target thought a token more likely than the teacher, in nats."""
    return float(p[token].double().log() - q[token].double().log())


def stated(name: str, p: Tensor, q: Tensor, *, greedy: bool, gains: Sequence[float] = ()) -> Tensor:
    """Return the joint distribution of rows ``[..., vocab]``; ``gains`` are those of the answer's tokens so far."""
    p, q = p.double(), q.double()
    kind, _, number = name.partition(":")
    if kind == "mixture":
        weight = float(number or 0.5)
        return weight * p + (1 - weight) * q
    if kind in ("confidence", "cautious"):
        w = 1 / (1 + (entropy(p) - entropy(q)).exp())
        w = w if kind == "confidence" else 0.5 + 0.5 * w
        return w * p + (1 - w) * q
    if kind == "agreement":
        past = sum(0.8**back * told for back, told in enumerate(reversed(gains[-32:])))
        w = 1 / (1 + (entropy(p) - entropy(q) - float(number or 0.25) * past).exp())
        return w * p + (1 - w) * q
    eta = float(number or 10)
    shift = torch.where(q < 0.1 * q.amax(-1, keepdim=True), 0.0, eta * (q - p))
    shifted = p * shift.exp()
    shifted = shifted / shifted.sum(-1, keepdim=True)
    if greedy:
        return shifted
    held = torch.minimum(q, shifted)
    left = (p - held).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    recovered = torch.where(total > 0, left / total, p)
    return held + (1 - held.sum(-1, keepdim=True)) * recovered


def teacher_of(
    model: TargetModel, vocab: int | None = None, *, own_prompt: bool = True, cache: int = 1 << 22
) -> TeacherModel:
    """Return ``model`` as a teacher; without ``own_prompt`` it may read the target's."""
    size = model.vocab_size if vocab is None else vocab
    return TeacherModel(
        model, Steps(model), PrefixCache(cache), "", size, needs_own_prompt=own_prompt
    )
