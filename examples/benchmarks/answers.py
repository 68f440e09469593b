"""One timed answer. Standard library only: the interpreters of the peers read this file too."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Answer:
    """One answer of one engine.

    Attributes:
        ids: The answer's tokens.
        prompt_tokens: Length of the prompt.
        cached_tokens: Prompt tokens whose KV was already there.
        steps: Forwards of the target that gave tokens, the first token's among them; ``None`` where
            the engine does not say.
        first_s: Seconds to the first token.
        total_s: Seconds to the end of the answer.
        stats: What the engine itself reports.
        arrivals: When tokens came, in seconds from the question, and how many at once.
    """

    ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    steps: int | None
    first_s: float
    total_s: float
    stats: dict[str, Any] = field(default_factory=dict)
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def later_tokens(self) -> int:
        """Tokens behind those that came first."""
        first = self.arrivals[0][1] if self.arrivals else 1
        return max(len(self.ids) - first, 0)

    @property
    def decode_s(self) -> float:
        """Seconds behind the first token."""
        return self.total_s - self.first_s

    @property
    def decode_ms(self) -> float:
        """Milliseconds a token, those that came first not counted."""
        return 1000 * self.decode_s / max(self.later_tokens, 1)

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between one arrival and the next: what a reader waits."""
        times = [seconds for seconds, _ in self.arrivals]
        return [1000 * (b - a) for a, b in itertools.pairwise(times)]


class Recorder:
    """Notes tokens as they come; made right before the engine is asked."""

    def __init__(self) -> None:
        """Start the clock."""
        self.ids: list[int] = []
        self.arrivals: list[tuple[float, int]] = []
        self._start = time.perf_counter()

    def add(self, ids: Sequence[int]) -> None:
        """Note tokens that are there now."""
        if ids:
            self.arrivals.append((time.perf_counter() - self._start, len(ids)))
            self.ids.extend(ids)

    def answer(
        self,
        prompt_tokens: int,
        cached_tokens: int,
        steps: int | None,
        stats: dict[str, Any] | None = None,
    ) -> Answer:
        """Stop the clock."""
        total = time.perf_counter() - self._start
        first = self.arrivals[0][0] if self.arrivals else total
        return Answer(
            self.ids, prompt_tokens, cached_tokens, steps, first, total, stats or {}, self.arrivals
        )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two prompts share from their start."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))


def peak_mib() -> float:
    """Return the largest resident set of this process, in MiB.

    Linux's ``ru_maxrss`` starts from what the parent held when it forked, so ``VmHWM`` is read where
    there is one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10
