"""Chooses how drafts are verified, and reports what knowledge transfer changed."""

from __future__ import annotations

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
from rasd_integrations.types import Draft


class Verifier:
    """Verifies the drafts of one answer."""

    def __init__(self, params: Sampling, generator: torch.Generator, stats: DecodingStats) -> None:
        """Verify with draws of ``generator``; count in ``stats`` what transfer changes."""
        self._generator, self._stats = generator, stats
        parameters = params.temperature, params.top_p, params.top_k, params.min_p
        self._distribution = sampling_distribution(*parameters)
        self._scores = params.scored

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
        rows = [0, *(1 + node for node in verdict.accepted)]
        if self._scores:
            path = [*(draft.token_ids[node] for node in verdict.accepted), verdict.token_id]
            chances = logits[rows].float().log_softmax(-1)[range(len(path)), path]
            self._stats.logprob = (self._stats.logprob or 0.0) + float(chances.sum())
        if own is not logits:
            moved = self._distance(logits[rows], own[rows])
            self._stats.tv_bound = (self._stats.tv_bound or 0.0) + moved
        return verdict

    def _distance(self, logits: Tensor, own: Tensor) -> float:
        """Return the total variation distances of the rows' distributions, summed; greedy: differing tokens."""
        if self._distribution is None:
            pairs = zip(argmax_rows(logits), argmax_rows(own), strict=True)
            return float(sum(joint != plain for joint, plain in pairs))
        moved = self._distribution(logits) - self._distribution(own)
        return float(moved.clamp(min=0).sum())
