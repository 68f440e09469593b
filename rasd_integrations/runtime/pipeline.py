"""One answer, from prompt to text: plan, encode, decode, detokenise, parse. The only path."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict

from typing_extensions import Unpack

from rasd_integrations.config import (
    ContextMode,
    RetrievalConfig,
    Sampling,
    SamplingParams,
    SpeculationConfig,
)
from rasd_integrations.errors import ConfigurationError, DecodingError
from rasd_integrations.prompting import Prompt, PromptHints, PromptPlan, PromptPlanner
from rasd_integrations.response_format import ToolUse
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.answer.closed import closed_fields
from rasd_integrations.text.answer.detokenizer import IncrementalDetokenizer
from rasd_integrations.text.answer.quotes import quoted
from rasd_integrations.text.answer.stop import ended_at
from rasd_integrations.text.answer.stream import by_token, stream_text
from rasd_integrations.text.prompt.template import ChatTemplate
from rasd_integrations.types import (
    Chunk,
    DraftContext,
    Generation,
    GrammarState,
    StepRecord,
    TextDelta,
    TokenBlock,
    ToolCall,
)

if TYPE_CHECKING:
    from rasd_integrations.decoding.decoder import SpeculativeDecoder
    from rasd_integrations.drafters.base import Drafter

logger = logging.getLogger(__name__)

_SPARE_TOKENS = 8  # pieces counted one by one may merge differently when joined

Gate = Callable[[int], AbstractContextManager[None]]
"""Admits an answer that will hold so many bytes; see :class:`~rasd_integrations.runtime.admission.Admission`."""

Progress = Callable[[int, int], object]
"""Called with the number done and the total."""


class Known(TypedDict, total=False):
    """What may accompany a prompt.

    Attributes:
        hints: What the caller knows of how the prompt was made.
        tools: What the answer may or must call.
    """

    hints: PromptHints | None
    tools: ToolUse | None


@dataclass(frozen=True, slots=True)
class Request:
    """One call, as both edges and every step of the pipeline see it.

    Attributes:
        prompt: A text, read as it is, or chat messages.
        params: How to draw the answer.
        hints: What the caller knows of how the prompt was made.
        tools: What the answer may or must call.
        on_step: Called with the record of each step; the answer's deltas are then of one token each.
        context: What the target reads, where it is not what the engine's own option says.
        searches: The engine's store may be searched and drafted from.
    """

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    hints: PromptHints | None = None
    tools: ToolUse | None = None
    on_step: Callable[[StepRecord], object] | None = None
    context: ContextMode | None = None
    searches: bool = True

    @classmethod
    def of(
        cls, prompt: Prompt | Request, params: SamplingParams | None = None, **known: Unpack[Known]
    ) -> Request:
        """Return ``prompt`` if it is a request, else the request for it.

        Raises:
            ConfigurationError: A request, which has params, hints and tools of its own, is given others besides.
        """
        if isinstance(prompt, Request):
            if params is not None or known:
                msg = "A Request holds its own params, hints and tools. Give them there, or a prompt here."
                raise ConfigurationError(msg)
            return prompt
        return cls(prompt, params or SamplingParams(), **known)

    def __post_init__(self) -> None:
        """Refuse tools without messages: only a chat template can show them to the model."""
        if self.tools is not None and isinstance(self.prompt, str):
            msg = "tools need chat messages, but the prompt is a plain text. Send messages, or leave them out."
            raise ConfigurationError(msg)

    @property
    def bound(self) -> bool:
        """True if a grammar, or tools that may be called, constrain the answer."""
        return self.params.grammar is not None or bool(self.tools and self.tools.visible)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The parts that an answer passes through, in order.

    Attributes:
        planner: Finds question and chunks.
        template: Messages to token ids.
        decoder: Token ids to token ids.
        speculation: How drafts are made and judged, unless a call asks for another way.
        retrieval: Limits of the drafter's prompt.
        context: What the target reads.
        namespace: Of the prefix cache.
        store: All that it returns may be drafted from.
        teaches: The teacher reads the chunks, whatever the rule of knowledge transfer.
    """

    planner: PromptPlanner
    template: ChatTemplate
    decoder: SpeculativeDecoder
    speculation: SpeculationConfig
    retrieval: RetrievalConfig
    context: ContextMode
    namespace: str
    store: object
    teaches: bool = False

    def answer(
        self,
        request: Request,
        stats: DecodingStats,
        gate: Gate | None = None,
        plan: PromptPlan | None = None,
    ) -> Generator[TextDelta, None, None]:
        """Check and plan now, decode lazily; ``stats`` are complete when the iterator ends or is closed.

        Args:
            request: What is asked for.
            stats: Counters to fill.
            gate: Entered before decoding and left after it, with the bytes of the answer's keys and values.
            plan: Of the request, if it is made.

        Raises:
            PromptError: The prompt is empty, has parts that are not text, or exceeds the window.
            ConfigurationError: The options contradict one another, or a grammar cannot be followed.
        """
        started = time.perf_counter()
        params, tools, template = self._settled(request.params), request.tools, self.template
        config = self._speculation_for(request)
        plan = plan or self.plan(request)
        prompt_ids = encode(template, plan.target, tools)
        parser = None
        grammar: GrammarState | None = None
        thinking = False
        stops = template.stops(params.stop, chat=not isinstance(request.prompt, str))
        if not isinstance(plan.target, str):
            thinking = template.opens_thought(prompt_ids, plan.target)
            parser = template.parser(tools, thinking=thinking)
        if request.bound:
            grammar = self._grammar(request, params.max_tokens, thinking=thinking)
        most = int(self.retrieval.gate_share * len(prompt_ids))
        context = DraftContext(prompt_ids=())
        drafter = self._drafter(request)
        if drafter is not None or self.teaches or not config.lossless:
            own_filter = None if request.hints is None else request.hints.filter
            # Who does not read the chunks has those of the prompt in the prompt.
            known = plan.chunks if drafter is not None and drafter.needs.prompt else plan.unseen
            context = draft_context(template, plan, known, most, tools)
            context = replace(context, source=self.store, filter=own_filter)
        note(plan, context, stats)
        if drafter is None or not drafter.needs.prompt:  # the prompt is the teacher's alone
            stats.transfer_off_reason, stats.off_reason = stats.off_reason, None
        stats.total_s += time.perf_counter() - started
        blocks = self.decoder.generate(
            prompt_ids, params, context=context, stats=stats, namespace=self.namespace,
            config=config, grammar=grammar, on_step=request.on_step,
        )  # fmt: skip
        if gate is not None:
            tokens = len(prompt_ids) + params.max_tokens
            blocks = _gated(blocks, gate(self.decoder.nbytes(tokens)))
        if stops.ends:
            blocks = ended_at(blocks, stops.ends)
        if request.on_step is not None:
            blocks = by_token(blocks)
        kept = () if parser is None else template.kept_control(tools)
        detokenizer = IncrementalDetokenizer(template.tokenizer, kept, stops.marks)
        single = tools is not None and not tools.parallel
        chunks = stream_text(
            blocks, detokenizer, stops.texts, lambda: stats, parser=parser,
            max_calls=1 if single else None, hidden="".join(stops.marks.values()),
            count_tokens=self._count_tokens,
        )  # fmt: skip
        chunks = quoted(chunks, plan.quotable)
        return chunks if grammar is None else self._report_cut(chunks, grammar, params)

    def warm(self, documents: Sequence[Prompt], progress: Progress | None) -> None:
        """Prefill prefixes of prompts and keep their keys and values; all are checked before the first runs.

        Raises:
            ContextOverflowError: A document leaves no room in the window.
        """
        heads = [warm_prefix_ids(self.template, document) for document in documents]
        runs = [self.decoder.prefill(head, namespace=self.namespace) for head in heads]
        before, total = 0, sum(map(len, heads))
        for head, run in zip(heads, runs, strict=True):
            for done in run:
                if progress is not None:
                    progress(before + done, total)
            before += len(head)
            if progress is not None:  # a known document has no pieces to run
                progress(before, total)

    def _settled(self, params: SamplingParams) -> Sampling:
        from rasd_integrations.engine.generation_config import checkpoint_sampling

        return params.settled(checkpoint_sampling(self.decoder.target.model))

    def _speculation_for(self, request: Request) -> SpeculationConfig:
        """Return the call's own way of judging drafts, else the engine's; lossless if the answer is constrained."""
        own, asked = self.speculation, request.params.knowledge_transfer
        if asked is None:
            return replace(own, knowledge_transfer=None) if request.bound else own
        config = replace(own, knowledge_transfer=asked)
        if not config.lossless and self.decoder.teacher is None:
            msg = (
                f"knowledge_transfer is {asked!r} for this call, but the drafter model cannot be its teacher: it has "
                f"another vocabulary, or steps that are not deterministic. Build the model with drafter='auto' or "
                f"one of the target's family, or with knowledge_transfer."
            )
            raise ConfigurationError(msg)
        return config

    def _drafter(self, request: Request) -> Drafter | None:
        return self.decoder.drafter if request.params.drafting else None

    def plan(self, request: Request) -> PromptPlan:
        """Return what target and drafter read."""
        drafter = self._drafter(request)
        teaches = self.teaches or not self._speculation_for(request).lossless
        max_tokens = self._settled(request.params).max_tokens
        if self.context == "prompt" and drafter is None and not teaches:
            return self.planner.plan_without_drafter(request.prompt, request.hints)
        return self.planner.plan(
            request.prompt,
            hints=request.hints,
            room=self.decoder.target.window
            - max_tokens
            - template_tokens(self.template, request.prompt, request.tools),
            wants_drafter_prompt=teaches or (drafter is not None and drafter.needs.prompt),
        )

    def _grammar(self, request: Request, max_tokens: int, *, thinking: bool) -> GrammarState | None:
        from rasd_integrations.text.grammar.compiler import grammar_compiler

        template, target = self.template, self.decoder.target
        ends = target.eos_ids | template.turn_ends
        compiler = grammar_compiler(template.tokenizer, target.vocab_size, ends)
        thought_end = template.reasoning.end if thinking and template.reasoning else None
        return compiler.state(
            request.params.grammar, request.tools, template.tool_format,
            thought_end=thought_end, room=max_tokens,
        )  # fmt: skip

    def _report_cut(
        self, chunks: Generator[TextDelta, None, None], grammar: GrammarState, params: Sampling
    ) -> Generator[TextDelta, None, None]:
        """Yield a constrained answer; if ``max_tokens`` cut it, warn and name the fields that were closed, or raise."""
        ids: list[int] = []
        with closing(chunks):
            for chunk in chunks:
                ids += chunk.token_ids
                if chunk.finish_reason == "length":
                    fields = self._closed_fields(ids, grammar)
                    if chunk.stats is not None:
                        chunk.stats.closed_fields = fields
                    msg = (
                        f"The answer was cut at max_tokens, {params.max_tokens} tokens"
                        f"{', and these values were closed: ' + ', '.join(fields) if fields else ''}. Raise "
                        f"max_tokens, or limit the length of texts and lists in the schema."
                    )
                    if params.on_cut == "raise":
                        raise DecodingError(msg)
                    logger.warning("%s", msg)
                yield chunk

    def _closed_fields(self, ids: Sequence[int], grammar: GrammarState) -> tuple[str, ...]:
        if not grammar.is_closing:
            return ()
        decode = self.template.tokenizer.decode
        text, kept = (decode([*part]) for part in (ids, ids[: len(ids) - grammar.closed_tokens]))
        return closed_fields(str(text), len(str(kept)))

    def _count_tokens(self, text: str) -> int:
        return len(self.template.encode_chunk(text))


def _gated(
    blocks: Generator[TokenBlock, None, None], gate: AbstractContextManager[None]
) -> Generator[TokenBlock, None, None]:
    with gate, closing(blocks):
        yield from blocks


def encode(template: ChatTemplate, prompt: Prompt, tools: ToolUse | None = None) -> list[int]:
    """Return the ids of a prompt: a text as it is, messages and tools by the template."""
    if isinstance(prompt, str):
        return template.encode_text(prompt)
    return template.encode_messages(prompt, tools=tools.visible if tools is not None else None)


def template_tokens(template: ChatTemplate, prompt: Prompt, tools: ToolUse | None = None) -> int:
    """Return the tokens that the template writes around the prompt's own text."""
    if isinstance(prompt, str):
        return _SPARE_TOKENS
    bare = [{**message, "content": "a"} for message in prompt]
    return len(encode(template, bare, tools)) + _SPARE_TOKENS


def draft_context(
    template: ChatTemplate,
    plan: PromptPlan,
    chunks: Sequence[Chunk],
    most_tokens: int,
    tools: ToolUse | None = None,
) -> DraftContext:
    """Return what the drafter may know; a prompt of its own only up to ``most_tokens``."""
    drafter_ids = None if plan.drafter is None else tuple(encode(template, plan.drafter, tools))
    if drafter_ids is not None and len(drafter_ids) > most_tokens:
        drafter_ids = None
    return DraftContext(
        prompt_ids=(),
        chunk_ids=tuple(tuple(template.encode_chunk(chunk.text)) for chunk in chunks),
        drafter_prompt_ids=drafter_ids,
    )


def note(plan: PromptPlan, context: DraftContext, stats: DecodingStats) -> None:
    """Write what was planned into the answer's statistics."""
    stats.question_source = plan.question_source
    stats.chunk_source = plan.chunk_source
    stats.num_chunks = len(plan.chunks)
    stats.off_reason = plan.off_reason
    stats.faults = plan.faults
    stats.omitted_tokens = plan.omitted_tokens
    stats.retrieve_s = plan.retrieve_s
    stats.drafter_prompt_tokens = len(context.drafter_prompt_ids or ())


def warm_prefix_ids(template: ChatTemplate, document: Prompt) -> list[int]:
    """Return the ids that every prompt beginning with ``document`` shares.

    A text is the prefix of the first user message, or of a plain prompt if there is no template.
    """
    if isinstance(document, str):
        if not template.exists:
            return template.encode_text(document)
        document = [{"role": "user", "content": document}]
    *before, last = document
    one, other = (
        template.encode_messages([*before, {**last, "content": f"{last['content']}\n\n{tail}"}])
        for tail in ("A", "7")
    )
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), 0)]


def joined(chunks: Sequence[TextDelta]) -> Generation:
    """Return the whole answer of a stream."""
    last = chunks[-1]
    calls: dict[int, ToolCall] = {}
    for delta in (delta for chunk in chunks for delta in chunk.tool_calls):
        known = calls.get(delta.index) or ToolCall(delta.id or "", delta.name or "", "")
        calls[delta.index] = replace(known, arguments=known.arguments + delta.arguments)
    return Generation(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        finish_reason=last.finish_reason or "length",
        stats=last.stats or DecodingStats(),
        reasoning="".join(chunk.reasoning for chunk in chunks),
        tool_calls=tuple(calls.values()),
        logprobs=tuple(one for chunk in chunks for one in chunk.logprobs),
    )
