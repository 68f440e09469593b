"""What lies between the rooms of one answer: plans to token ids, chunks to an answer. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rasd_integrations.config import SpeculationConfig
from rasd_integrations.prompting import Prompt, PromptPlan
from rasd_integrations.response_format import ToolUse
from rasd_integrations.retrieval import ChunkSource
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.prompt.template import ChatTemplate
from rasd_integrations.types import DraftContext, Generation, TextChunk, ToolCall

_SPARE_TOKENS = 8  # pieces counted one by one may merge differently when joined


def encode(template: ChatTemplate, prompt: Prompt, tools: ToolUse | None = None) -> list[int]:
    """Return the ids of a prompt: a text as it stands, messages and tools by the template."""
    if isinstance(prompt, str):
        return template.encode_text(prompt)
    return template.encode_messages(prompt, tools=tools.visible if tools is not None else None)


def template_tokens(template: ChatTemplate, prompt: Prompt, tools: ToolUse | None = None) -> int:
    """Return the tokens that the template writes round the prompt's own text."""
    if isinstance(prompt, str):
        return _SPARE_TOKENS
    bare = [{**message, "content": "a"} for message in prompt]
    return len(encode(template, bare, tools)) + _SPARE_TOKENS


def draft_context(
    template: ChatTemplate, plan: PromptPlan, most_tokens: int, tools: ToolUse | None = None
) -> DraftContext:
    """Return what the drafter may know; a prompt of its own only up to ``most_tokens``."""
    drafter_ids = None if plan.drafter is None else tuple(encode(template, plan.drafter, tools))
    if drafter_ids is not None and len(drafter_ids) > most_tokens:
        drafter_ids = None
    return DraftContext(
        prompt_ids=(),
        chunk_ids=tuple(tuple(template.encode_chunk(chunk.text)) for chunk in plan.chunks),
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


def head_ids(template: ChatTemplate, document: Prompt) -> list[int]:
    """Return the ids that every prompt beginning with ``document`` shares.

    A text is the head of the first user message, or of a plain prompt where there is no template.
    """
    if isinstance(document, str):
        if not template.tokenizer.chat_template:
            return template.encode_text(document)
        document = [{"role": "user", "content": document}]
    *before, last = document
    one, other = (
        template.encode_messages([*before, {**last, "content": f"{last['content']}\n\n{tail}"}])
        for tail in ("A", "7")
    )
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), 0)]


def joined(chunks: Sequence[TextChunk]) -> Generation:
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
    )


def identity(
    fixed: Mapping[str, Any],
    speculation: SpeculationConfig,
    template_kwargs: Mapping[str, Any],
    weights: Mapping[str, str],
    *,
    drafter: object,
    source: ChunkSource | None,
) -> dict[str, Any]:
    """Return what decides the output besides prompt and sampling, as plain JSON.

    Drafter and store are part of it only where they may change what is said.
    """
    out: dict[str, Any] = {
        **fixed,
        "knowledge_transfer": speculation.knowledge_transfer,
        "mixture": speculation.mixture,
        "chat_template_kwargs": {k: repr(v) for k, v in sorted(template_kwargs.items())},
    }
    if "weights" in weights:
        out["weights"] = weights["weights"]
    if not speculation.lossless:
        out |= weights
        out["drafter"] = str(drafter) if isinstance(drafter, str | Path) else type(drafter).__name__
    if source is not None and (not speculation.lossless or fixed.get("context") == "documents"):
        out["store"] = source.fingerprint()
    return out
