"""Chooses the rule that drafts are verified by."""

from __future__ import annotations

import torch
from torch import Tensor

from rasd_integrations.config import Sampling, SpeculationConfig
from rasd_integrations.engine.verification.exact import Verdict, block_verify, sample_and_walk
from rasd_integrations.engine.verification.sampling import sampling_distribution
from rasd_integrations.engine.verification.transfer import mixture_verify, rapid_verify
from rasd_integrations.errors import DecodingError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft


class Verifier:
    """Verifies the drafts of one answer."""

    def __init__(
        self,
        config: SpeculationConfig,
        params: Sampling,
        generator: torch.Generator,
        stats: DecodingStats,
    ) -> None:
        """Verify with draws of ``generator``; count in ``stats`` what transfer changes."""
        self._config, self._generator, self._stats = config, generator, stats
        self._sampling = params.temperature, params.top_p, params.top_k
        self._min_p = params.min_p
        self._distribution = sampling_distribution(*self._sampling, params.min_p)

    def verify(self, logits: Tensor, draft: Draft) -> Verdict:
        """Return the accepted path of ``draft`` and the token after it.

        Sampled chains are verified as a block, other drafts by sampling and walking; knowledge transfer has rules of
        its own.

        Args:
            logits: ``[1 + len(draft), vocab]``, constraints applied.
            draft: Chain or tree.

        Raises:
            DecodingError: Knowledge transfer is on and the draft has no logits, or no token may follow.
        """
        draft = draft.to(logits.device)
        if not self._config.lossless and self._has_logits(draft):
            return self._transfer(logits, draft)
        if self._distribution is not None and draft.probs is not None:
            return block_verify(logits, draft, self._distribution, self._generator)
        return sample_and_walk(logits, draft, self._distribution, self._generator)

    def _has_logits(self, draft: Draft) -> bool:
        if draft.logits is not None:
            return True
        if len(draft):
            msg = (
                f"Knowledge transfer needs the drafter's logits, which {draft.source!r} does not give. "
                f"Use drafter='self' or a model."
            )
            raise DecodingError(msg)
        self._stats.off_reason = (
            "the drafter is silent: tokens without its distribution follow the target's"
        )
        return False

    def _transfer(self, logits: Tensor, draft: Draft) -> Verdict:
        eta = self._config.knowledge_transfer
        rule, weight = (rapid_verify, eta) if eta else (mixture_verify, self._config.mixture)
        verdict, bound = rule(
            logits, draft, *self._sampling, weight, self._generator, self._min_p
        )  # fmt: skip
        self._stats.tv_bound = (self._stats.tv_bound or 0.0) + bound
        return verdict
