"""Knowledge transfer: rules that join the target's distribution with that of a teacher. Lossy.

The teacher is a model that reads only the retrieved chunks: the target itself or a drafter model. A rule maps p (of the
target) and q (of the teacher), both processed and at temperature 1, to the distribution that the answer follows;
temperature, top-k, top-p and min-p apply to it as to a model's own. Measured: ``docs/explanation/transfer.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rasd_integrations.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

LAST_TOKENS = 32
"""Tokens of the answer whose gains a rule sees."""
_LOSSLESS = "none"
_OBJECT = "<transfer rule: "


@dataclass(frozen=True, slots=True)
class TransferState:
    """What a rule may know besides the two distributions.

    Attributes:
        answer: Committed tokens of the answer.
        drafted: For each row the drafted tokens between them and the row's own token.
        temperature: Of the call; 0 is greedy.
        gains: For each row log p - log q of the answer's tokens before it, drafted ones too; the last 32.
    """

    answer: Sequence[int] = ()
    drafted: Sequence[Sequence[int]] = ()
    temperature: float = 0.0
    gains: Sequence[Sequence[float]] = ()


class TransferRule(Protocol):
    """A joint distribution: a function of the context alone, so that no draft changes what is said."""

    def __call__(self, p: Tensor, q: Tensor, state: TransferState, /) -> Tensor:
        """Return the joint distribution ``[rows, vocab]``, not negative; it is normalised afterwards.

        Args:
            p: Of the target, ``[rows, vocab]`` float32.
            q: Of the teacher, same shape; p itself in rows where the teacher gives no allowed token.
            state: The answer so far, and the drafted tokens before each row.
        """
        ...


@dataclass(frozen=True, slots=True)
class Mixture:
    """Join as weight * p + (1 - weight) * q.

    Attributes:
        weight: Of the target, in [0, 1]; 1 is p.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        """Check the range."""
        _check(0 <= self.weight <= 1, "weight", self.weight, "in [0, 1]")

    def __call__(self, p: Tensor, q: Tensor, state: TransferState, /) -> Tensor:
        """Return the mixture."""
        return q + self.weight * (p - q)

    def __str__(self) -> str:
        """Return the name that the option takes."""
        return f"mixture:{self.weight:g}"


@dataclass(frozen=True, slots=True)
class Confidence:
    """Join as w * p + (1 - w) * q, where the model that is surer at this token has the larger weight.

    w = least + (1 - least) / (1 + exp(H(p) - H(q))), with the entropies H in nats.

    Attributes:
        least: Least weight of the target, in [0, 1]; "cautious" is a half.
    """

    least: float = 0.0

    def __post_init__(self) -> None:
        """Check the range."""
        _check(0 <= self.least <= 1, "least", self.least, "in [0, 1]")

    def __call__(self, p: Tensor, q: Tensor, state: TransferState, /) -> Tensor:
        """Return the mixture."""
        surer = (_entropy(q) - _entropy(p)).sigmoid()
        return q + (self.least + (1 - self.least) * surer) * (p - q)

    def __str__(self) -> str:
        """Return the name that the option takes."""
        return f"confidence:{self.least:g}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Join as "confidence" does, and trust more the model that foresaw the answer's last tokens.

    w = 1 / (1 + exp(H(p) - H(q) - strength * sum_k decay^k (log p - log q of the k-th token back)))

    Attributes:
        strength: Of the last tokens; 0 is "confidence".
        decay: Share of a token's say that is left one token later, in [0, 1].
    """

    strength: float = 0.25
    decay: float = 0.8

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check(0 <= self.strength < math.inf, "strength", self.strength, "at least 0, and finite")
        _check(0 <= self.decay <= 1, "decay", self.decay, "in [0, 1]")

    def __call__(self, p: Tensor, q: Tensor, state: TransferState, /) -> Tensor:
        """Return the mixture."""
        past = p.new_tensor([self._past(gains) for gains in state.gains] or [0.0])[:, None]
        weight = (_entropy(q) - _entropy(p) + self.strength * past).sigmoid()
        return q + weight * (p - q)

    def _past(self, gains: Sequence[float]) -> float:
        past = 0.0
        for gain in gains:
            past = self.decay * past + gain
        return past

    def __str__(self) -> str:
        """Return the name that the option takes."""
        return f"agreement:{self.strength:g}"


@dataclass(frozen=True, slots=True)
class Rapid:
    """Shift the target's logits by eta * (q - p): RAPID (arXiv 2502.20330, section 3.3, and its code's guard).

    Greedy follows the shifted distribution p'. Sampling follows what RAPID's acceptance emits, m + (1 - sum m) * norm
    ((p - m)+) with m = min(q, p').

    Attributes:
        eta: Strength, in nats; 0 is p.
        guard: No shift where q is below this share of its maximum.
    """

    eta: float = 10.0
    guard: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check(0 <= self.eta < math.inf, "eta", self.eta, "at least 0, and finite")
        _check(0 <= self.guard <= 1, "guard", self.guard, "in [0, 1]")

    def __call__(self, p: Tensor, q: Tensor, state: TransferState, /) -> Tensor:
        """Return the shifted distribution, or what sampling from it by acceptance emits."""
        shift = (self.eta * (q - p)).masked_fill(q < self.guard * q.amax(-1, keepdim=True), 0.0)
        shifted = (p.log() + shift).softmax(-1)
        if state.temperature == 0:
            return shifted
        held = shifted.minimum(q)
        left = (p - held).clamp(min=0)
        rest = 1 - held.sum(-1, keepdim=True)
        # Where p, q and p' agree nothing is left, and next to nothing is refused.
        return held + rest.clamp(min=0) * left / left.sum(-1, keepdim=True).clamp(min=1e-12)

    def __str__(self) -> str:
        """Return the name that the option takes."""
        return f"rapid:{self.eta:g}"


_RULES: Mapping[str, Callable[..., TransferRule]] = {
    "confidence": Confidence,
    "cautious": lambda least=0.5: Confidence(least),
    "agreement": Agreement,
    "mixture": Mixture,
    "rapid": Rapid,
}


def transfer_rule(spec: Any, option: str = "knowledge_transfer") -> TransferRule | None:
    """Return the rule that ``spec`` names; ``None`` and "none" are lossless.

    Args:
        spec: A name, perhaps with a number ("mixture:0.75": its weight; "rapid:20": its eta), a
            :class:`TransferRule`, or ``None``.
        option: Named in the error.

    Raises:
        ConfigurationError: It names no rule, or the number is out of range.
    """
    if spec is None or spec == _LOSSLESS:
        return None
    if callable(spec) and not isinstance(spec, type):
        rule: TransferRule = spec
        return rule
    name, _, number = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if name not in _RULES:
        eta = f" For RAPID's eta give 'rapid:{spec}'." if isinstance(spec, int | float) else ""
        msg = (
            f"{option} is {spec!r}, but must be None, {', '.join(map(repr, _RULES))} (with a number: 'mixture:0.75', "
            f"'rapid:20'), or a function of (p, q, state).{eta}"
        )
        raise ConfigurationError(msg)
    if not number:
        return _RULES[name]()
    try:
        value = float(number)
    except ValueError as err:
        msg = f"{option} is {spec!r}, but behind the colon must be a number."
        raise ConfigurationError(msg) from err
    return _RULES[name](value)


def rule_name(spec: Any) -> str | None:
    """Return ``spec`` as settings and cache keys hold it; what its text cannot say, as a function, is marked."""
    rule = transfer_rule(spec)
    if rule is None:
        return None
    if isinstance(rule, Agreement | Confidence | Mixture | Rapid):
        return str(rule) if transfer_rule(str(rule)) == rule else f"{_OBJECT}{rule!r}>"
    name = getattr(rule, "__qualname__", type(rule).__qualname__)
    return f"{_OBJECT}{name}>"


def _entropy(p: Tensor) -> Tensor:
    """Return the entropies ``[rows, 1]``, in nats."""
    return -p.xlogy(p).sum(-1, keepdim=True)


def _check(ok: bool, name: str, value: float, limit: str) -> None:
    if not ok:
        msg = f"{name} is {value!r}, but must be {limit}."
        raise ConfigurationError(msg)
