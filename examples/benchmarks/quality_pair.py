"""A target and its teacher: likelihoods of reference answers under joint distributions, and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.decoding.scoring import scores
from rasd_integrations.decoding.steps import Steps
from rasd_integrations.decoding.teacher import TeacherModel
from rasd_integrations.drafters import FusedDrafter, RecyclingDrafter, SuffixDrafter
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.runtime.models import SharedModel, shared_model
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.prompt.template import ChatTemplate
from rasd_integrations.transfer import (
    LAST_TOKENS,
    Agreement,
    Confidence,
    Mixture,
    Rapid,
    TransferRule,
    TransferState,
    transfer_rule,
)
from rasd_integrations.types import DraftContext

_CACHE = 4 << 30
_STATE = TransferState()


def product(p: Tensor, q: Tensor, _: TransferState) -> Tensor:
    """Return the normalised geometric mean."""
    return ((p.log() + q.log()) / 2).softmax(-1)


def ratio(p: Tensor, q: Tensor, _: TransferState) -> Tensor:
    """Return w * p + (1 - w) * q with w = H(q) / (H(p) + H(q))."""
    h, h_q = entropy(p)[:, None], entropy(q)[:, None]
    w = h_q / (h + h_q).clamp(min=1e-9)
    return w * p + (1 - w) * q


RULES: Mapping[str, TransferRule] = {
    "rapid 2": Rapid(2.0),
    "rapid 10": Rapid(10.0),
    "mixture 0.75": Mixture(0.75),
    "mixture 0.5": Mixture(0.5),
    "product": product,
    "confidence": Confidence(),
    "entropy ratio": ratio,
    "cautious": Confidence(0.5),
    "agreement": Agreement(),
}
TARGET, CHUNKS, BEST = "target", "chunks alone", "best of three"


def entropy(p: Tensor) -> Tensor:
    """Return the entropy of each row, in nats."""
    return -p.xlogy(p).sum(-1)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A reference answer's likelihood.

    Attributes:
        nats: Sum of the negative log-likelihoods of its tokens, by rule.
        tokens: Of each token log p, log q, H(p) and H(q): all that a rule with weights needs.
        extra: Of each token the log-likelihoods under further distributions.
    """

    nats: dict[str, float]
    tokens: list[list[float]]
    extra: dict[str, list[float]] = field(default_factory=dict)


class Pair:
    """A target that reads whole documents and a teacher that reads chunks.

    Attributes:
        template: The target's.
        room: Longest prompt of the target, in tokens.
    """

    def __init__(self, target: str, teacher: str | None, longest: int) -> None:
        """Load the models; without ``teacher`` the target teaches itself."""
        own: SharedModel = shared_model(target, {})
        other = own if teacher is None else shared_model(teacher, {})
        self.template = ChatTemplate(own.tokenizer)
        self.room = min(longest, own.target.window - 512)
        self._target, self._teacher = own.target, other.target
        self._cache = PrefixCache(_CACHE)
        self._own_cache = self._cache if teacher is None else PrefixCache(_CACHE // 4)
        shared = TeacherModel(
            other.target, Steps(other.target), self._own_cache, "", own.target.vocab_size,
            needs_own_prompt=True,
        )  # fmt: skip
        drafter = FusedDrafter([SuffixDrafter(tree=True), RecyclingDrafter(prompt=False)])
        self.decoder = SpeculativeDecoder(
            own.target, drafter, prefix_cache=self._cache, teacher=shared
        )
        self._alone = SpeculativeDecoder(other.target, drafter, prefix_cache=self._own_cache)

    @torch.inference_mode()
    def likelihood(
        self, whole: Sequence[int], short: Sequence[int], reference: str, *, others: Mapping[str, Sequence[int]],
    ) -> Likelihood:  # fmt: skip
        """Return how likely ``reference`` is.

        Args:
            whole: The target's prompt.
            short: The teacher's.
            reference: What is right.
            others: Further prompts of the teacher, whose distributions are joined in other ways.
        """
        ids = self.template.encode_chunk(reference)
        p, q = self._rows(whole, ids, False), self._rows(short, ids, True)
        at = torch.tensor(ids)[:, None]

        def logs(joint: Tensor) -> Tensor:
            return joint.gather(-1, at).squeeze(-1).clamp(min=1e-12).log()

        log_p, log_q = logs(p), logs(q)
        nats = {TARGET: -float(log_p.sum()), CHUNKS: -float(log_q.sum())}
        gains = (log_p - log_q).tolist()
        past = [gains[max(i - LAST_TOKENS, 0) : i] for i in range(len(ids))]
        state = TransferState(gains=past)
        nats |= {name: -float(logs(rule(p, q, state)).sum()) for name, rule in RULES.items()}
        rows = torch.stack([log_p, log_q, entropy(p), entropy(q)], -1)
        tokens = [[round(x, 4) for x in row] for row in rows.tolist()]
        more = {name: self._rows(prompt, ids, True) for name, prompt in others.items()}
        extra = {
            name: [round(x, 4) for x in logs(joint).tolist()]
            for name, joint in _further(p, q, more).items()
        }
        return Likelihood(nats, tokens, extra)

    def answer(
        self,
        rule: str,
        whole: Sequence[int],
        short: Sequence[int],
        max_tokens: int,
        *,
        drafting: bool = True,
    ) -> tuple[str, DecodingStats]:
        """Return the greedy answer under ``rule``, or of the target or the chunks alone."""
        stats = DecodingStats()
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, drafting=drafting, scored=True
        )
        decoder, prompt = (self._alone, short) if rule == CHUNKS else (self.decoder, whole)
        transfer = None if rule in (TARGET, CHUNKS) else RULES.get(rule) or transfer_rule(rule)
        context = DraftContext(prompt_ids=(), drafter_prompt_ids=tuple(short))
        blocks = decoder.generate(
            prompt, params, context=context, stats=stats,
            config=SpeculationConfig(knowledge_transfer=transfer),
        )  # fmt: skip
        return self._text([token for block in blocks for token in block.token_ids]), stats

    def best(
        self, whole: Sequence[int], sets: Sequence[Sequence[int]], max_tokens: int
    ) -> tuple[str, DecodingStats]:
        """Return the best of the teacher's answers to ``sets``, ranked as ``mode="speculative-rag"`` ranks them."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, scored=True)
        stats, found, own = DecodingStats(), [], []
        for prompt in sets:
            told = DecodingStats()
            blocks = self._alone.generate(prompt, params, stats=told)
            found.append([token for block in blocks for token in block.token_ids])
            own.append((told.logprob or 0.0) / max(len(found[-1]), 1))
            stats.add_work(told)
        given_all = scores(self.decoder, whole, found)
        best = max(range(len(found)), key=lambda n: own[n] + given_all[n])
        stats.generated_tokens = len(found[best])
        return self._text(found[best]), stats

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.template.tokenizer.decode([*ids], skip_special_tokens=True)).strip()

    def _rows(self, prompt: Sequence[int], ids: Sequence[int], teaches: bool) -> Tensor:
        """Return the distributions ``[len(ids), vocab]`` that predict ``ids`` behind ``prompt``."""
        model = self._teacher if teaches else self._target
        cache = self._own_cache if teaches else self._cache
        lease = model.lease(cache, prompt, len(prompt) + len(ids), "")
        for _ in model.prefill(prompt[lease.buffer.length : -1], lease.buffer):
            pass
        logits = model.step([prompt[-1], *ids[:-1]], lease.buffer).float()
        lease.release(prompt[:-1])
        size, width = self._target.vocab_size, logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, size - width), value=float("-inf")).softmax(-1)


def _further(p: Tensor, q: Tensor, more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return joint distributions of more than two: contrast with no chunks, one teacher a set of chunks."""
    out: dict[str, Tensor] = {}
    if (bare := more.get("empty")) is not None:
        for strength in (
            0.25,
            0.5,
        ):  # context-aware decoding (arXiv 2305.14739): chunks against none
            contrast = ((1 + strength) * q.log() - strength * bare.log()).nan_to_num(-100.0)
            out[f"contrast {strength}"] = Confidence(0.5)(p, contrast.softmax(-1), _STATE)
    sets = [q_set for name, q_set in more.items() if name.startswith("set ")]
    if sets:
        stack = torch.stack(sets)
        weights = (-torch.stack([entropy(s) for s in sets])).softmax(0)[..., None]
        out["sets, mixture"] = Confidence(0.5)(p, stack.mean(0), _STATE)
        out["sets, surest"] = Confidence(0.5)(p, (weights * stack).sum(0), _STATE)
        joint = stack.clamp(min=1e-12).log().mean(0).softmax(-1)
        out["sets, product"] = Confidence(0.5)(p, joint, _STATE)
    return out


def measures(stats: DecodingStats) -> dict[str, Any]:
    """Return what a result keeps of an answer's statistics."""
    return {
        "tokens": stats.generated_tokens,
        "decode_s": round(stats.draft_s + stats.verify_s, 4),
        "changed": round(stats.changed_share, 4),
        "logprob": round((stats.logprob or 0.0) / max(stats.generated_tokens, 1), 4),
        "tokens_a_step": round(stats.mean_acceptance_length, 3),
    }
