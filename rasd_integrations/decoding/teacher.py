"""Follows an answer with the teacher of knowledge transfer, the model that reads only the retrieved chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rasd_integrations.decoding.steps import Steps
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import Lease, PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import DecodingError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.transfer import LAST_TOKENS, TransferRule, TransferState
from rasd_integrations.types import Draft, DraftContext

_LEAST = 1e-12  # of a probability, so that its logarithm is finite


@dataclass(frozen=True, slots=True)
class TeacherModel:
    """What all answers' teachers share.

    Attributes:
        model: The teacher; may be the target itself.
        steps: Of the teacher.
        cache: Keys and values of its earlier prompts.
        namespace: Of the cache.
        vocab_size: The target's, if it differs by padding.
        needs_own_prompt: True for the target itself: on the target's prompt it says what the target says.
    """

    model: TargetModel
    steps: Steps
    cache: PrefixCache
    namespace: str
    vocab_size: int
    needs_own_prompt: bool

    def start(
        self,
        prompt_ids: Sequence[int],
        rule: TransferRule,
        temperature: float,
        context: DraftContext,
        stats: DecodingStats,
    ) -> Teacher | None:
        """Return the teacher of one answer; ``None``, with the reason in ``stats``, if it has nothing to read."""
        stats.tv_bound = stats.tv_bound or 0.0  # an answer may be decoded in several parts
        own = context.drafter_prompt_ids
        ids = own if own is not None or self.needs_own_prompt else prompt_ids
        if ids is None:
            stats.transfer_off_reason = stats.transfer_off_reason or "no chunks were retrieved"
        elif not 0 < len(ids) < self.model.window:
            stats.transfer_off_reason = (
                f"the teacher's prompt has {len(ids)} tokens, and its window {self.model.window}"
            )
        else:
            stats.transfer_off_reason = None
            return Teacher(self, ids, rule, temperature, stats)
        return None


class Teacher:
    """One answer's teacher; its keys and values follow the committed tokens as the target's do."""

    def __init__(
        self,
        shared: TeacherModel,
        prompt: Sequence[int],
        rule: TransferRule,
        temperature: float,
        stats: DecodingStats,
    ) -> None:
        """Follow the answer to ``prompt``, joined with the target's distribution by ``rule``."""
        self._shared, self._rule = shared, rule
        self._temperature, self._stats = temperature, stats
        self._is_full = False
        self._ids, self._num_prompt = list(prompt), len(prompt)
        self._lease: Lease | None = None
        self._kept = 0  # tokens that a later prompt may reuse
        self._gains: tuple[float, ...] = ()  # log p - log q of the last tokens
        self._p = self._q = torch.empty(0)  # of the last step

    def read(self) -> Iterator[None]:
        """Prefill the prompt and what was committed since; other answers run between yields."""
        self.close()
        shared, capacity = self._shared, len(self._ids) + 512
        lease = shared.model.lease(shared.cache, self._ids, capacity, shared.namespace)
        lease.cut(shared.steps.kept(lease.reused))
        self._lease, self._kept = lease, shared.steps.kept(len(self._ids) - 1)
        started = time.perf_counter()
        for _ in shared.steps.prefill(self._ids, lease.buffer, first=False):
            self._stats.prefill_s += time.perf_counter() - started
            self._stats.total_s += time.perf_counter() - started
            yield None
            started = time.perf_counter()

    @property
    def room(self) -> int:
        """Longest draft of the next step."""
        full = self._is_full
        return (
            self._shared.model.window if full else max(self._shared.steps.room(len(self._ids)), 0)
        )

    def step_with(
        self, steps: Steps, ids: Sequence[int], draft: Draft, buffer: KVBuffer, rows: int
    ) -> tuple[Tensor, Tensor | None]:
        """Run the target's step by ``steps`` and the teacher's, as one forward if one model is both.

        Args:
            steps: The target's.
            ids: Prompt and answer as the target reads them.
            draft: Chain or tree.
            buffer: The target's keys and values.
            rows: Pad the steps to this width.

        Returns:
            Logits ``[1 + len(draft), vocab]`` of the target, and of the teacher over the target's vocabulary; ``None``
            once its window is full.
        """
        shared = self._shared
        if not self._is_full and shared.steps.room(len(self._ids)) < 0:
            self._is_full = True
            self._stats.transfer_off_reason = "the teacher's window is full"
            self.close()
        if self._is_full:
            return steps.step(ids, draft, buffer, rows), None
        own = self._current()
        logits, theirs = steps.step_both(ids, buffer, shared.steps, self._ids, own, draft, rows)
        missing = shared.vocab_size - theirs.shape[-1]
        if missing:  # padding by less than nothing crops
            theirs = torch.nn.functional.pad(theirs, (0, missing), value=float("-inf"))
        return logits, theirs

    def _current(self) -> KVBuffer:
        """Return the keys and values, read again past the longrope border."""
        lease = self._lease
        if lease is None or (self._shared.model.is_long(self._ids) and not lease.buffer.long_rope):
            for _ in self.read():
                pass
            return self._current()
        return lease.buffer

    def joined(self, logits: Tensor, own: Tensor, draft: Draft) -> Tensor:
        """Return the logarithm of the joint distribution ``[1 + len(draft), vocab]``, not normalised.

        Args:
            logits: Of the target, processed.
            own: Of the teacher, processed.
            draft: What both ran.

        Raises:
            DecodingError: The rule returns no distribution.
        """
        p = logits.float().softmax(-1)
        q = own.to(logits.device).float().softmax(-1).nan_to_num(0.0)  # NaN: no token was left
        q = q.masked_fill(logits == float("-inf"), 0.0)
        total = q.sum(-1, keepdim=True)
        q = torch.where(total > 0, q / total, p)
        self._p, self._q = p, q
        paths: list[tuple[int, ...]] = [()]
        gains = [self._gains]
        before = [parent + 1 for parent in draft.parent_of]
        gained = self._gained(before, draft.token_ids)
        for row, token, gain in zip(before, draft.token_ids, gained, strict=True):
            paths.append((*paths[row], token))
            gains.append((*gains[row], gain)[-LAST_TOKENS:])
        answer = tuple(self._ids[self._num_prompt :])
        state = TransferState(answer, paths, self._temperature, gains)
        try:
            joint = self._rule(p, q, state)
            fits = joint.shape == p.shape and bool((joint >= 0).all())
        except Exception as err:  # the user's own code
            msg = f"The transfer rule {self._rule!r} failed: {type(err).__name__}: {err}"
            raise DecodingError(msg) from err
        if not fits:
            msg = (
                f"The transfer rule {self._rule!r} returned shape {tuple(joint.shape)} for distributions of "
                f"{tuple(p.shape)}, or negative or NaN values, but must return probabilities of their shape."
            )
            raise DecodingError(msg)
        return joint.log()

    def _gained(self, rows: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Return log p - log q of ``tokens``, each by its row of the last step."""
        p, q = (d[[*rows], [*tokens]].clamp(min=_LEAST).log() for d in (self._p, self._q))
        gained: list[float] = (p - q).tolist()
        return gained

    def commit(self, accepted: Sequence[int], tokens: Sequence[int]) -> None:
        """Keep the accepted nodes of the last step; ``tokens`` are those committed, the last one new."""
        if self._lease is not None:
            rows = [0, *(1 + node for node in accepted[: len(tokens) - 1])]
            self._lease.buffer.commit(rows)
            self._gains = (*self._gains, *self._gained(rows, tokens))[-LAST_TOKENS:]
        self._ids.extend(tokens)

    def close(self) -> None:
        """Return keys and values to the cache."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release(self._ids[: self._kept])
            self._shared.model.leave()
