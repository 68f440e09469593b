"""The loop: draft, one target step, verify, commit, yield. Token ids in, blocks of token ids out."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rasd_integrations.config import Sampling, SamplingParams, SpeculationConfig
from rasd_integrations.decoding.drafts import checked
from rasd_integrations.decoding.schedule import Experience, Schedule, check_lockstep
from rasd_integrations.decoding.steps import FreeSteps, Steps
from rasd_integrations.drafters.base import Drafter, DraftSession, as_drafter
from rasd_integrations.engine.generation_config import checkpoint_sampling, logits_processors
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import Lease, PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification.constraints import SOURCE, guide, processed_rows
from rasd_integrations.engine.verification.exact import Verdict, block_verify, sample_and_walk
from rasd_integrations.engine.verification.sampling import Distribution, sampling_distribution
from rasd_integrations.engine.verification.transfer import mixture_verify, rapid_verify
from rasd_integrations.errors import DecodingError, PromptTooLongError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft, DraftContext, FinishReason, GrammarState, TokenBlock

logger = logging.getLogger(__name__)

_ASIDE = "several answers decode together"


class SpeculativeDecoder:
    """Decodes prompts with one target and, where given, one drafter.

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
    ) -> None:
        """Join the parts; nothing runs yet. Decoders that share a cache run the same kind of ``steps``."""
        self.target = target
        self.drafter = None if drafter is None else as_drafter(drafter)
        self.config = config or SpeculationConfig()
        self.prefix_cache = PrefixCache(0) if prefix_cache is None else prefix_cache
        self.keeps_hidden = self.drafter is not None and self.drafter.needs.hidden
        self.steps = steps or FreeSteps(target)
        self.experience = Experience()  # what the last answer has measured

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a stream keeps of each token."""
        own = self.target.hidden_bytes_per_token if self.keeps_hidden else 0
        return self.target.kv_bytes_per_token + own

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

        Yields:
            Blocks of one token or more; while a long prompt is prefilled, empty ones. Ids, keys and
            values and counters agree at every yield, so a stream may be closed at any of them.

        Raises:
            PromptError: The prompt is empty or holds an id that the target does not know.
            ConfigurationError: The target is split over processes, which would take different steps.
            PromptTooLongError: Prompt and answer exceed the target's window.
            DecodingError: Knowledge transfer is on and the drafter failed or gave no logits.
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
        context = replace(context or DraftContext(prompt_ids=()), grammar=grammar)
        return _Answer(self, ids, settled, context, config, stats, namespace).blocks()

    def prefill(self, ids: Sequence[int], *, namespace: str = "") -> Iterator[int]:
        """Prefill ``ids`` and keep their keys and values for later prompts, and where asked for later processes.

        Yields:
            Tokens done after each piece.

        Raises:
            PromptTooLongError: More ids than the window holds.
        """
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


class _Answer:
    """One answer being decoded."""

    def __init__(
        self, decoder: SpeculativeDecoder, ids: list[int], params: Sampling,
        context: DraftContext, config: SpeculationConfig, stats: DecodingStats, namespace: str,
    ) -> None:  # fmt: skip
        self.target, self.config, self.grammar = decoder.target, config, context.grammar
        self.decoder, self.steps = decoder, decoder.steps
        self.drafter = decoder.drafter if params.drafting else None
        self.lease = partial(decoder.lease, namespace=namespace)
        self.ids, self.params, self.stats = ids, params, stats
        seed = params.seed if params.seed is not None else self.steps.fresh_seed()
        self.generator = torch.Generator().manual_seed(seed)
        self.sampling = params.temperature, params.top_p, params.top_k
        self.distribution: Distribution | None = sampling_distribution(*self.sampling, params.min_p)
        eos_ids = self.target.eos_ids
        self.processors = logits_processors(self.target.model, params, len(ids), eos_ids)
        most, fixed = self.config.max_draft_tokens, self.config.num_draft_tokens
        self.schedule = Schedule(
            most,
            fixed,
            row_multiple=self.steps.row_multiple,
            prefix=len(ids),
            experience=decoder.experience,
        )
        self.context = replace(
            context,
            prompt_ids=tuple(ids),
            # A draft that is drawn is verified by other rules, whose draws no plain answer takes.
            temperature=0.0 if self.steps.is_fixed else params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=seed + 1,  # the drafter's draws must not follow the verifier's
            wants_logits=not self.config.lossless,
            grammar=None if self.grammar is None else self.grammar.fork(),
        )
        self.session: DraftSession | None = None
        self.planned_reason = stats.off_reason  # why the drafter was given no prompt of its own

    def blocks(self) -> Generator[TokenBlock, None, None]:
        started = time.perf_counter()
        num_prompt, kept = len(self.ids), self.steps.kept(len(self.ids) - 1)
        self.stats.prompt_tokens = num_prompt
        lease = self.lease(self.ids, num_prompt + self.params.max_tokens + 64)
        try:
            self.stats.cached_prompt_tokens = lease.reused
            # What the prompt's last row says is the first token, unless the drafter has a say in it.
            asks = self.config.num_draft_tokens is not None or self.steps.is_fixed
            whole = self.config.lossless and not asks
            first: Tensor | None = None
            for logits in self.steps.prefill(self.ids, lease.buffer, first=whole):
                first = logits if whole else None
                self._tick("prefill_s", started)
                started = time.perf_counter()
                yield TokenBlock(())
            lease.record(self.ids[:kept])
            block = TokenBlock(())
            if first is not None:  # the drafter starts behind it, so that it comes the sooner
                block = self._step(lease, self.params.max_tokens, first)
                yield block
            self._start_session(lease.buffer, block)
            while block.finish_reason is None:
                block = self._step(lease, self.params.max_tokens - (len(self.ids) - num_prompt))
                yield block
        finally:
            self.decoder.experience = self.schedule.experience
            self.target.leave()
            self._close_session()
            lease.release(self.ids[:kept])

    @torch.inference_mode()
    def _step(self, lease: Lease, room: int, first: Tensor | None = None) -> TokenBlock:
        """Draft, verify and commit at most ``room`` tokens, or draw the one that the logits ``first`` predict."""
        started = time.perf_counter()
        aside = first is not None or self._stands_aside()
        budget = 0 if aside or self.session is None else self.schedule.next_budget()
        most = min(room - 1, self.steps.room(len(self.ids)))
        proposed = self.steps.fitted(self._propose(min(budget, most)))
        draft = proposed.head(self.schedule.head(proposed)) if budget > 0 else proposed
        if self.session is not None:
            pays = budget > 0 or self.config.num_draft_tokens is not None
            silent = self.planned_reason if not self.stats.drafted else None
            unpaid = _ASIDE if aside else "drafting does not pay on this text"
            self.stats.off_reason = silent if pays else unpaid
        draft_s = self._tick("draft_s", started)
        started = time.perf_counter()
        bits = None
        if self.grammar is not None:
            # A forced token has no distribution of the drafter's, which a lossy distribution asks for.
            forced = most if self.config.lossless and first is None else 0
            draft, bits = guide(self.grammar, draft, forced, self.target.eos_ids)
        logits = first
        if logits is None:
            rows = 0 if aside else self.schedule.rows
            logits = self.steps.step(self.ids, draft, lease.buffer, rows)
        logits = processed_rows(self.processors, logits, self.ids, draft, bits)
        verdict = self._verify(logits, draft)
        verify_s = self._tick("verify_s", started)
        tokens = [*(draft.token_ids[i] for i in verdict.accepted), verdict.token_id]
        tokens, reason = self._cut(tokens, room)
        if self.grammar is not None:
            tokens, reason = self._followed(self.grammar, tokens, reason)
        accepted = verdict.accepted[: len(tokens)]
        # The last token's own row comes with the next step.
        if first is None:
            lease.buffer.commit([0, *(1 + i for i in accepted[: len(tokens) - 1])])
        self.ids.extend(tokens)
        self._count(draft, accepted)
        block = TokenBlock(tuple(tokens), len(draft), len(accepted), reason)
        draft_s += self._observe(draft, logits, block, asked=budget > 0)
        if not aside:  # else the time of the step is that of all answers in it
            self._schedule(draft, accepted, draft_s, verify_s, proposed, tokens)
        return block

    def _stands_aside(self) -> bool:
        """Whether to leave the step to the other answers in it: where widths cost, all of them pay for a draft."""
        chosen = self.config.num_draft_tokens is None and self.config.lossless
        return chosen and self.steps.row_multiple > 1 and self.target.is_contended

    def _verify(self, logits: Tensor, draft: Draft) -> Verdict:
        config, draft = self.config, draft.to(logits.device)
        if config.lossless:
            if (
                self.distribution is not None
                and draft.probs is not None
                and not self.steps.is_fixed
            ):
                return block_verify(logits, draft, self.distribution, self.generator)
            return sample_and_walk(logits, draft, self.distribution, self.generator)
        if draft.logits is None:
            if len(draft):
                msg = (
                    f"Knowledge transfer needs the drafter's logits, which {draft.source!r} does not give. "
                    f"Use drafter='self' or a model."
                )
                raise DecodingError(msg)
            self.stats.off_reason = (
                "the drafter is silent: tokens without its distribution follow the target's"
            )
            return sample_and_walk(logits, draft, self.distribution, self.generator)
        eta, mixture, min_p = config.knowledge_transfer, config.mixture, self.params.min_p
        rule, weight = (rapid_verify, eta) if eta else (mixture_verify, mixture)
        verdict, bound = rule(logits, draft, *self.sampling, weight, self.generator, min_p)
        self.stats.tv_bound = (self.stats.tv_bound or 0.0) + bound
        return verdict

    def _cut(self, tokens: list[int], room: int) -> tuple[list[int], FinishReason | None]:
        """End the block at the first end token, else where the room ends."""
        if not self.params.ignore_eos:
            for i, token in enumerate(tokens[:room]):
                if token in self.target.eos_ids:
                    return tokens[: i + 1], "stop"
        if len(tokens) >= room:
            return tokens[:room], "length"
        return tokens, None

    def _followed(
        self, grammar: GrammarState, tokens: list[int], reason: FinishReason | None
    ) -> tuple[list[int], FinishReason | None]:
        """Step over committed tokens; the block ends where the grammar does."""
        for i, token in enumerate(tokens):
            if token in self.target.eos_ids:
                return tokens, "length" if grammar.is_closing else reason
            if not grammar.push(token):
                msg = f"The grammar refuses token {token}, which its own mask allowed. Please report this."
                raise DecodingError(msg)
            if grammar.finished:
                return tokens[: i + 1], "length" if grammar.is_closing else "stop"
        return tokens, reason

    def _schedule(
        self, draft: Draft, accepted: Sequence[int], draft_s: float, verify_s: float,
        proposed: Draft, tokens: Sequence[int],
    ) -> None:  # fmt: skip
        """Tell the schedule; what a grammar forced says nothing of the drafter."""
        forced = [source == SOURCE for source in draft.sources or ()] or [False] * len(draft)
        drafted = len(draft) - sum(forced)
        stood = sum(not forced[i] for i in accepted)
        self.schedule.record(
            drafted, stood, draft_s, verify_s, rows=1 + len(draft), proposed=proposed,
            committed=tokens if self.grammar is None else (),
        )  # fmt: skip

    def _count(self, draft: Draft, accepted: Sequence[int]) -> None:
        stats = self.stats
        stats.target_steps += 1
        stats.generated_tokens = len(self.ids) - stats.prompt_tokens
        sources = draft.sources or (draft.source,) * len(draft)
        for source in dict.fromkeys(sources):
            stats.count(source, sources.count(source), sum(sources[i] == source for i in accepted))

    def _tick(self, counter: str, started: float) -> float:
        """Add the seconds since ``started`` to a counter and to the total."""
        seconds = time.perf_counter() - started
        setattr(self.stats, counter, getattr(self.stats, counter) + seconds)
        self.stats.total_s += seconds
        return seconds

    # A drafter may be the user's own code: its faults cost speed, never the answer.

    def _start_session(self, buffer: KVBuffer, block: TokenBlock) -> None:
        """Start the drafter behind the prompt and the first ``block``, unless that was the last."""
        if self.drafter is None:
            plain = "no drafter" if self.params.drafting else "drafting is off for this call"
            self.stats.off_reason = self.stats.off_reason or plain
            return
        if block.finish_reason is not None:
            return
        started = time.perf_counter()
        try:
            self.session = session = self.drafter.start(self.context)
            session.attach(self.target, buffer)
            if block.token_ids:
                session.observe(block)
        except Exception as err:  # noqa: BLE001
            self._drafter_failed(err)
        self._tick("draft_s", started)

    def _propose(self, budget: int) -> Draft:
        if self.session is None or (budget <= 0 and self.config.lossless):
            return Draft()
        try:
            return checked(self.session.propose(max(budget, 0)), budget, self.target.vocab_size)
        except Exception as err:  # noqa: BLE001
            self._drafter_failed(err)
            return Draft()

    def _observe(self, draft: Draft, logits: Tensor, block: TokenBlock, *, asked: bool) -> float:
        """Tell the session what became of its draft; return the seconds that it took."""
        if self.session is None:
            return 0.0
        started = time.perf_counter()
        try:
            if asked:  # what is off costs nothing
                self.session.learn(draft, logits)
            self.session.observe(block)
        except Exception as err:  # noqa: BLE001
            self._drafter_failed(err)
        return self._tick("draft_s", started)

    def _drafter_failed(self, err: Exception) -> None:
        name = self.drafter.name if self.drafter is not None else "?"
        fault = f"drafter {name!r} failed: {type(err).__name__}: {err}"
        if not self.config.lossless:
            msg = f"Knowledge transfer cannot go on: {fault}"
            raise DecodingError(msg) from err
        logger.warning("%s; decoding goes on without it", fault, exc_info=err)
        self.stats.faults = (*self.stats.faults, fault)
        self.stats.off_reason = fault
        self._close_session()

    def _close_session(self) -> None:
        session, self.session = self.session, None
        if session is None:
            return
        try:
            session.close()
        except Exception:
            logger.exception("closing a drafter's session failed")
