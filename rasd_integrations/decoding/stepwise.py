"""Decodes an answer in steps of text, each by the teacher or else by the target (RSD, arXiv 2501.19324)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count

from rasd_integrations.config import Sampling, SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.generation_config import checkpoint_sampling
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import (
    DraftContext,
    GrammarState,
    StepRecord,
    TokenBlock,
    TokenLogprob,
)

Keeps = Callable[[str, str], bool]
"""Takes the answer so far and a step of the teacher's; returns if the step is kept."""


class StepwiseDecoder(SpeculativeDecoder):
    """Lets the teacher write each step, and the target where a step is not kept."""

    def __init__(
        self,
        inner: SpeculativeDecoder,
        decode: Callable[[Sequence[int]], str],
        ends: str,
        most_steps: int,
        keeps: Keeps,
    ) -> None:
        """Use the parts of ``inner``.

        Args:
            inner: The target's decoder, with a teacher.
            decode: Token ids to text.
            ends: What ends a step, and belongs to it.
            most_steps: After so many the target writes the rest.
            keeps: Judges steps.

        Raises:
            ConfigurationError: There is no teacher.
        """
        vars(self).update(vars(inner))
        if (shared := inner.teacher) is None:
            msg = "Reward-guided steps need a teacher of the target's vocabulary, which this model does not have."
            raise ConfigurationError(msg)
        self._inner, self._decode, self._ends = inner, decode, ends
        self._most_steps, self._keeps, self._namespace = most_steps, keeps, shared.namespace
        self._needs_own_prompt = shared.needs_own_prompt
        self._drafting = SpeculativeDecoder(
            shared.model, SuffixDrafter(tree=True), prefix_cache=shared.cache, steps=shared.steps
        )

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        context: DraftContext | None = None,
        stats: DecodingStats | None = None,
        namespace: str = "",
        config: SpeculationConfig | None = None,
        grammar: GrammarState | None = None,
        on_step: Callable[[StepRecord], object] | None = None,
    ) -> Generator[TokenBlock, None, None]:
        """Check the request now, decode lazily, as :meth:`SpeculativeDecoder.generate` does."""
        ids, context = list(prompt_ids), context or DraftContext(prompt_ids=())
        stats = stats if stats is not None else DecodingStats()
        settled = params.settled(checkpoint_sampling(self.target.model))
        self.target.check_prompt(ids, settled.max_tokens)
        own = context.drafter_prompt_ids
        if own is None and not self._needs_own_prompt:
            own = ids
        window = self._drafting.target.window
        if own is None or len(own) + settled.max_tokens > window or grammar is not None:
            why = (
                f"the teacher's window is {window}"
                if own is not None
                else stats.transfer_off_reason or stats.off_reason
            )
            stats.route_reason = why or "the teacher has no prompt of its own"
            return self._inner.generate(
                ids, params, context=context, stats=stats, namespace=namespace, config=config,
                grammar=grammar, on_step=on_step,
            )  # fmt: skip
        return self._steps(ids, list(own), settled, context, stats, namespace, config)

    def _steps(
        self,
        ids: list[int],
        own: list[int],
        params: Sampling,
        context: DraftContext,
        stats: DecodingStats,
        namespace: str,
        config: SpeculationConfig | None,
    ) -> Generator[TokenBlock, None, None]:
        """Yield a block for each step, and empty ones while it is written."""
        answer: list[int] = []
        try:
            for number in count():
                rest = replace(
                    params,
                    max_tokens=params.max_tokens - len(answer),
                    seed=None if params.seed is None else params.seed + len(answer),
                )
                block, kept = TokenBlock(()), False
                if number < self._most_steps:
                    drafted = self._drafting.generate(
                        [*own, *answer], rest, stats=stats, namespace=self._namespace
                    )
                    block = yield from self._step(drafted, answer)
                    before = self._decode(answer)
                    step = self._decode([*answer, *block.token_ids])[len(before) :]
                    kept = self._keeps(before, step)
                if not kept:
                    read = context.drafter_prompt_ids
                    written = self._inner.generate(
                        [*ids, *answer], rest, stats=stats, namespace=namespace, config=config,
                        context=replace(
                            context, drafter_prompt_ids=None if read is None else (*read, *answer)
                        ),
                    )  # fmt: skip
                    block = yield from self._step(written, answer)
                answer += block.token_ids
                stats.generated_tokens = len(answer)
                yield block
                if block.finish_reason is not None:
                    return
        finally:
            stats.mode, stats.generated_tokens = "reward-guided", len(answer)
            stats.prompt_tokens, stats.cached_prompt_tokens = len(ids) + len(own), 0

    def _step(
        self, blocks: Generator[TokenBlock, None, None], answer: Sequence[int]
    ) -> Generator[TokenBlock, None, TokenBlock]:
        """Return the tokens up to the end of a step, and why they end if the answer does."""
        step: list[int] = []
        logprobs: list[TokenLogprob] = []
        start = len(self._decode(answer))
        with closing(blocks):
            for block in blocks:
                for place, token in enumerate(block.token_ids, 1):
                    step.append(token)
                    logprobs += block.logprobs[place - 1 : place]
                    if self._ends in self._decode([*answer, *step])[start:].lstrip():
                        whole = place == len(block.token_ids)
                        reason = block.finish_reason if whole else None
                        return TokenBlock(tuple(step), 0, 0, reason, tuple(logprobs))
                if block.finish_reason is not None:
                    break
                yield TokenBlock(())
        return TokenBlock(tuple(step), 0, 0, block.finish_reason, tuple(logprobs))
