"""Times one answer: of a LangChain chain, a LlamaIndex engine, or transformers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from rasd_integrations.loading import LoadedModel
from rasd_integrations.stats import DecodingStats, Quote

WARM_SHARE = 0.8
"""An answer counts as cached if at least this share of its prompt was found in the cache."""


@dataclass(frozen=True, slots=True)
class Measured:
    """An answer and its figures; seconds are wall-clock and include retrieval.

    ``quotes`` is ``None`` of an engine that does not look for them.
    """

    question: str
    text: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    steps: int
    first_s: float
    total_s: float
    quotes: tuple[Quote, ...] | None = None

    @property
    def quoted(self) -> str | None:
        """What the answer quotes, in a line."""
        if not self.quotes:
            return None if self.quotes is None else "Quotes nothing word for word."
        names = dict.fromkeys(str(q.metadata.get("source", q.chunk_id)) for q in self.quotes)
        share = sum(q.end - q.start for q in self.quotes) / len(self.text)
        return f"Quotes {', '.join(names)}: {share:.0%} of it word for word."

    @property
    def warm(self) -> bool:
        """True if the documents' KV was cached."""
        return self.cached_tokens >= WARM_SHARE * self.prompt_tokens

    @property
    def decode_ms(self) -> float:
        """Milliseconds per token after the first."""
        return 1000 * (self.total_s - self.first_s) / max(self.tokens - 1, 1)


def timed_stream(question: str, pieces: Iterable[str], stats: DecodingStats) -> Measured:
    """Consume a lazy stream of text whose LLM adds up its counters in ``stats``."""
    before = replace(stats)
    start = time.perf_counter()
    first = None
    text = ""
    for piece in pieces:
        if piece and first is None:
            first = time.perf_counter()
        text += piece
    end = time.perf_counter()
    return Measured(
        question,
        text,
        stats.prompt_tokens - before.prompt_tokens,
        stats.cached_prompt_tokens - before.cached_prompt_tokens,
        stats.generated_tokens - before.generated_tokens,
        stats.target_steps - before.target_steps,
        (first or end) - start,
        end - start,
        stats.quotes,
    )


class _StreamClock(BaseStreamer):
    """Notes when ``generate`` hands over its first token, right after the prompt."""

    calls = 0
    first = 0.0

    def put(self, value: torch.Tensor) -> None:
        del value
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


def transformers_answer(
    question: str, loaded: LoadedModel, ids: Sequence[int], max_tokens: int
) -> Measured:
    """Answer with transformers' greedy ``generate`` on the same prompt ids."""
    clock, tokenizer = _StreamClock(), loaded.tokenizer
    model: Any = loaded.model
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
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    first_s, total_s = clock.first - start, end - start
    return Measured(question, text, len(ids), 0, len(new), len(new), first_s, total_s)


def median(values: Iterable[float]) -> float | None:
    """Return the median, or ``None`` of nothing."""
    found = list(values)
    return statistics.median(found) if found else None
