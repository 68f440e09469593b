"""Blocks of token ids to chunks of an answer: its text, the model's thoughts, the tools it calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.answer.detokenizer import IncrementalDetokenizer
from rasd_integrations.text.answer.parser import AnswerParser, Parsed
from rasd_integrations.text.answer.stop import StopMatcher
from rasd_integrations.types import TextDelta, TokenBlock


def stream_text(
    blocks: Iterator[TokenBlock],
    detokenizer: IncrementalDetokenizer,
    stop: Sequence[str],
    stats: Callable[[], DecodingStats],
    *,
    parser: AnswerParser | None = None,
    most_calls: int | None = None,
    hidden: str = "",
    count_tokens: Callable[[str], int] = len,
) -> Generator[TextDelta, None, None]:
    """Yield the answer in ``blocks``, one chunk a block.

    Args:
        blocks: Closed when the answer ends early, and when the consumer closes this iterator.
        detokenizer: At its start.
        stop: The text ends before the first of these; thoughts and calls are not searched.
        stats: What the last chunk carries, read when decoding has ended.
        parser: Takes thoughts and calls out of the text; ``None``: all is text.
        most_calls: The answer ends before one call more.
        hidden: Characters that stop strings are searched with, but nothing shows.
        count_tokens: Measures the thoughts, for the statistics.
    """
    matcher = StopMatcher(stop)
    # What stands before a stop string is known token by token only: calls before it count.
    singly = parser is not None and bool(stop)
    shown = str.maketrans("", "", hidden)
    thoughts: list[str] = []
    try:
        for block in blocks:
            reason = block.finish_reason
            piece = Parsed()
            for raw, ended in _texts(detokenizer, block, singly=singly):
                begun = parser.num_calls if parser is not None else 0
                found = _parsed(parser, raw, ended=ended)
                text = matcher.push(found.text) + (matcher.flush() if ended else "")
                calls = found.tool_calls
                if matcher.stopped:  # what begins with it is behind it
                    calls = tuple(call for call in calls if call.index < begun)
                piece = piece.joined(Parsed(text, found.reasoning, calls))
                if matcher.stopped:
                    break
            calls = piece.tool_calls
            if matcher.stopped:
                reason = "stop"
            elif most_calls is not None and any(call.index >= most_calls for call in calls):
                reason, calls = "tool_calls", tuple(c for c in calls if c.index < most_calls)
            elif reason == "stop" and parser is not None and parser.num_calls:
                reason = "tool_calls"
            text, thought = piece.text.translate(shown), piece.reasoning.translate(shown)
            calls = tuple(replace(c, arguments=c.arguments.translate(shown)) for c in calls)
            thoughts.append(thought)
            if reason is None:
                yield TextDelta(text, block.token_ids, reasoning=thought, tool_calls=calls)
                continue
            _close(blocks)  # before the statistics are read: the engine ends them when it stops
            final = stats()
            if any(thoughts):
                final.reasoning_tokens = count_tokens("".join(thoughts))
            yield TextDelta(text, block.token_ids, reason, final, thought, calls)
            return
    finally:
        _close(blocks)


def _texts(
    detokenizer: IncrementalDetokenizer, block: TokenBlock, *, singly: bool
) -> Iterator[tuple[str, bool]]:
    """Yield the text of a block, whole or token by token, and whether the answer has ended with it."""
    for ids in ((token,) for token in block.token_ids) if singly else (block.token_ids,):
        yield detokenizer.push(ids), False
    if block.finish_reason is not None:
        yield detokenizer.flush(), True


def _parsed(parser: AnswerParser | None, text: str, *, ended: bool) -> Parsed:
    if parser is None:
        return Parsed(text)
    piece = parser.push(text)
    return piece.joined(parser.flush()) if ended else piece


def _close(blocks: Iterator[TokenBlock]) -> None:
    close = getattr(blocks, "close", None)
    if close is not None:
        close()
