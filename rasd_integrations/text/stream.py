"""Blocks of token ids to chunks of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.detokenizer import IncrementalDetokenizer
from rasd_integrations.text.stop import StopMatcher
from rasd_integrations.types import FinishReason, TextChunk, TokenBlock


def stream_text(
    blocks: Iterator[TokenBlock],
    detokenizer: IncrementalDetokenizer,
    stop: Sequence[str],
    stats: Callable[[], DecodingStats],
) -> Iterator[TextChunk]:
    """Yield the text of ``blocks``, one chunk a block, cut before the first stop string.

    ``blocks`` is closed when a stop string ends the text, and when the consumer closes this iterator.
    The last chunk has the finish reason and what ``stats`` returns then.
    """
    matcher = StopMatcher(stop)
    try:
        for block in blocks:
            reason: FinishReason | None = block.finish_reason
            text = matcher.push(detokenizer.push(block.token_ids))
            if reason is not None:
                text += matcher.push(detokenizer.flush()) + matcher.flush()
            if matcher.stopped:
                reason = "stop"
            if reason is None:
                yield TextChunk(text, block.token_ids)
                continue
            _close(blocks)  # before the statistics are read: the engine ends them when it stops
            yield TextChunk(text, block.token_ids, reason, stats())
            return
    finally:
        _close(blocks)


def _close(blocks: Iterator[TokenBlock]) -> None:
    close = getattr(blocks, "close", None)
    if close is not None:
        close()
