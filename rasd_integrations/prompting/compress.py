"""The drafter's prompt: the target's, its context shortened to what the question needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rasd_integrations.config import RetrievalConfig
from rasd_integrations.prompting.chunks import FoundChunks
from rasd_integrations.prompting.hints import Prompt, PromptPlan
from rasd_integrations.prompting.locate import PromptIndex
from rasd_integrations.prompting.prompt_view import PromptView, Span, clean, hulls, without
from rasd_integrations.prompting.question import Question
from rasd_integrations.prompting.splitting import PieceRanker, boundary
from rasd_integrations.types import Chunk

_JOINT = "\n\n"
_LONGEST_JOINT = 80  # characters between two neighbours of the prompt that are kept as they are
_PARAGRAPH = re.compile(r"\n\s*\n|\n[-=_*#]{3,}[^\n]*\n")
_TAIL = 4  # pieces; text this near a message's ends may belong to its template
# What templates write right before and right behind their context.
_OPENERS = (":", "\n", "'", '"', "[", "(", "{", ">")
_CLOSERS = ("\n", "'", '"', "]", ")", "}", "<")


class Compressor:
    """Shortens prompts to the drafter's budget."""

    def __init__(self, retrieval: RetrievalConfig) -> None:
        """Keep within the limits of ``retrieval``."""
        self._retrieval = retrieval
        self._ranker = PieceRanker()

    def compress(
        self, plan: PromptPlan, index: PromptIndex, found: FoundChunks, question: Question
    ) -> PromptPlan:
        """Return ``plan`` with a drafter prompt: the first layout within ``gate_share``.

        Text outside the layout's regions is copied verbatim; inside, the chosen spans keep their
        order. ``hints.rerender`` fills the template again if the only region is its context.
        """
        view = index.view
        shortest = None
        for regions in _layouts(index, found, question):
            spans, pieces, extra = self._choose(index, regions, found, question)
            if not spans:
                continue
            located = [at.span for at in found.located]
            contents = [_shortened(view, region, spans, located) for region in regions]
            contents[-1] = _JOINT.join(filter(None, (contents[-1], *(c.text for c in extra))))
            drafter, faults = index.refill(regions, contents)
            chars = PromptView.of(drafter).chars
            if chars <= self._retrieval.gate_share * view.chars:
                plan = replace(plan, drafter=drafter, faults=(*plan.faults, *faults))
                if plan.chunks or not pieces:
                    return plan
                chunks = tuple(Chunk(view.text(span), rank=i) for i, span in enumerate(pieces))
                return replace(plan, chunks=chunks, chunk_source="prompt")
            shortest = min(shortest or chars, chars)
        reason = "the prompt has no long part that could be shortened"
        if shortest is not None:
            reason = (
                f"the drafter's prompt would have about {round(shortest / index.chars_per_token)} of "
                f"{index.tokens} tokens, over gate_share={self._retrieval.gate_share:g}"
            )
        return replace(plan, off_reason=reason)

    def _choose(
        self, index: PromptIndex, regions: list[Span], found: FoundChunks, question: Question
    ) -> tuple[list[Span], list[Span], list[Chunk]]:
        """Choose chunks by rank, then other pieces by shared words, up to the budget.

        Returns:
            All spans to keep, those of them that are no chunks, and chunks from outside the prompt.
        """
        left = self._retrieval.drafter_budget(index.tokens) * index.chars_per_token
        passages = [
            at
            for at in found.passages(index.chunk_chars)
            if any(region.contains(at.span) for region in regions)
        ]
        spans: list[Span] = []
        extra: list[Chunk] = []
        ranked: list[tuple[Chunk, Span | None]] = [(at.chunk, at.span) for at in passages]
        ranked += [(chunk, None) for chunk in found.extra]
        for chunk, span in sorted(ranked, key=lambda pair: pair[0].rank):
            size = len(chunk.text if span is None else span)
            if size > left and (spans or extra):
                continue
            left -= size
            if span is None:
                extra.append(chunk)
            else:
                spans.append(span)
        pieces: list[Span] = []
        for piece in self._ranker.rank(
            index.view,
            without(regions, [at.span for at in passages]),
            question.words,
            index.chunk_chars,
            complete=not spans,
        ):
            if len(piece) > left and (spans or pieces):
                break
            left -= len(piece)
            pieces.append(piece)
        return spans + pieces, pieces, extra


def only(index: PromptIndex, found: FoundChunks, chosen: Sequence[Span]) -> Prompt:
    """Return the prompt without the text of its located chunks but for the ``chosen`` spans."""
    located = [at.span for at in found.located]
    regions = clean(index.view, hulls(located))
    contents = [_shortened(index.view, region, chosen, located) for region in regions]
    return index.refill(regions, contents)[0]


def _layouts(index: PromptIndex, found: FoundChunks, question: Question) -> Iterator[list[Span]]:
    """Yield regions to shorten: the known context, the captured chunks' hull, ever more messages."""
    view = index.view
    located = [at.span for at in found.located]
    inner = {i: _inner(index, i, located, question.text) for i in range(len(view.texts))}
    tools = [s for i, spans in inner.items() if view.is_tool(i) for s in spans]
    if index.context is not None:
        context = index.context
        yield clean(view, [context, *(s for s in tools if s.message != context.message)])
    if found.frame:
        frames = hulls(found.frame)
        framed = {frame.message for frame in frames}
        yield clean(view, [*frames, *(s for s in tools if s.message not in framed)])
    holders = {span.message for span in located}
    retrieved = [i for i in inner if i in holders or view.is_tool(i)]
    asked = [i for i in inner if view.roles[i] != "system"]
    for messages in (retrieved, asked, list(inner)):  # last resort: instructions too
        yield clean(view, [span for i in messages for span in inner[i]])


def _inner(index: PromptIndex, message: int, located: Sequence[Span], question: str) -> list[Span]:
    """Return what may be shortened of a message: all but its ends and the question's line."""
    text, size = index.view.texts[message], index.chunk_chars
    if index.view.roles[message] == "assistant" or len(text) <= 3 * size:
        return []
    start = boundary(text, size // 2, size, last=True)
    end = boundary(text, len(text) - size, len(text) - size // 2, last=False)
    asked = text.rfind(question) if question else -1
    if asked >= 0 and len(text) - asked <= _TAIL * size:
        end = max(_paragraph(text, max(asked - size, 0), asked), start)
    inside = [s for s in located if s.message == message and not s.start <= asked < s.end]
    if inside:
        start = _edge(start, min(s.start for s in inside), _TAIL * size)
        ends = [s.end for s in inside if not end <= asked < s.end]
        end = len(text) - _edge(len(text) - end, len(text) - max(ends, default=end), _TAIL * size)
    region = Span(message, start, end)
    if start <= asked < end:
        line_end = text.find("\n", asked + len(question))
        line = Span(
            message, text.rfind("\n", 0, asked) + 1, line_end if line_end >= 0 else len(text)
        )
        return without([region], [line])
    return [region] if start < end else []


def _edge(length: int, before: int, template: int) -> int:
    """Return how much of a message's end to keep, given ``before`` characters outside the chunks.

    All of them if a template may be that long, else at most the usual ``length``.
    """
    return before if before <= template else min(length, before)


def _paragraph(text: str, start: int, end: int) -> int:
    """Return the start of the last paragraph (or else line) in ``text[start:end]``."""
    cuts = [cut.start() for cut in _PARAGRAPH.finditer(text, start, end)]
    return cuts[-1] if cuts else text.rfind("\n", 0, end) + 1


def _shortened(
    view: PromptView, region: Span, chosen: Sequence[Span], located: Sequence[Span]
) -> str:
    """Join the chosen spans of a region in order; neighbours keep the text between them."""
    text = view.texts[region.message]
    spans = sorted((s for s in chosen if region.contains(s)), key=lambda s: (s.start, s.end))
    parts: list[str] = []
    at = region.start
    for span in spans:
        if span.end <= at and parts:
            continue  # overlaps what is copied already
        gap = text[at : span.start]
        dropped = any(
            s.message == span.message and at <= s.start < span.start and s not in spans
            for s in located
        )
        if parts and len(gap) <= _LONGEST_JOINT and not dropped:
            parts.append(gap)
        elif gap and (parts or not text[max(at - 8, 0) : at].rstrip(" \t").endswith(_OPENERS)):
            parts.append(_JOINT if parts or at else "")
        parts.append(text[max(at, span.start) : span.end])
        at = span.end
    after = text[region.end : region.end + 8].lstrip(" \t")
    if parts and at < region.end and after and not after.startswith(_CLOSERS):
        parts.append(_JOINT)
    return "".join(parts)
