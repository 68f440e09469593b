"""Blocks of token ids to chunks of an answer: its text, the model's thoughts, the tools it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.answer.detokenizer import IncrementalDetokenizer
from rasd_integrations.text.answer.parser import AnswerParser, Parsed
from rasd_integrations.text.answer.stop import StopMatcher
from rasd_integrations.types import TextChunk, TokenBlock


def stream_text(
    blocks: Iterator[TokenBlock],
    detokenizer: IncrementalDetokenizer,
    stop: Sequence[str],
    stats: Callable[[], DecodingStats],
    *,
    parser: AnswerParser | None = None,
    most_calls: int | None = None,
    count_tokens: Callable[[str], int] = len,
) -> Iterator[TextChunk]:
    """Yield the answer in ``blocks``, one chunk a block.

    Args:
        blocks: Closed when the answer ends early, and when the consumer closes this iterator.
        detokenizer: At its start.
        stop: The text ends before the first of these; thoughts and calls are not searched.
        stats: What the last chunk carries, read when decoding has ended.
        parser: Takes thoughts and calls out of the text; ``None``: all is text.
        most_calls: The answer ends before one call more.
        count_tokens: Measures the thoughts, for the statistics.
    """
    matcher = StopMatcher(stop)
    thoughts: list[str] = []
    try:
        for block in blocks:
            reason = block.finish_reason
            raw = detokenizer.push(block.token_ids)
            if reason is not None:
                raw += detokenizer.flush()
            piece = _parsed(parser, raw, ended=reason is not None)
            text = matcher.push(piece.text)
            if reason is not None:
                text += matcher.flush()
            calls = piece.tool_calls
            if matcher.stopped:
                reason, calls = "stop", ()  # calls stand behind the text that ended here
            elif most_calls is not None and any(call.index >= most_calls for call in calls):
                reason, calls = "tool_calls", tuple(c for c in calls if c.index < most_calls)
            elif reason == "stop" and parser is not None and parser.num_calls:
                reason = "tool_calls"
            thoughts.append(piece.reasoning)
            if reason is None:
                yield TextChunk(text, block.token_ids, reasoning=piece.reasoning, tool_calls=calls)
                continue
            _close(blocks)  # before the statistics are read: the engine ends them when it stops
            final = stats()
            if any(thoughts):
                final.reasoning_tokens = count_tokens("".join(thoughts))
            yield TextChunk(text, block.token_ids, reason, final, piece.reasoning, calls)
            return
    finally:
        _close(blocks)


def _parsed(parser: AnswerParser | None, text: str, *, ended: bool) -> Parsed:
    if parser is None:
        return Parsed(text)
    piece = parser.push(text)
    return piece.joined(parser.flush()) if ended else piece


def _close(blocks: Iterator[TokenBlock]) -> None:
    close = getattr(blocks, "close", None)
    if close is not None:
        close()
