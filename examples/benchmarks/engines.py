"""Ours, and transformers as its users run it. Greedy, same weights.

Each is built with a job (``run.py`` writes it) and has ``answer`` (one prompt to one :class:`Answer`), ``about``
and ``step_ms`` (one target forward of n tokens over a cached prefix).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import answers
import torch
import transformers
from answers import Answer, Recorder
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import rasd_integrations
from rasd_integrations import RASD, SamplingParams
from rasd_integrations.config import ExecutorName
from rasd_integrations.demo.measure import median
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.loading import load_model
from rasd_integrations.runtime.models import shared_model

STEP_REPEATS = 7
FILLER = 1000  # any ordinary token: a step costs the same whatever it reads
EARLY_EXIT = 2 / 3  # of the layers draft where no smaller model is named


class _InTorch:
    """What both have in common: threads, the peak of a GPU, versions."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self.dtype, self.ignore_eos = job["dtype"], job["ignore_eos"]
        self.kwargs = {"dtype": job["dtype"]}

    def peak_mib(self) -> float:
        """Return the GPU allocator's peak where there is one, else the process'."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
        return answers.peak_mib()

    def about(self) -> dict[str, Any]:
        """Return versions and formats."""
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rasd-integrations": rasd_integrations.__version__,
            "weights": self.dtype,
        }


class Transformers(_InTorch):
    """``model.generate`` with its defaults: sdpa, a DynamicCache; ``options`` choose how it drafts."""

    def __init__(self, job: dict[str, Any], *, assisted: bool = False, **options: Any) -> None:
        """Load the weights; ``assisted`` drafts with the job's assistant, else with the lower layers."""
        super().__init__(job)
        loaded = load_model(job["model"], self.kwargs)
        self.model, self.tokenizer, self.options = loaded.model, loaded.tokenizer, options
        self.drafts_with: str | None = None
        if assisted and job["assistant"]:
            self.options["assistant_model"] = load_model(job["assistant"], self.kwargs).model
            self.drafts_with = Path(job["assistant"]).name
        elif assisted:
            layers = self.model.config.get_text_config().num_hidden_layers
            self.options["assistant_early_exit"] = exit_at = max(1, int(EARLY_EXIT * layers))
            self.drafts_with = f"its own first {exit_at} of {layers} layers"
        if self.ignore_eos:
            self.model.generation_config.eos_token_id = None

    def answer(self, prompt: dict[str, Any], max_tokens: int) -> Answer:
        """Decode with ``generate``."""
        ids = torch.tensor([prompt["ids"]], device=self.model.device)
        streamer = _Streamer()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=streamer,
                **self.options,
            )
        recorder = streamer.recorder
        return recorder.answer(ids.shape[1], 0, len(recorder.arrivals))

    def about(self) -> dict[str, Any]:
        """Return versions and formats, and what an assisted run drafts with."""
        drafter = {"drafts_with": self.drafts_with} if self.drafts_with else {}
        return super().about() | drafter

    @torch.inference_mode()
    def step_ms(self, prefix: int, widths: Sequence[int]) -> dict[int, float]:
        """Time forwards over a DynamicCache that is cut back after each."""
        cache = DynamicCache(config=self.model.config)
        device = self.model.device
        filler = torch.full((1, prefix), FILLER % self.model.config.vocab_size, device=device)
        self.model(filler, past_key_values=cache, logits_to_keep=1)

        def step(n: int) -> None:
            self.model(filler[:, :n], past_key_values=cache)
            cache.crop(-n)

        return {n: _timed(lambda n=n: step(n)) for n in widths}  # type: ignore[misc]


class _Streamer(BaseStreamer):
    """Notes what ``generate`` hands over: the prompt first, then the tokens of each step."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.recorder.add(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


class Ours(_InTorch):
    """:class:`rasd_integrations.RASD` on the same messages."""

    def __init__(self, job: dict[str, Any], **options: Any) -> None:
        """Load the weights; ``options`` as in the public face."""
        super().__init__(job)
        self.rasd = RASD.load(job["model"], model_kwargs=self.kwargs, **options)
        self.executor: ExecutorName = options.get("executor", "auto")
        # The same weights, not a second load.
        self.target = shared_model(job["model"], self.kwargs, executor=self.executor).target

    def answer(self, prompt: dict[str, Any], max_tokens: int) -> Answer:
        """Decode with ``stream``."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=self.ignore_eos)
        stats = None
        recorder = Recorder()
        for piece in self.rasd.stream(prompt["messages"], params):
            recorder.add(piece.token_ids)
            stats = piece.stats or stats
        if stats is None or stats.prompt_tokens != len(prompt["ids"]):
            found = stats and stats.prompt_tokens
            msg = f"Our prompt has {found} tokens, theirs {len(prompt['ids'])}."
            raise RuntimeError(msg)
        cached = stats.cached_prompt_tokens
        return recorder.answer(stats.prompt_tokens, cached, stats.target_steps, stats.as_dict())

    def about(self) -> dict[str, Any]:
        """Return versions and formats, and what runs the steps."""
        runs: dict[str, Any] = {"executor": self.executor}
        if self.executor == "openvino-kv8":
            runs |= {"kv": "u8 by row", "kv_bits": 8}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            runs["openvino"] = importlib.metadata.version("openvino")
        return super().about() | runs

    def step_ms(self, prefix: int, widths: Sequence[int]) -> dict[int, float]:
        """Time steps over a buffer that no step is committed to."""
        target = self.target
        filler = [FILLER % target.vocab_size]
        buffer = KVBuffer(prefix + max(widths))
        for _ in target.prefill(filler * prefix, buffer):
            pass
        return {n: _timed(lambda n=n: target.step(filler * n, buffer)) for n in widths}  # type: ignore[misc]


def _timed(step: Callable[[], object]) -> float:
    times = []
    for _ in range(STEP_REPEATS + 2):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return median(times[2:]) or 0.0
