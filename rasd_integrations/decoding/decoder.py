"""The decoding loop: draft, step, verify, commit, observe; token ids in, blocks out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rasd_integrations.config import Sampling, SamplingParams, SpeculationConfig
from rasd_integrations.decoding.constraints import Constraints
from rasd_integrations.decoding.drafting import Drafting
from rasd_integrations.decoding.lockstep import check_lockstep
from rasd_integrations.decoding.schedule import Schedule, ScheduleState
from rasd_integrations.decoding.steps import Steps
from rasd_integrations.decoding.teacher import Teacher, TeacherModel
from rasd_integrations.decoding.verifier import Verifier
from rasd_integrations.drafters.base import Drafter, as_drafter
from rasd_integrations.engine.generation_config import checkpoint_sampling
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import Lease, PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification.constraints import SOURCE
from rasd_integrations.errors import ConfigurationError, PromptTooLongError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft, DraftContext, GrammarState, StepRecord, TokenBlock

_SPARE = 64  # positions for a draft after the answer's last token


class SpeculativeDecoder:
    """Decodes prompts with one target and, if given, one drafter.

    Answers run side by side: each has its own buffer, drafting session and schedule, and takes the
    target's lock for one step at a time.
    """

    def __init__(
        self,
        target: TargetModel,
        drafter: Drafter | None = None,
        *,
        config: SpeculationConfig | None = None,
        prefix_cache: PrefixCache | None = None,
        steps: Steps | None = None,
        teacher: TeacherModel | None = None,
    ) -> None:
        """Join the parts; decoders that share a cache run the same kind of ``steps``.

        ``teacher`` is whose distribution knowledge transfer joins with the target's.
        """
        self.target = target
        self.drafter = None if drafter is None else as_drafter(drafter)
        self.config = config or SpeculationConfig()
        self.prefix_cache = PrefixCache(0) if prefix_cache is None else prefix_cache
        self.keeps_hidden = self.drafter is not None and self.drafter.needs.hidden
        if self.keeps_hidden:
            target.check_stateless("A drafter of hidden states")
        self.steps = steps or Steps(target)
        self.teacher = teacher
        # Of the last answer, with and without a teacher, whose steps take longer.
        self.schedule_states = {False: ScheduleState(), True: ScheduleState()}

    def nbytes(self, tokens: int) -> int:
        """Return the bytes that an answer keeps of a text of ``tokens``."""
        own = self.target.hidden_bytes_per_token if self.keeps_hidden else 0
        return tokens * (self.target.kv_bytes_per_token + own) + self.target.state_bytes

    def lease(self, ids: Sequence[int], capacity: int, namespace: str) -> Lease:
        """Return a buffer for ``ids`` that keeps what the drafter reads."""
        cache, hidden = self.prefix_cache, self.keeps_hidden
        lease = self.target.lease(cache, ids, capacity, namespace, hidden)
        lease.cut(self.steps.kept(lease.reused))
        return lease

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
        """Check the request now, decode lazily.

        Args:
            prompt_ids: The prompt.
            params: How to draw the answer.
            context: What the drafter may know besides the prompt and the sampling distribution.
            stats: Counters to fill; complete at every yield.
            namespace: Of the prefix cache.
            config: For this answer, in the place of the decoder's own.
            grammar: What the answer must match, at its start; this answer's own.
            on_step: Called with the record of each step, before its block is yielded.

        Yields:
            Blocks of one token or more; while a long prompt is prefilled, empty ones. Ids, keys and
            values and counters agree at every yield, so a stream may be closed at any of them.

        Raises:
            PromptError: The prompt is empty or holds an id that the target does not know.
            ConfigurationError: The target is split over processes, which would take different steps, or knowledge
                transfer has no teacher.
            PromptTooLongError: Prompt and answer exceed the target's window.
            DecodingError: The transfer rule returns no distribution.
            DeviceMemoryError: The request does not fit; others go on.
        """
        ids = list(prompt_ids)
        settled = params.settled(checkpoint_sampling(self.target.model))
        self.target.check_prompt(ids, settled.max_tokens)
        stats = stats if stats is not None else DecodingStats()
        config = config or self.config
        if self.target.is_sharded:
            check_lockstep(self.drafter if params.drafting else None, config, settled)
        stats.mode = "lossless" if config.lossless else "knowledge_transfer"
        if not config.lossless and self.teacher is None:
            msg = (
                f"knowledge_transfer is {config.knowledge_transfer!r}, but this decoder has no teacher. Give it "
                f"one, or leave the option out."
            )
            raise ConfigurationError(msg)
        context = replace(context or DraftContext(prompt_ids=()), grammar=grammar)
        return _Run(self, ids, settled, context, config, stats, namespace, on_step).blocks()

    def prefill(self, ids: Sequence[int], *, namespace: str = "") -> Iterator[int]:
        """Prefill ``ids`` and keep their keys and values for later prompts and processes.

        Yields:
            Tokens done after each piece.

        Raises:
            PromptTooLongError: More ids than the window holds.
            ConfigurationError: The target goes on from no prefix.
        """
        if self.target.layout.one_by_one:
            msg = (
                f"{type(self.target.model).__name__} reads each prompt from its first token on: only single tokens "
                f"go on from the states that its layers keep. Ask without warming."
            )
            raise ConfigurationError(msg)
        if len(ids) >= self.target.window:
            raise PromptTooLongError(len(ids), 1, self.target.window)
        return self._prefill(list(ids), namespace)

    def _prefill(self, ids: list[int], namespace: str) -> Iterator[int]:
        lease, kept = self.lease([*ids, 0], len(ids) + 1, namespace), self.steps.kept(len(ids))
        try:
            for _ in self.steps.prefill([*ids, 0], lease.buffer, first=False):
                yield lease.buffer.length
            lease.save(ids[:kept])
        finally:
            lease.release(ids[:kept])


class _Run:
    """One answer being decoded."""

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        ids: list[int],
        params: Sampling,
        context: DraftContext,
        config: SpeculationConfig,
        stats: DecodingStats,
        namespace: str,
        on_step: Callable[[StepRecord], object] | None,
    ) -> None:
        self.on_step = on_step
        self.decoder, self.target, self.steps = decoder, decoder.target, decoder.steps
        self.ids, self.num_prompt, self.params = ids, len(ids), params
        self.config, self.stats, self.namespace = config, stats, namespace
        self.drafter = decoder.drafter if params.drafting else None
        self.lease: Lease | None = None
        self.buffer = KVBuffer(0)
        seed = params.seed if params.seed is not None else self.steps.fresh_seed()
        generator = torch.Generator().manual_seed(seed)
        self.drafting = Drafting(self.target, stats)
        self.teacher: Teacher | None = None
        if (rule := config.rule) is not None and decoder.teacher is not None:
            self.teacher = decoder.teacher.start(ids, rule, params.temperature, context, stats)
        all_rows = self.teacher is not None  # a rule reads them
        self.constraints = Constraints(
            self.target, params, context.grammar, len(ids), all_rows=all_rows
        )
        self.verifier = Verifier(params, generator, stats)
        self.schedule = Schedule(
            config.max_draft_tokens,
            config.num_draft_tokens,
            row_multiple=self.steps.row_multiple,
            prompt_tokens=len(ids),
            state=decoder.schedule_states[self.teacher is not None],
        )
        self.context = replace(
            context,
            prompt_ids=tuple(ids),
            # A sampled draft is verified with other draws than plain decoding makes.
            temperature=0.0 if self.steps.is_fixed else params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=seed + 1,  # the drafter's draws must not follow the verifier's
            grammar=None if context.grammar is None else context.grammar.fork(),
        )
        self.planned_reason = stats.off_reason  # why the drafter was given no prompt of its own

    def blocks(self) -> Generator[TokenBlock, None, None]:
        """Prefill, then step until the answer ends."""
        self.stats.prompt_tokens = self.num_prompt
        try:
            # The prefill's last logits give the first token, unless the drafter has a say in it.
            asks = self.config.num_draft_tokens is not None or self.steps.is_fixed
            first = yield from self._prefill(samples_first=self.teacher is None and not asks)
            for _ in () if self.teacher is None else self.teacher.read():
                yield TokenBlock(())
            block = TokenBlock(())
            if first is not None:  # it does not wait for the drafter, which starts afterwards
                block = self._step(first)
                yield block
            self._start_drafter(block)
            while block.finish_reason is None:
                if self.target.is_long(self.ids) and not self.buffer.long_rope:
                    yield from self._read_again()
                block = self._step()
                yield block
        finally:
            self.decoder.schedule_states[self.teacher is not None] = self.schedule.state
            self.target.leave()
            self._close()
            if self.teacher is not None:
                self.teacher.close()

    def _prefill(self, *, samples_first: bool) -> Generator[TokenBlock, None, Tensor | None]:
        """Lease a buffer and prefill it; return the first token's logits if asked for."""
        started = time.perf_counter()
        capacity = self.num_prompt + self.params.max_tokens + _SPARE
        lease = self.decoder.lease(self.ids, capacity, self.namespace)
        self.lease, self.buffer, self.kept = lease, lease.buffer, self.steps.kept(len(self.ids) - 1)
        if len(self.ids) == self.num_prompt:
            self.stats.cached_prompt_tokens = lease.reused
        first: Tensor | None = None
        for logits in self.steps.prefill(self.ids, lease.buffer, first=samples_first):
            first = logits if samples_first else None
            self._tick("prefill_s", started)
            started = time.perf_counter()
            yield TokenBlock(())
        lease.record(self.ids[: self.kept])
        return first

    def _read_again(self) -> Generator[TokenBlock, None, None]:
        """Replace all keys: past the longrope border the model's angles differ from the first token on."""
        drafts = self.drafting.is_on
        self._close()
        yield from self._prefill(samples_first=False)
        if drafts:
            self._start_drafter(TokenBlock(tuple(self.ids[self.num_prompt :])))

    def _close(self) -> None:
        """End the drafter's session and return the buffer to the cache."""
        self.drafting.close()
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.release(self.ids[: self.kept])

    @torch.inference_mode()
    def _step(self, first: Tensor | None = None) -> TokenBlock:
        """Draft, step, verify, commit, observe; ``first``: the step's logits, from the prefill."""
        # Draft.
        started = time.perf_counter()
        room = self.num_prompt + self.params.max_tokens - len(self.ids)
        longest = min(room - 1, self.steps.room(len(self.ids)))
        if self.teacher is not None:
            longest = min(longest, self.teacher.room)
        skip = first is not None or self._leaves_step_to_others()
        budget = self.schedule.next_budget() if self.drafting.is_on and not skip else 0
        proposed = self.steps.fitted(self.drafting.propose(min(budget, longest)))
        chosen = proposed.head(self.schedule.head(proposed)) if budget > 0 else proposed
        self._explain(budget, skip=skip)
        draft_s = self._tick("draft_s", started)

        # Step.
        started = time.perf_counter()
        draft = self.constraints.restrict(chosen, longest if first is None else 0)
        rows = self.schedule.rows if self.drafting.is_on and not skip else 0
        logits, theirs = (first, None) if first is not None else self._forward(draft, rows)

        # Verify.
        plain = logits = self.constraints.apply(logits, self.ids, draft)
        if self.teacher is not None and theirs is not None:
            theirs = self.constraints.apply(theirs, self.ids, draft)
            logits = self.teacher.joined(plain, theirs, draft)
        verdict = self.verifier.verify(logits, draft, plain)
        step_s = self._tick("verify_s", started)

        # Commit.
        path = [*(draft.token_ids[node] for node in verdict.accepted), verdict.token_id]
        tokens, reason = self.constraints.cut(path, room)
        accepted = verdict.accepted[: len(tokens)]
        if first is None:  # keys and values of the last token come with the next step
            self.buffer.commit([0, *(1 + node for node in accepted[: len(tokens) - 1])])
        self.ids.extend(tokens)
        if self.teacher is not None:
            self.teacher.commit(accepted, tokens)
        self._count(draft, accepted)
        logprobs = self.verifier.logprobs(logits, accepted, tokens)
        block = TokenBlock(tuple(tokens), len(draft), len(accepted), reason, logprobs)

        # Observe.
        started = time.perf_counter()
        self.drafting.observe(block, draft, logits if budget > 0 else None)
        draft_s += self._tick("draft_s", started)
        if not skip:  # the time of a shared step is that of all its answers
            own = [node for node, source in enumerate(_sources(draft)) if source != SOURCE]
            counts = len(own), len({*own} & {*accepted})
            self.schedule.record(*counts, draft_s, step_s, 1 + len(draft), proposed, tokens)
        if self.on_step is not None:
            sources = _sources(draft)
            by = tuple(sources[node] for node in accepted)
            why = self._why_none(first, budget, longest, proposed, chosen)
            off = why if {*sources} <= {SOURCE} else None
            self.on_step(StepRecord(block.token_ids, by, Counter(sources), off, draft_s, step_s))
        return block

    def _forward(self, draft: Draft, rows: int) -> tuple[Tensor, Tensor | None]:
        """Run the step; return its logits, and the teacher's."""
        if self.teacher is None:
            return self.steps.step(self.ids, draft, self.buffer, rows), None
        return self.teacher.step_with(self.steps, self.ids, draft, self.buffer, rows)

    def _leaves_step_to_others(self) -> bool:
        """Return if a draft would cost the other answers of the step: changes of width do."""
        chosen = self.config.num_draft_tokens is None
        return chosen and self.steps.row_multiple > 1 and self.target.is_contended

    def _explain(self, budget: int, *, skip: bool) -> None:
        """Set ``off_reason`` of the statistics."""
        if not self.drafting.is_on:
            return
        if budget > 0 or self.config.num_draft_tokens is not None:
            self.stats.off_reason = None if self.stats.drafted else self.planned_reason
        elif skip:
            self.stats.off_reason = "several answers decode together"
        else:
            self.stats.off_reason = self.schedule.off_reason

    def _why_none(
        self, first: Tensor | None, budget: int, longest: int, proposed: Draft, chosen: Draft
    ) -> str:
        """Return why a step verified no token of a drafter."""
        if first is not None:
            return "the prefill gives the first token"
        if budget <= 0 or not self.drafting.is_on:
            return self.stats.off_reason or "num_draft_tokens is 0"
        if longest <= 0:
            return "there is no room for a draft"
        if not len(proposed):
            return "the drafter has nothing to propose"
        chose = "the grammar allows no token of the draft"
        return chose if len(chosen) else "the draft is too unlikely to save time"

    def _start_drafter(self, block: TokenBlock) -> None:
        """Start the drafter after the first ``block``, unless that was the last."""
        if self.drafter is None:
            plain = "no drafter" if self.params.drafting else "drafting is off for this call"
            self.stats.off_reason = self.stats.off_reason or plain
        elif block.finish_reason is None:
            started = time.perf_counter()
            grammar = self.context.grammar
            own = replace(self.context, grammar=None if grammar is None else grammar.fork())
            self.drafting.start(self.drafter, own, self.buffer)
            if block.token_ids:
                self.drafting.observe(block, Draft(), None)
            self._tick("draft_s", started)

    def _count(self, draft: Draft, accepted: Sequence[int]) -> None:
        self.stats.target_steps += 1
        self.stats.generated_tokens = len(self.ids) - self.num_prompt
        sources = _sources(draft)
        for source in dict.fromkeys(sources):
            right = sum(sources[node] == source for node in accepted)
            self.stats.count(source, sources.count(source), right)

    def _tick(self, counter: str, started: float) -> float:
        """Add the seconds since ``started`` to a counter and to the total."""
        seconds = time.perf_counter() - started
        setattr(self.stats, counter, getattr(self.stats, counter) + seconds)
        self.stats.total_s += seconds
        return seconds


def _sources(draft: Draft) -> Sequence[str]:
    return draft.sources or (draft.source,) * len(draft)
