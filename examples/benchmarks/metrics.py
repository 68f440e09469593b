"""What a run says: medians over questions, and where two engines' answers part."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rasd_integrations.demo.measure import median

COLD_SHARE, CACHED_SHARE = 0.1, 0.8


@dataclass(slots=True)
class Answer:
    """One answer of one engine.

    Attributes:
        ids: The answer's tokens.
        prompt_tokens: Length of the prompt.
        cached_tokens: Prompt tokens whose KV was already there.
        steps: Forwards of the target after the prefill; each yields at least one token.
        first_s: Seconds to the first token.
        total_s: Seconds to the last.
        stats: What the engine itself reports.
    """

    ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    steps: int
    first_s: float
    total_s: float
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def decode_ms(self) -> float:
        """Milliseconds a token after the first."""
        return 1000 * (self.total_s - self.first_s) / max(len(self.ids) - 1, 1)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return one engine's figures over its answers."""
    tokens = sum(len(a.ids) - 1 for a in answers)
    seconds = sum(a.total_s - a.first_s for a in answers)
    cold = [a.first_s for a in answers if a.cached_tokens <= COLD_SHARE * a.prompt_tokens]
    cached = [a.first_s for a in answers if a.cached_tokens >= CACHED_SHARE * a.prompt_tokens]
    return {
        "questions": len(answers),
        "prompt_tokens": median(a.prompt_tokens for a in answers),
        "answer_tokens": sum(len(a.ids) for a in answers),
        "first_token_cold_s": median(cold),
        "first_token_cached_s": median(cached),
        "decode_ms_per_token": median(a.decode_ms for a in answers),
        "decode_tokens_per_s": tokens / seconds if seconds else None,
        "tokens_per_step": sum(len(a.ids) for a in answers) / max(sum(a.steps for a in answers), 1),
    }


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the first place where two answers differ; ``None`` where they do not."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> dict[str, Any]:
    """Return how many answers are the same tokens, and where the others part."""
    places = [first_difference(a.ids, b.ids) for a, b in zip(ours, theirs, strict=True)]
    return {
        "identical": sum(p is None for p in places),
        "of": len(places),
        "first_differences": [p for p in places if p is not None],
    }


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    info = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name(0)
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    try:
        out = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()
