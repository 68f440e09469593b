"""Drafts a chain with a model over a KV buffer; shared by all drafters that run a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from rasd_integrations.drafters.base import DraftSession, Helper
from rasd_integrations.engine.executors.base import Sampler
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification.constraints import chain_masks, forced_after, mask_rows
from rasd_integrations.engine.verification.exact import sample_and_walk
from rasd_integrations.engine.verification.sampling import rewind_generator, sampling_distribution
from rasd_integrations.types import Draft, DraftContext, TokenBlock

_HELPER_TOKENS = 8


def _unchanged(logits: Tensor) -> Tensor:
    return logits


class ChainSession(DraftSession):
    """State of one answer of a drafter that runs a model.

    The draft is the model's own answer, greedy or sampled as the target's: token ``i`` is drawn from q, the model's
    distribution under the target's sampling parameters, and a sampled draft carries q. A helper drafts for the model.

    Attributes:
        forwards: Forwards of the model so far, without the prefill.
    """

    _model: TargetModel  # set before the first chain

    def __init__(
        self,
        source: str,
        context: DraftContext,
        confidence: float,
        helper: Helper | None,
        fit: Callable[[Tensor], Tensor] = _unchanged,
    ) -> None:
        """Make a session.

        Args:
            source: Name in the statistics.
            context: Of the answer.
            confidence: A token less likely than this ends the draft and stays in it.
            helper: Drafts for the model.
            fit: Maps the model's logits to the target's vocabulary; the same function for all answers.
        """
        self._source = source
        self._context = context
        self._confidence = confidence
        self._helper = helper
        self._grammar = context.grammar
        parameters = context.temperature, context.top_p, context.top_k
        self._distribution = sampling_distribution(*parameters)
        self._sampler = Sampler(*parameters, fit)
        self._generator = torch.Generator().manual_seed(context.seed)
        self.forwards = 0

    def observe(self, block: TokenBlock) -> None:
        """Advance over what the target committed."""
        if self._grammar is not None:
            for token in block.token_ids:
                self._grammar.push(token)
        if self._helper is not None:
            self._helper.observe(block)

    def close(self) -> None:
        """Free the helper."""
        if self._helper is not None:
            self._helper.close()

    def _chain(self, buffer: KVBuffer, pending: Sequence[int], budget: int) -> Draft:
        """Return a chain of at most ``budget`` tokens with its logits.

        Args:
            buffer: KV of what the model has read; extended by ``pending`` and the drafted tokens, perhaps without
                the last one.
            pending: The last committed tokens that ``buffer`` lacks, at least one.
            budget: Maximum tokens of the draft.
        """
        start = buffer.length
        tokens: list[int] = []
        probs: list[float] = []
        rows: list[Tensor] = []  # [m, vocab] each
        ended = False
        while len(tokens) < budget and not ended:
            unread = [*pending, *tokens][buffer.length - start :]
            new, new_probs, logits = self._forward(buffer, unread, tokens, budget - len(tokens))
            if not rows:  # where states are kept: what a rejected draft goes back to
                buffer.snapshots.keep(buffer.length)
            ended, kept = self._ends(new, new_probs)
            tokens += new[:kept]
            probs += new_probs[:kept]
            rows.append(logits[:kept])
            buffer.truncate(start + len(pending) + len(tokens) - 1)
        if not rows:
            return Draft(source=self._source)
        logits = torch.cat(rows)
        return Draft(
            token_ids=tuple(tokens),
            probs=None if self._distribution is None else self._distribution(logits),
            logits=logits,
            source=self._source,
            node_probs=tuple(accumulate(probs, mul)) if self._distribution is None else None,
        )

    def _forward(
        self, buffer: KVBuffer, unread: Sequence[int], drafted: Sequence[int], budget: int
    ) -> tuple[list[int], list[float], Tensor]:
        """Run the model; return the tokens after ``drafted``, their probabilities and the logits of each."""
        guess: tuple[int, ...] = ()
        if self._helper is not None and budget > 1:
            guess = self._helper.propose_after(drafted, min(budget - 1, _HELPER_TOKENS))
        if self._grammar is not None and budget > 1:
            guess = forced_after(self._grammar, drafted)[: budget - 1] or guess
        if self._grammar is None and not guess:
            before = self._generator.get_state()
            drawn = self._model.draw(unread, buffer, budget, self._sampler, self._generator)
            if drawn is not None:
                new, probs = drawn.read()
                self.forwards += len(new)
                buffer.commit(range(len(unread) + len(new) - 1))
                _, kept = self._ends(new, probs)
                rewind_generator(self._generator, before, kept)  # as if drawn one by one
                return new[:kept], probs[:kept], drawn.logits[:kept]
        logits = self._model.step([*unread, *guess], buffer)
        self.forwards += 1
        logits = self._sampler.fit(logits[len(unread) - 1 :])  # [1 + len(guess), vocab]
        if self._grammar is not None:
            bits = chain_masks(self._grammar, [*drafted, *guess], self._model.eos_ids)
            logits = mask_rows(logits, bits[len(drafted) :])
        verdict = sample_and_walk(logits, Draft(guess), self._distribution, self._generator)
        buffer.commit(range(len(unread) + len(verdict.accepted)))
        new = [*(guess[i] for i in verdict.accepted), verdict.token_id]
        return new, self._probs(new, logits), logits[: len(new)]

    def _probs(self, tokens: list[int], logits: Tensor) -> list[float]:
        """Return the model's probability of each of ``tokens``."""
        probs = (
            logits.float().softmax(-1) if self._distribution is None else self._distribution(logits)
        )
        each: list[float] = probs[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
        return each

    def _ends(self, tokens: list[int], probs: list[float]) -> tuple[bool, int]:
        """Return True if the draft ends among ``tokens``, and how many of them belong to it."""
        for i, (token, prob) in enumerate(zip(tokens, probs, strict=True)):
            if prob < self._confidence or token in self._model.eos_ids:
                return True, i + 1
        return False, len(tokens)

    def _fallback(self, budget: int) -> Draft:
        """Return the helper's draft; the model has none."""
        if self._helper is None:
            return Draft(source=self._source)
        return Draft(self._helper.propose_after((), budget), source="suffix")
