"""One timed answer, whoever gives it: a LangChain chain, a LlamaIndex engine, or transformers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from rasd_integrations.stats import DecodingStats

WARM_SHARE = 0.8
"""An answer counts as cached when at least this share of its prompt was found in the cache."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it took; seconds are wall-clock and include retrieval."""

    question: str
    text: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    steps: int
    first_s: float
    total_s: float

    @property
    def warm(self) -> bool:
        """Whether the documents' KV was already there."""
        return self.cached_tokens >= WARM_SHARE * self.prompt_tokens

    @property
    def decode_ms(self) -> float:
        """Milliseconds a token after the first."""
        return 1000 * (self.total_s - self.first_s) / max(self.tokens - 1, 1)


def timed_stream(question: str, pieces: Iterable[str], stats: DecodingStats) -> Answer:
    """Consume a lazy stream of text, and read its LLM's cumulative ``stats`` before and after."""
    before = _counters(stats)
    start = time.perf_counter()
    first = None
    text = ""
    for piece in pieces:
        if piece and first is None:
            first = time.perf_counter()
        text += piece
    end = time.perf_counter()
    prompt, cached, tokens, steps = (
        now - then for now, then in zip(_counters(stats), before, strict=True)
    )
    return Answer(
        question, text, prompt, cached, tokens, steps, (first or end) - start, end - start
    )


def _counters(stats: DecodingStats) -> tuple[int, int, int, int]:
    return (
        stats.prompt_tokens,
        stats.cached_prompt_tokens,
        stats.generated_tokens,
        stats.target_steps,
    )


class StreamClock(BaseStreamer):
    """Counts what ``generate`` hands over: the prompt first, then the tokens of each step."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.calls = 0
        self.first = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt or a step's tokens."""
        del value
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        """Nothing is held back."""


def transformers_answer(
    question: str, model: Any, tokenizer: Any, ids: Sequence[int], max_tokens: int
) -> Answer:
    """Answer with transformers' own greedy ``generate`` on exactly these prompt ids."""
    clock = StreamClock()
    prompt = torch.tensor([list(ids)], device=model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=clock,
        )
    end = time.perf_counter()
    new = out[0, len(ids) :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Answer(question, text, len(ids), 0, len(new), len(new), clock.first - start, end - start)


def median(values: Iterable[float]) -> float | None:
    """Return the median, or ``None`` of nothing."""
    found = list(values)
    return statistics.median(found) if found else None
