"""Chooses how drafts are verified; reports log-probabilities and what knowledge transfer changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rasd_integrations.config import Sampling
from rasd_integrations.engine.verification.exact import (
    Verdict,
    argmax_rows,
    block_verify,
    sample_and_walk,
)
from rasd_integrations.engine.verification.sampling import sampling_distribution
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft, TokenLogprob


class Verifier:
    """Verifies the drafts of one answer."""

    def __init__(self, params: Sampling, generator: torch.Generator, stats: DecodingStats) -> None:
        """Verify with draws of ``generator``; count in ``stats`` what transfer changes."""
        self._generator, self._stats = generator, stats
        parameters = params.temperature, params.top_p, params.top_k, params.min_p
        self._distribution = sampling_distribution(*parameters)
        self._scores, self._top = params.scored, params.top_logprobs

    def verify(self, logits: Tensor, draft: Draft, own: Tensor) -> Verdict:
        """Return the accepted path of ``draft`` and the token after it.

        Sampled chains are verified as a block, other drafts by sampling and walking.

        Args:
            logits: ``[1 + len(draft), vocab]`` of what the answer follows, constraints applied.
            draft: Chain or tree.
            own: The target's, constraints applied; the same tensor unless knowledge transfer is on.

        Raises:
            DecodingError: No token may follow.
        """
        draft = draft.to(logits.device)
        if self._distribution is not None and draft.probs is not None:
            verdict = block_verify(logits, draft, self._distribution, self._generator)
        else:
            verdict = sample_and_walk(logits, draft, self._distribution, self._generator)
        if own is not logits:
            rows = _rows(verdict.accepted)
            moved = self._distance(logits[rows], own[rows])
            self._stats.tv_bound = (self._stats.tv_bound or 0.0) + moved
        return verdict

    def logprobs(
        self, logits: Tensor, accepted: Sequence[int], tokens: Sequence[int]
    ) -> tuple[TokenLogprob, ...]:
        """Return what is to be reported of each token; add their sum to the statistics if that is.

        Args:
            logits: As verified.
            accepted: The nodes that were committed.
            tokens: All tokens that were committed.
        """
        if not self._scores and self._top is None:
            return ()
        table = logits[_rows(accepted)[: len(tokens)]].float().log_softmax(-1)
        chances = table[range(len(tokens)), tokens].tolist()
        if self._scores:
            self._stats.logprob = (self._stats.logprob or 0.0) + sum(chances)
        if self._top is None:
            return ()
        best = table.topk(min(self._top, table.shape[-1]))
        tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(
            TokenLogprob(token, chance, tuple(_possible(*top)))
            for token, chance, top in zip(tokens, chances, tops, strict=True)
        )

    def _distance(self, logits: Tensor, own: Tensor) -> float:
        """Return the total variation distances of the rows' distributions, summed; greedy: differing tokens."""
        if self._distribution is None:
            pairs = zip(argmax_rows(logits), argmax_rows(own), strict=True)
            return float(sum(joint != plain for joint, plain in pairs))
        moved = self._distribution(logits) - self._distribution(own)
        return float(moved.clamp(min=0).sum())


def _rows(accepted: Sequence[int]) -> list[int]:
    """Return the rows of the logits that gave the accepted tokens, and the one after them."""
    return [0, *(1 + node for node in accepted)]


def _possible(ids: Sequence[int], chances: Sequence[float]) -> Iterator[tuple[int, float]]:
    """Yield the pairs of those that may follow."""
    return ((i, c) for i, c in zip(ids, chances, strict=True) if c > float("-inf"))
