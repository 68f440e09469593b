"""Turns blocks of token ids into streamed text, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.answer.detokenizer import IncrementalDetokenizer
from rasd_integrations.text.answer.parser import AnswerParser, Parsed
from rasd_integrations.text.answer.stop import StopMatcher
from rasd_integrations.types import TextDelta, TokenBlock


def stream_text(
    blocks: Generator[TokenBlock, None, None],
    detokenizer: IncrementalDetokenizer,
    stop: Sequence[str],
    stats: Callable[[], DecodingStats],
    *,
    parser: AnswerParser | None = None,
    max_calls: int | None = None,
    hidden: str = "",
    count_tokens: Callable[[str], int] = len,
) -> Generator[TextDelta, None, None]:
    """Yield the answer in ``blocks``, one delta per block.

    Args:
        blocks: Closed when the answer ends early, and when the consumer closes this iterator.
        detokenizer: A new one.
        stop: The text ends before the first of these; reasoning and calls are not searched.
        stats: Statistics of the last delta, called when decoding has ended.
        parser: Separates reasoning and calls from the text; ``None``: all is text.
        max_calls: The answer ends before any further call.
        hidden: Characters to remove from the output (marks of stop strings).
        count_tokens: Counts the tokens of the reasoning, for the statistics.
    """
    matcher = StopMatcher(stop)
    # Calls before a stop string count, which is only known token by token.
    singly = parser is not None and bool(stop)
    shown = str.maketrans("", "", hidden)
    reasoning = ""
    try:
        for block in blocks:
            reason = block.finish_reason
            piece = Parsed()
            for raw, ended in _texts(detokenizer, block, singly=singly):
                begun = parser.num_calls if parser is not None else 0
                found = _parsed(parser, raw, ended=ended)
                text = matcher.push(found.text) + (matcher.flush() if ended else "")
                calls = found.tool_calls
                if matcher.stopped:  # calls that begin in the same text come after it
                    calls = tuple(call for call in calls if call.index < begun)
                piece = piece.joined(Parsed(text, found.reasoning, calls))
                if matcher.stopped:
                    break
            calls = piece.tool_calls
            if matcher.stopped:
                reason = "stop"
            elif max_calls is not None and any(call.index >= max_calls for call in calls):
                reason, calls = "tool_calls", tuple(c for c in calls if c.index < max_calls)
            elif reason == "stop" and parser is not None and parser.num_calls:
                reason = "tool_calls"
            delta = TextDelta(
                piece.text.translate(shown),
                block.token_ids,
                reason,
                reasoning=piece.reasoning.translate(shown),
                tool_calls=tuple(
                    replace(call, arguments=call.arguments.translate(shown)) for call in calls
                ),
                logprobs=block.logprobs,
            )
            reasoning += delta.reasoning
            if reason is None:
                yield delta
                continue
            blocks.close()  # completes the engine's statistics
            final = stats()
            if reasoning:
                final.reasoning_tokens = count_tokens(reasoning)
            yield replace(delta, stats=final)
            return
    finally:
        blocks.close()


def by_token(blocks: Generator[TokenBlock, None, None]) -> Generator[TokenBlock, None, None]:
    """Yield the tokens of each block as blocks of their own; each delta is then one token's."""
    with closing(blocks):
        for block in blocks:
            for place, token in enumerate(block.token_ids[:-1]):
                yield TokenBlock((token,), logprobs=block.logprobs[place : place + 1])
            yield replace(block, token_ids=block.token_ids[-1:], logprobs=block.logprobs[-1:])


def _texts(
    detokenizer: IncrementalDetokenizer, block: TokenBlock, *, singly: bool
) -> Iterator[tuple[str, bool]]:
    """Yield a block's text, at once or by token, and True for the text after its last block."""
    for ids in ((token,) for token in block.token_ids) if singly else (block.token_ids,):
        yield detokenizer.push(ids), False
    if block.finish_reason is not None:
        yield detokenizer.flush(), True


def _parsed(parser: AnswerParser | None, text: str, *, ended: bool) -> Parsed:
    if parser is None:
        return Parsed(text)
    piece = parser.push(text)
    return piece.joined(parser.flush()) if ended else piece
