"""RAPID: a language model drafts from a short retrieved prompt (arXiv 2502.20330, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rasd_integrations.drafters.base import Drafter, Helper, Needs
from rasd_integrations.drafters.chain import ChainSession
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.types import Draft, DraftContext, TokenBlock


class ModelDrafter(Drafter):
    """Drafts chains with a language model, from its own prompt and its own keys and values."""

    name = "model"
    needs = Needs(prompt=True)

    def __init__(
        self,
        model: TargetModel,
        *,
        vocab_size: int | None = None,
        needs_own_prompt: bool = False,
        confidence: float = 0.1,
        prefix_cache: PrefixCache | None = None,
        namespace: str = "",
        allowed: Tensor | None = None,
    ) -> None:
        """Draft with ``model``.

        Args:
            model: The drafter model; may be the target itself.
            vocab_size: The target's, if it differs by padding.
            needs_own_prompt: Draft only if there is a drafter prompt. True for the target itself, which on its own
                prompt costs as much as it saves.
            confidence: A drafted token less likely than this ends the draft. It stays in the draft, since dropping
                a token after its draw would bias the output.
            prefix_cache: Keeps the drafter's keys and values between answers.
            namespace: Namespace of the prefix cache.
            allowed: ``[vocab_size]`` bool, the tokens that may be drafted; ``None`` is all.
        """
        self.model = model
        self.vocab_size = vocab_size or model.vocab_size
        self.confidence = confidence
        self.allowed = None if allowed is None else allowed.to(model.device)
        self.namespace = namespace
        self._needs_own_prompt = needs_own_prompt
        self._cache = PrefixCache(0) if prefix_cache is None else prefix_cache

    def start(self, context: DraftContext, helper: Helper | None = None) -> ModelSession:
        """Start an answer; ``helper`` drafts for this drafter."""
        own = context.drafter_prompt_ids
        prompt = own if own is not None or self._needs_own_prompt else context.prompt_ids
        if prompt is not None and not 0 < len(prompt) < self.model.window:
            prompt = None
        return ModelSession(self, self._cache, context, prompt, helper)

    def fitted(self, logits: Tensor) -> Tensor:
        """Crop or pad logits ``[n, vocab]`` to the target's vocabulary (padding differs within a family)."""
        missing = self.vocab_size - logits.shape[-1]
        if missing:  # padding by less than nothing crops
            logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        if self.allowed is None:
            return logits
        return logits.masked_fill(~self.allowed.to(logits.device), float("-inf"))


class ModelSession(ChainSession):
    """State of one answer: prompt and committed tokens, and the model's keys and values."""

    def __init__(
        self,
        drafter: ModelDrafter,
        cache: PrefixCache,
        context: DraftContext,
        prompt: Sequence[int] | None,
        helper: Helper | None,
    ) -> None:
        """Made by :meth:`ModelDrafter.start`; the prompt is prefilled at the first draft."""
        super().__init__(drafter.name, context, drafter.confidence, helper, drafter.fitted)
        self._drafter = drafter
        self._model = drafter.model
        self._ids = list(prompt or ())  # prompt and committed answer
        room, lease = len(self._ids) + 512, drafter.model.lease
        self._lease = lease(cache, self._ids, room, drafter.namespace) if self._ids else None
        self._prefilled = False
        self._guesses: tuple[int, ...] = ()  # the last draft, in the buffer

    @torch.inference_mode()
    def propose(self, budget: int) -> Draft:
        """Return a chain of at most ``budget`` tokens, with logits."""
        if self._lease is None or len(self._ids) + budget + 1 >= self._model.window:
            return self._fallback(budget)
        buffer = self._lease.buffer
        if not self._prefilled:
            for _ in self._model.prefill(self._ids[buffer.length : -1], buffer):
                pass
            self._prefilled = True
        draft = self._chain(buffer, self._ids[buffer.length :], budget)
        self._guesses = draft.token_ids
        return draft

    def observe(self, block: TokenBlock) -> None:
        """Append what the target committed and drop the rejected draft tokens."""
        self.rebase(len(self._ids), block.token_ids)
        super().observe(block)

    @property
    def ids(self) -> Sequence[int]:
        """Prompt and committed answer."""
        return self._ids

    def rebase(self, kept: int, new: Sequence[int]) -> None:
        """Replace the committed tokens from ``kept`` on by ``new``, keeping the KV of equal tokens."""
        if self._lease is None:
            return
        held = [*self._ids[kept:], *self._guesses]
        pairs = enumerate(zip(held, new, strict=False))
        agreed = next((i for i, (old, token) in pairs if old != token), min(len(held), len(new)))
        self._ids[kept:] = new
        self._lease.buffer.truncate(min(kept + agreed, len(self._ids) - 1))
        self._guesses = ()

    def close(self) -> None:
        """Return the keys and values to the cache."""
        if self._lease is not None:
            self._lease.buffer.truncate(len(self._ids))
            self._lease.release(self._ids)
            self._lease = None
        super().close()
