"""RAPID's drafter: a language model that reads a short retrieved prompt (arXiv 2502.20330, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rasd_integrations.drafters.base import Helper
from rasd_integrations.engine.constraints import chain_masks, forced_after, mask_rows
from rasd_integrations.engine.prefix_cache import PrefixCache
from rasd_integrations.engine.sampling import process_logits, sampling_law
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification import sample_and_walk
from rasd_integrations.types import Draft, DraftContext, TokenBlock

_HELPER_TOKENS = 8


class ModelDrafter:
    """Drafts chains with a language model, from its own prompt and its own keys and values.

    The draft is the model's own answer, greedy or sampled as the target's: token ``i`` is drawn from
    its law q after the same processors, and q travels with a sampled draft.

    Attributes:
        name: In the statistics.
        wants_prompt: Whether a short prompt of its own should be made for each answer.
    """

    name = "model"
    wants_prompt = True

    def __init__(
        self,
        model: TargetModel,
        *,
        vocab_size: int | None = None,
        needs_own_prompt: bool = False,
        confidence: float = 0.1,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """Draft with ``model``.

        Args:
            model: The drafter model; may be the target itself.
            vocab_size: The target's, where it differs by padding.
            needs_own_prompt: Draft only where there is a drafter prompt. True for the target itself:
                on the target's own prompt it costs as much as it saves.
            confidence: A drafted token less likely than this ends the draft; it stays in the draft,
                which keeps the stop sound (algorithms.md 8.3).
            prefix_cache: Keeps the drafter's keys and values between answers.
        """
        self.model = model
        self.vocab_size = vocab_size or model.vocab_size
        self.confidence = confidence
        self._needs_own_prompt = needs_own_prompt
        self._cache = PrefixCache(0) if prefix_cache is None else prefix_cache

    def start(self, context: DraftContext, helper: Helper | None = None) -> ModelSession:
        """Begin an answer; ``helper`` drafts for the drafter."""
        own = context.drafter_prompt_ids
        prompt = own if own is not None or self._needs_own_prompt else context.prompt_ids
        if prompt is not None and not 0 < len(prompt) < self.model.window:
            prompt = None
        return ModelSession(self, self._cache, context, prompt, helper)


class ModelSession:
    """A model drafter at work on one answer."""

    def __init__(
        self,
        drafter: ModelDrafter,
        cache: PrefixCache,
        context: DraftContext,
        prompt: Sequence[int] | None,
        helper: Helper | None,
    ) -> None:
        """Made by :meth:`ModelDrafter.start`; the prompt is prefilled at the first draft."""
        self._drafter = drafter
        self._model = drafter.model
        self._context = context
        self._helper = helper
        self._grammar = context.grammar
        self._ids = list(prompt or ())  # prompt and committed answer
        self._active = bool(self._ids)
        self._lease = cache.lease(self._ids, len(self._ids) + 512) if self._active else None
        self._prefilled = False
        self._law = sampling_law(context.temperature, context.top_p, context.top_k)
        self._generator = torch.Generator().manual_seed(context.seed)
        self.forwards = 0

    @torch.inference_mode()
    def propose(self, budget: int) -> Draft:
        """Return a chain of at most ``budget`` tokens, with logits where knowledge transfer wants them."""
        if self._lease is None or len(self._ids) + budget + 1 >= self._model.window:
            return self._fallback(budget)
        buffer = self._lease.buffer
        if not self._prefilled:
            for _ in self._model.prefill(self._ids[self._lease.reused : -1], buffer):
                pass
            self._prefilled = True
        tokens: list[int] = []
        rows: list[Tensor] = []  # [m, vocab] each
        while len(tokens) < budget:
            accepted, logits = self._forward(tokens, budget - len(tokens))
            done = self._stop_after(accepted, logits)
            tokens += accepted[: done or None]
            rows.append(logits[: done or None])
            if done:
                break
        if (
            self._context.wants_logits
        ):  # also after the last token: see docs/adr on the transfer law
            rows.append(self._forward(tokens, 0)[1])
        if not rows:
            return Draft(source=self._drafter.name)
        logits = torch.cat(rows)
        return Draft(
            token_ids=tuple(tokens),
            probs=None if self._law is None else self._q(logits[: len(tokens)]),
            logits=logits if self._context.wants_logits else None,
            source=self._drafter.name,
        )

    def observe(self, block: TokenBlock) -> None:
        """Take over what the target committed and forget the guesses that failed."""
        if self._lease is not None:
            buffer, start = self._lease.buffer, len(self._ids)
            guessed = self._guesses
            agreed = next(
                (
                    i
                    for i, pair in enumerate(zip(guessed, block.token_ids, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(guessed), len(block.token_ids)),
            )
            self._ids.extend(block.token_ids)
            buffer.truncate(min(start + agreed, len(self._ids) - 1))
            self._guesses = ()
        if self._grammar is not None:
            for token in block.token_ids:
                self._grammar.push(token)
        if self._helper is not None:
            self._helper.observe(block)

    def close(self) -> None:
        """Give the keys and values back."""
        if self._lease is not None:
            self._lease.buffer.truncate(len(self._ids))
            self._lease.release(self._ids)
            self._lease = None
        if self._helper is not None:
            self._helper.close()

    _guesses: tuple[int, ...] = ()

    def _forward(self, drafted: list[int], budget: int) -> tuple[list[int], Tensor]:
        """Run the model once behind ``drafted`` and return new tokens and the logits they come from.

        With budget 0, return no token and the logits ``[1, vocab]`` after the last one.
        """
        assert self._lease is not None  # noqa: S101  (set while active)
        buffer = self._lease.buffer
        sequence = [*self._ids, *drafted]
        pending = sequence[buffer.length :]
        guess: tuple[int, ...] = ()
        if self._helper is not None and budget > 1:
            guess = self._helper.propose_after(drafted, min(budget - 1, _HELPER_TOKENS))
        if self._grammar is not None and budget > 1:
            guess = forced_after(self._grammar, drafted)[: budget - 1] or guess
        logits = self._model.step([*pending, *guess], buffer)
        self.forwards += 1
        logits = self._fitted(logits[len(pending) - 1 :])  # [1 + len(guess), vocab]
        if self._grammar is not None:
            bits = chain_masks(self._grammar, [*drafted, *guess], self._model.eos_ids)
            logits = mask_rows(logits, bits[len(drafted) :])
        if budget <= 0:
            buffer.commit(range(len(pending)))
            self._guesses = tuple(drafted)
            return [], logits
        verdict = sample_and_walk(logits, Draft(guess), self._law, self._generator)
        accepted = [*(guess[i] for i in verdict.accepted), verdict.token_id]
        buffer.commit(range(len(pending) + len(verdict.accepted)))
        self._guesses = (*drafted, *accepted)
        return accepted, logits[: len(accepted)]

    def _stop_after(self, tokens: list[int], logits: Tensor) -> int:
        """Return how many of ``tokens`` the draft takes if it ends among them, else 0."""
        probs = logits.float().softmax(-1) if self._law is None else self._q(logits)
        chosen = probs[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
        for i, (token, prob) in enumerate(zip(tokens, chosen, strict=True)):
            if prob < self._drafter.confidence or token in self._model.eos_ids:
                return i + 1
        return 0

    def _q(self, logits: Tensor) -> Tensor:
        c = self._context
        return process_logits(logits, c.temperature, c.top_p, c.top_k)

    def _fitted(self, logits: Tensor) -> Tensor:
        """Crop or pad the vocabulary to the target's (one family pads differently by size)."""
        missing = self._drafter.vocab_size - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self._drafter.vocab_size]

    def _fallback(self, budget: int) -> Draft:
        """Without a prompt of its own the model is silent; its helper's draft is free."""
        if self._helper is None or self._context.wants_logits:
            return Draft(source=self._drafter.name)
        return Draft(self._helper.propose_after((), budget), source="suffix")
