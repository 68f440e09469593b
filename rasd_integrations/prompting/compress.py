"""The drafter's prompt: the target's, with its context shortened to what the question is about."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rasd_integrations.config import RetrievalConfig
from rasd_integrations.prompting.chunks import Found
from rasd_integrations.prompting.hints import Prompt, PromptHints
from rasd_integrations.prompting.locate import PromptIndex
from rasd_integrations.prompting.prompt_view import PromptView, Span, clean, hulls, without
from rasd_integrations.prompting.question import Question
from rasd_integrations.prompting.splitting import PieceRanker, boundary
from rasd_integrations.types import Chunk

_JOINT = "\n\n"
_LONGEST_JOINT = 80  # characters between two neighbours of the prompt that are kept as they are
_PARAGRAPH = re.compile(r"\n\s*\n|\n[-=_*#]{3,}[^\n]*\n")
_TAIL = 4  # pieces; text this near a message's ends may be its template's own
_OPENERS = (
    ":",
    "\n",
    "'",
    '"',
    "[",
    "(",
    "{",
    ">",
)  # what a template writes right before its context
_CLOSERS = ("\n", "'", '"', "]", ")", "}", "<")


@dataclass(frozen=True, slots=True)
class Scale:
    """The prompt's measures.

    Attributes:
        tokens: About how many tokens the prompt has.
        chars_per_token: Characters a token, on average.
        chunk_chars: Characters that make a piece of ``chunk_tokens``.
    """

    tokens: int
    chars_per_token: float
    chunk_chars: int

    @classmethod
    def of(cls, view: PromptView, tokens: int, retrieval: RetrievalConfig) -> Scale:
        """Measure ``view``, which has about ``tokens`` tokens."""
        ratio = view.chars / max(tokens, 1) or 1.0
        # Rounded, so that the next question on the same documents finds the same pieces.
        chunk_chars = max(round(retrieval.chunk_tokens * ratio / 32), 1) * 32
        return cls(tokens, ratio, chunk_chars)


@dataclass(frozen=True, slots=True)
class Compressed:
    """A short prompt, or why there is none; ``pieces`` are what was cut out of the prompt for it."""

    drafter: Prompt | None = None
    pieces: tuple[Chunk, ...] = ()
    off_reason: str | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Choice:
    spans: list[Span]
    pieces: list[Span]
    extra: list[Chunk]


class Compressor:
    """Shortens prompts to the drafter's budget."""

    def __init__(self, retrieval: RetrievalConfig) -> None:
        """Keep to the limits of ``retrieval``."""
        self._retrieval = retrieval
        self._ranker = PieceRanker()

    def compress(
        self,
        view: PromptView,
        index: PromptIndex,
        hints: PromptHints,
        found: Found,
        question: Question,
        scale: Scale,
    ) -> Compressed:
        """Return the first of the layouts that is short enough.

        Everything outside the layout's regions stays verbatim; inside, the chosen stretches keep
        their order. ``hints.rerender`` fills the template again where the region is its context.
        """
        allowed = self._retrieval.gate_share * view.chars
        shortest = None
        for regions in self._layouts(view, index, found, question, scale):
            choice = self._choose(view, regions, found, question, scale)
            if not choice.spans:
                continue
            drafter, faults = _render(view, regions, choice, found, index, hints)
            chars = PromptView.of(drafter).chars
            if chars <= allowed:
                pieces = (Chunk(view.text(s), rank=i) for i, s in enumerate(choice.pieces))
                return Compressed(drafter, tuple(pieces), faults=faults)
            shortest = min(shortest or chars, chars)
        if shortest is None:
            return Compressed(off_reason="the prompt has no long part that could be shortened")
        tokens = round(shortest / scale.chars_per_token)
        return Compressed(
            off_reason=f"the drafter's prompt would have about {tokens} of {scale.tokens} tokens, "
            f"over gate_share={self._retrieval.gate_share:g}"
        )

    def _layouts(
        self, view: PromptView, index: PromptIndex, found: Found, question: Question, scale: Scale
    ) -> Iterator[list[Span]]:
        """Yield what may be shortened: the known context, the captured chunks' frame, ever more long parts."""
        located = [at.span for at in found.located]
        inner = {
            i: _inner(view, i, located, question.text, scale.chunk_chars)
            for i in range(len(view.texts))
        }
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
        for messages in (retrieved, asked, list(inner)):  # instructions are cut last
            yield clean(view, [span for i in messages for span in inner[i]])

    def _choose(
        self, view: PromptView, regions: list[Span], found: Found, question: Question, scale: Scale
    ) -> _Choice:
        """Choose chunks in rank order, then the regions' other pieces by their words, up to the budget."""
        left = self._retrieval.drafter_budget(scale.tokens) * scale.chars_per_token
        passages = [
            at
            for at in found.passages(scale.chunk_chars)
            if any(r.contains(at.span) for r in regions)
        ]
        choice = _Choice([], [], [])
        ranked: list[tuple[int, Span | Chunk]] = [(at.chunk.rank, at.span) for at in passages]
        ranked += [(chunk.rank, chunk) for chunk in found.extra]
        for _, item in sorted(ranked, key=lambda pair: pair[0]):
            size = len(item) if isinstance(item, Span) else len(item.text)
            if size > left and (choice.spans or choice.extra):
                continue
            left -= size
            if isinstance(item, Span):
                choice.spans.append(item)
            else:
                choice.extra.append(item)
        gaps = without(regions, [at.span for at in passages])
        pieces = self._ranker.rank(
            view, gaps, question.words, scale.chunk_chars, complete=not choice.spans
        )
        for piece in pieces:
            if len(piece) > left and choice.spans:
                break
            left -= len(piece)
            choice.spans.append(piece)
            choice.pieces.append(piece)
        return choice


def _inner(
    view: PromptView, message: int, located: Sequence[Span], question: str, size: int
) -> list[Span]:
    """Return what may be shortened of a message: all but its head, its tail and the question's line."""
    text = view.texts[message]
    if view.roles[message] == "assistant" or len(text) <= 3 * size:
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
        line = Span(message, text.rfind("\n", 0, asked) + 1, text.find("\n", asked + len(question)))
        return without([region], [line if line.end >= 0 else replace(line, end=len(text))])
    return [region] if start < end else []


def _edge(length: int, before: int, template: int) -> int:
    """Return how much of a message's end to keep, where ``before`` stands before the first chunk.

    All of it where that is no more than a ``template`` has, else the usual ``length``.
    """
    return before if before <= template else min(length, before)


def _paragraph(text: str, start: int, end: int) -> int:
    """Return where the last paragraph of ``text[start:end]`` starts, its rule included, else the line."""
    cut = None
    for cut in _PARAGRAPH.finditer(text, start, end):  # noqa: B007 - the last one counts
        pass
    return text.rfind("\n", 0, end) + 1 if cut is None else cut.start()


def _render(
    view: PromptView,
    regions: Sequence[Span],
    choice: _Choice,
    found: Found,
    index: PromptIndex,
    hints: PromptHints,
) -> tuple[Prompt, tuple[str, ...]]:
    """Return the prompt with each region cut down to the chosen spans, and what went wrong."""
    located = [at.span for at in found.located]
    shorts = [_shortened(view, region, choice.spans, located) for region in regions]
    extra = _JOINT.join(chunk.text for chunk in choice.extra)
    if extra:
        shorts[-1] = _JOINT.join(part for part in (shorts[-1], extra) if part)
    return refill(view, regions, shorts, index, hints)


def refill(
    view: PromptView,
    regions: Sequence[Span],
    contents: Sequence[str],
    index: PromptIndex,
    hints: PromptHints,
) -> tuple[Prompt, tuple[str, ...]]:
    """Return the prompt with other text in ``regions``, and what went wrong.

    Where the only region is the template's context, the template is filled again.
    """
    faults: tuple[str, ...] = ()
    if hints.rerender and index.context and clean(view, [index.context]) == list(regions):
        try:
            return hints.rerender(contents[0]), ()
        except Exception as error:  # noqa: BLE001 - a user's template; what it raises is reported
            faults = (f"The prompt's template could not be filled again: {error!r}"[:300],)
    texts: dict[int, str] = {}
    for region, content in sorted(zip(regions, contents, strict=True), key=lambda p: -p[0].start):
        text = texts.get(region.message, view.texts[region.message])
        texts[region.message] = text[: region.start] + content + text[region.end :]
    return view.edited(texts), faults


def _shortened(
    view: PromptView, region: Span, chosen: Sequence[Span], located: Sequence[Span]
) -> str:
    """Return the chosen spans of a region in their order, joined as they were where they were neighbours."""
    text = view.texts[region.message]
    spans = sorted((s for s in chosen if region.contains(s)), key=lambda s: (s.start, s.end))
    parts: list[str] = []
    at = region.start
    for span in spans:
        if span.end <= at and parts:
            continue  # overlapping chunks: said already
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
