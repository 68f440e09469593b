"""Knowledge transfer (RAPID): verify against a target distribution shifted towards the drafter's. Lossy.

Wherever the drafter's logits are known, the token follows one distribution of (target logits, drafter logits),
whatever was drafted; its total variation distance from the target's, summed over the emitted positions, is returned.
Elsewhere it is the target's own distribution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rasd_integrations.engine.verification.exact import (
    Verdict,
    argmax_rows,
    checked,
    residual,
    walk,
)
from rasd_integrations.engine.verification.sampling import (
    Distribution,
    bernoulli,
    draw,
    sampling_distribution,
)
from rasd_integrations.types import Draft

_Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From p and q: the distribution that drafted tokens are verified against, and the one recovered from."""


def guarded_shift(p: Tensor, q: Tensor, eta: float, alpha: float = 0.1) -> Tensor:
    """Return eta * (q - p), zero where q < alpha * max q.

    One step of distilling the drafter into the target's logits (arXiv 2502.20330, and its code's guard).

    Args:
        p: Of the target, ``[..., vocab]``.
        q: Of the drafter, same shape.
        eta: Strength, in nats.
        alpha: Share of the drafter's maximum.
    """
    shift = eta * (q - p)
    return shift.masked_fill(q < alpha * q.amax(-1, keepdim=True), 0.0)


def rapid_verify(
    logits: Tensor,
    draft: Draft,
    temperature: float,
    top_p: float,
    top_k: int,
    eta: float,
    generator: torch.Generator | None = None,
    min_p: float = 0.0,
) -> tuple[Verdict, float]:
    """Verify a chain by RAPID's rule (arXiv 2502.20330): p shifted by eta * (q - p), guarded.

    Greedy takes the arg max of the shifted logits. Sampling accepts x with min(1, p_hat(x) / q(x))
    and recovers from (p - min(q, p_hat))+; its one-step distribution is m + (1 - sum m) * norm((p - m)+) with
    m = min(q, p_hat), from which the token after the draft is drawn too.

    Args:
        logits: ``[1 + num_nodes, vocab]``.
        draft: A chain with ``logits``, and with ``probs`` if it was sampled.
        temperature: 0 is greedy; the softmaxes of the shift are then at temperature 1.
        top_p: Nucleus of p and q.
        top_k: Of p and q; 0 is off.
        eta: Strength, in nats; 0 gives p.
        generator: Source of the draws.
        min_p: Of p and q; 0 is off.

    Returns:
        The verdict, and the total variation distance from p summed over the emitted positions.

    Raises:
        DecodingError: No token may follow a visited position.
    """
    distribution = sampling_distribution(temperature, top_p, top_k, min_p)
    if distribution is None:
        return _greedy(logits, draft, lambda z, p, q: z + guarded_shift(p, q, eta))

    def rule(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return (p.log() + guarded_shift(p, q, eta)).softmax(-1), p

    return _sampled(logits, draft, distribution, rule, generator)


def mixture_verify(
    logits: Tensor,
    draft: Draft,
    temperature: float,
    top_p: float,
    top_k: int,
    weight: float,
    generator: torch.Generator | None = None,
    min_p: float = 0.0,
) -> tuple[Verdict, float]:
    """Verify a chain against the distribution weight * p + (1 - weight) * q, which is followed exactly.

    Arguments, returns and errors are those of :func:`rapid_verify`; ``weight`` is in (0, 1], 1 gives p.
    """
    distribution = sampling_distribution(temperature, top_p, top_k, min_p)
    if distribution is None:
        return _greedy(logits, draft, lambda _z, p, q: weight * p + (1 - weight) * q)

    def rule(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        mixed = weight * p + (1 - weight) * q
        return mixed, mixed

    return _sampled(logits, draft, distribution, rule, generator)


def one_step_distribution(q: Tensor, held: Tensor, recovery: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distribution of the emitted token, and the unnormalised one after a rejection.

    A token x drawn from ``q`` is accepted with min(1, held(x) / q(x)), else one is drawn from the rest of ``recovery``.
    """
    covered = torch.minimum(q, held)
    left = residual(recovery, covered, otherwise=recovery)
    return covered + (1 - covered.sum()).clamp(min=0) * left / left.sum(), left


def _greedy(
    logits: Tensor, draft: Draft, score: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> tuple[Verdict, float]:
    """Walk along the arg max of ``score(z, p, q)``, all distributions at temperature 1."""
    known = _rows_known(draft)
    z = logits[:known].float()
    p = z.softmax(-1)
    plain = argmax_rows(logits)
    best = plain
    if known and draft.logits is not None:
        q = _allowed(draft.logits.float().softmax(-1), z, p)
        best = argmax_rows(score(z, p, q)) + plain[known:]
    verdict = walk(draft, lambda row: checked(best[row]))
    rows = range(len(verdict.accepted) + 1)
    return verdict, float(sum(best[row] != plain[row] for row in rows))


def _sampled(
    logits: Tensor,
    draft: Draft,
    distribution: Distribution,
    rule: _Rule,
    generator: torch.Generator | None,
) -> tuple[Verdict, float]:
    """Walk with the one-step distribution of ``rule``; a sampled token is accepted or recovered from."""
    known = _rows_known(draft)
    moved: list[Tensor] = []

    def choose(row: int) -> int:
        p = distribution(logits[row])
        if row >= known or draft.logits is None:
            return int(draw(p, generator))
        sampled = draft.probs is not None and row < len(draft)
        source = (
            draft.probs[row]
            if draft.probs is not None and sampled
            else distribution(draft.logits[row])
        )
        q = source.nan_to_num(0.0)  # NaN of a broken drafter counts as 0
        held, recovery = rule(p, _allowed(q, logits[row], p))
        out, left = one_step_distribution(q, held, recovery)
        moved.append((out - p).clamp(min=0).sum())
        if not sampled:
            return int(draw(out, generator))
        token = draft.token_ids[row]
        held_x, q_x = torch.stack([held[token], q[token]]).tolist()
        if bernoulli([held_x / q_x if q_x > 0 else 0.0], generator)[0]:
            return token
        return int(draw(left, generator))

    verdict = walk(draft, choose)
    return verdict, sum(float(m) for m in moved)


def _rows_known(draft: Draft) -> int:
    return 0 if draft.logits is None else draft.logits.shape[0]


def _allowed(q: Tensor, logits: Tensor, p: Tensor) -> Tensor:
    """Return q over the tokens that the target's mask leaves, or p where q has no mass."""
    q = q.masked_fill(logits == float("-inf"), 0.0)
    total = q.sum(-1, keepdim=True)
    return torch.where(total > 0, q / total, p)
