"""Logits to a sampling distribution, and a distribution to a token: pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rasd_integrations.errors import DecodingError

Distribution = Callable[[Tensor], Tensor]
"""Turns logits ``[..., vocab]`` into probabilities of the same shape, float32."""

# Sorting a vocabulary of 152K takes 11 ms a row on a CPU core, finding its top 1024 takes 0.6 ms.
_NUCLEUS_CANDIDATES = 1024


def process_logits(
    logits: Tensor, temperature: float, top_p: float, top_k: int, min_p: float = 0.0
) -> Tensor:
    """Return the distribution after temperature, top-k, top-p and min-p, in transformers' order.

    Of equal tokens top-k keeps all, as there; top-p keeps as many as there, the first ones (transformers' sort is
    unstable). A row without a finite logit becomes NaN, which :func:`draw` refuses.

    Args:
        logits: ``[..., vocab]``, any float type; ``-inf`` masks a token.
        temperature: 0 gives the one-hot distribution of the arg max, the first of ties.
        top_p: Nucleus in (0, 1]; 1 is off.
        top_k: Tokens kept; 0 is off.
        min_p: Least probability of a token kept, as a share of the most likely one's; 0 is off.

    Returns:
        ``[..., vocab]`` float32, each row sums to 1.
    """
    if temperature == 0:
        best = logits.max(dim=-1, keepdim=True).indices
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    scores = logits.float()
    # Less the maximum first, so that a tiny temperature stays finite.
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], float("-inf"))
    probs = scores.softmax(-1)
    if top_p < 1:
        probs = probs * _nucleus(probs, top_p)
        probs = probs / probs.sum(-1, keepdim=True)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sampling_distribution(
    temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Distribution | None:
    """Return the distribution of these parameters; ``None`` if greedy, which needs no probabilities."""
    if temperature == 0:
        return None
    return partial(process_logits, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one index a row by inverting the cumulative distribution: one uniform number a row.

    With a generator on the CPU the numbers are the same on every device. Rows need not sum to 1.

    Args:
        probs: ``[..., vocab]``, non-negative.
        generator: On the CPU or on the device of ``probs``; ``None`` is torch's global one.

    Returns:
        ``[...]`` int64.

    Raises:
        DecodingError: A row has no positive mass, or is not a number.
    """
    uniform = uniform_numbers(probs.shape[:-1], generator).to(probs.device)
    index = sample_by_inverse_cdf(probs, uniform)
    if bool((index < 0).any()):
        raise no_token_error()
    return index


def sample_by_inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Return the first index whose cumulative probability exceeds ``uniform``, ``[...]``; -1 in a row without mass."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:].contiguous()
    # A number under 1 times the total never rounds up to it, so the index is one of positive mass.
    index = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * total, right=True)
    return index.masked_fill(~(total > 0), -1).squeeze(-1)


def bernoulli(chances: Sequence[float], generator: torch.Generator | None) -> list[bool]:
    """Draw one event for each probability; 1 and over is certain."""
    uniform = uniform_numbers((len(chances),), generator).tolist()
    return [u < chance for u, chance in zip(uniform, chances, strict=True)]


def rewind_generator(generator: torch.Generator, before: Tensor, used: int) -> None:
    """Rewind ``generator`` to the state ``before`` and advance it by ``used`` draws."""
    generator.set_state(before)
    uniform_numbers((used,), generator)


def no_token_error() -> DecodingError:
    """Return the error for a position that no token may follow."""
    return DecodingError(
        "No token has a positive probability: every logit is masked or not a number. Check the "
        "grammar or the logits processors; if there are none, the model overflows: load it in "
        "bfloat16 or float32."
    )


def uniform_numbers(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Return float64 numbers in [0, 1), drawn on the generator's device."""
    device = generator.device if generator is not None else None
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Return the mask of the fewest most likely tokens whose mass reaches ``top_p``."""
    vocab = probs.shape[-1]
    # On a GPU a full sort is faster than asking whether it is needed.
    few = _NUCLEUS_CANDIDATES if probs.device.type == "cpu" else vocab
    values = probs.topk(min(few, vocab)).values
    if values.shape[-1] < vocab and not bool((values.sum(-1) > top_p).all()):
        values = probs.sort(-1, descending=True).values
    before = values.cumsum(-1, dtype=torch.float64) - values
    count = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    least = values.gather(-1, count - 1)
    above, tied = probs > least, probs == least
    places = count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= places))
