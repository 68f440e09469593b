"""The engines that are compared: ours, and transformers as its users run it. Greedy, same weights.

Each has ``answer`` (one prompt to one :class:`Answer`) and ``step_ms`` (one target forward of n tokens
over a cached prefix), and is built in a process of its own, so that memory can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from metrics import Answer
from tasks import Example
from transformers import DynamicCache

from rasd_integrations import RASD, SamplingParams
from rasd_integrations.demo.measure import StreamClock, median
from rasd_integrations.engine.kv import KVBuffer
from rasd_integrations.loading import load_model
from rasd_integrations.models import shared_model

STEP_REPEATS = 7
FILLER = 1000  # any ordinary token: a step costs the same whatever it reads


class Engine(Protocol):
    """A way to decode."""

    def answer(self, example: Example, max_tokens: int) -> Answer:
        """Decode one answer, keeping what the engine keeps between questions."""
        ...

    def step_ms(self, prefix: int, widths: Sequence[int]) -> dict[int, float]:
        """Return the median milliseconds of one forward of n tokens, for each n of ``widths``."""
        ...


class Transformers:
    """``model.generate`` with its defaults: sdpa, a DynamicCache, optionally prompt lookup."""

    def __init__(self, model: str, model_kwargs: dict[str, Any], lookup: int | None = None) -> None:
        """Load the weights; ``lookup`` is ``prompt_lookup_num_tokens``."""
        loaded = load_model(model, model_kwargs)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.options = {"prompt_lookup_num_tokens": lookup} if lookup else {}

    def answer(self, example: Example, max_tokens: int) -> Answer:
        """Decode with ``generate``."""
        clock = StreamClock()
        prompt = torch.tensor([example.ids], device=self.model.device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=clock,
                **self.options,
            )
        end = time.perf_counter()
        ids = out[0, len(example.ids) :].tolist()
        steps = clock.calls - 1
        return Answer(ids, len(example.ids), 0, steps, clock.first - start, end - start)

    @torch.inference_mode()
    def step_ms(self, prefix: int, widths: Sequence[int]) -> dict[int, float]:
        """Time forwards over a DynamicCache that is cut back after each."""
        cache = DynamicCache(config=self.model.config)
        device = self.model.device
        self.model(
            torch.full((1, prefix), FILLER, device=device), past_key_values=cache, logits_to_keep=1
        )

        def step(n: int) -> None:
            self.model(torch.full((1, n), FILLER, device=device), past_key_values=cache)
            cache.crop(-n)

        return {n: _timed(lambda n=n: step(n)) for n in widths}  # type: ignore[misc]


class Ours:
    """:class:`rasd_integrations.RASD` on the same messages."""

    def __init__(self, model: str, model_kwargs: dict[str, Any], drafter: str | None) -> None:
        """Load the weights; ``drafter`` as in the public face, ``None`` is plain decoding."""
        self.rasd = RASD.load(model, drafter=drafter, model_kwargs=model_kwargs)
        self.target = shared_model(
            model, model_kwargs
        ).target  # the same weights, not a second load

    def answer(self, example: Example, max_tokens: int) -> Answer:
        """Decode with ``stream``."""
        ids: list[int] = []
        first = 0.0
        stats = None
        start = time.perf_counter()
        for piece in self.rasd.stream(example.messages, SamplingParams(max_tokens=max_tokens)):
            if piece.token_ids and not first:
                first = time.perf_counter()
            ids += piece.token_ids
            stats = piece.stats or stats
        end = time.perf_counter()
        if stats is None or stats.prompt_tokens != len(example.ids):
            msg = (
                f"Our prompt has {stats and stats.prompt_tokens} tokens, theirs {len(example.ids)}."
            )
            raise RuntimeError(msg)
        return Answer(
            ids,
            stats.prompt_tokens,
            stats.cached_prompt_tokens,
            stats.target_steps,
            first - start,
            end - start,
            stats.as_dict(),
        )

    def step_ms(self, prefix: int, widths: Sequence[int]) -> dict[int, float]:
        """Time steps over a buffer that no step is committed to."""
        target = self.target
        buffer = KVBuffer(prefix + max(widths))
        for _ in target.prefill([FILLER] * prefix, buffer):
            pass
        return {n: _timed(lambda n=n: target.step([FILLER] * n, buffer)) for n in widths}  # type: ignore[misc]


ENGINES: dict[str, Callable[[str, dict[str, Any]], Engine]] = {
    "transformers": Transformers,
    "prompt_lookup": lambda model, kwargs: Transformers(model, kwargs, lookup=10),
    "plain": lambda model, kwargs: Ours(model, kwargs, None),
    "rasd": lambda model, kwargs: Ours(model, kwargs, "auto"),
}
BASELINE = "transformers"


def _timed(step: Callable[[], object]) -> float:
    times = []
    for _ in range(STEP_REPEATS + 2):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return median(times[2:]) or 0.0
