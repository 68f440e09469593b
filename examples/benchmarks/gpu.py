"""Steps of an 8B-shaped model on a GPU: first whether they are right, then what they cost.

Needs torch, transformers and this package's engine alone; the weights are random, so nothing is
downloaded. Correctness comes first and stops the run: attention, trees and the append-only cache in
bfloat16 against float32, judged by the error that transformers' own bfloat16 makes. Then plain and
verify steps of 1 to 64 tokens over 8K, 32K and 128K cached ones, against transformers' sdpa and against
the time that reading weights and KV once takes at the bandwidth measured here.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from rasd_integrations.engine.kv import KVBuffer
from rasd_integrations.engine.target import TargetModel

TREE = (-1, 0, 0, 2, 1, -1, 5, 5)  # parents of eight drafted tokens
PATH = (0, 1, 3, 4)  # rows of the last token and of the nodes 0, 2 and 3
TOLERANCE = 3.0  # times the error of transformers in the same dtype
FLOOR_ERROR = 1e-5  # float32 kernels differ by rounding alone


@dataclass(frozen=True, slots=True)
class Setting:
    """How large everything is."""

    device: str
    dtype: torch.dtype
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    prefixes: tuple[int, ...]
    widths: tuple[int, ...]
    repeats: int

    def config(self, layers: int, window: int) -> LlamaConfig:
        """Return a Llama configuration of this shape."""
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.mlp,
            vocab_size=self.vocab,
            max_position_embeddings=window,
            tie_word_embeddings=False,
        )


def setting(*, tiny: bool) -> Setting:
    """Return the shape of Llama-3.1-8B on the GPU, or a toy on the CPU."""
    if tiny:
        return Setting(
            "cpu", torch.float32, 2, 64, 4, 2, 128, 256, (64, 128), (1, 4), 2
        )  # fmt: skip
    return Setting(
        "cuda", torch.bfloat16, 32, 4096, 32, 8, 14336, 128256,
        (8192, 32768, 131072), (1, 2, 4, 8, 16, 32, 64), 10,
    )  # fmt: skip


def build(size: Setting, layers: int, dtype: torch.dtype, window: int) -> LlamaForCausalLM:
    """Return a model with seeded random weights, made on its device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(size.device):
            model = LlamaForCausalLM(size.config(layers, window))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


# --- correctness ---------------------------------------------------------------------------------


PROMPTS = (
    16,
    599,
)  # a short one, where a wrong mask shows at once, and one of several prefill pieces


def correctness(size: Setting) -> dict[str, dict[str, float]]:
    """Compare our steps with float32, in float32 and in the wanted dtype, two layers of the full width.

    Returns:
        For each case our largest logit error, the error of transformers' sdpa in the same dtype, and
        the spread of the logits.
    """
    report: dict[str, dict[str, float]] = {}
    for dtype in dict.fromkeys((torch.float32, size.dtype)):
        theirs = build(size, 2, dtype, 2048)
        ours = TargetModel(build(size, 2, dtype, 2048))
        exact = build(size, 2, torch.float32, 2048)
        exact.load_state_dict(theirs.state_dict())  # the same rounded weights, exact arithmetic
        for length in PROMPTS:
            cases = _cases(size, ours, theirs, exact, length)
            name = f"{str(dtype).removeprefix('torch.')}, {length} cached"
            report |= {f"{name}, {case}": figures for case, figures in cases.items()}
    return report


@torch.inference_mode()
def _cases(
    size: Setting,
    ours: TargetModel,
    theirs: LlamaForCausalLM,
    exact: LlamaForCausalLM,
    length: int,
) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(1)
    count = length + 1 + len(TREE)
    ids = torch.randint(0, size.vocab, (count,), generator=generator).tolist()
    prompt, last, draft = ids[:length], ids[length], ids[length + 1 :]

    def logits(model: LlamaForCausalLM, tokens: Sequence[int], rows: int) -> Tensor:
        batch = torch.tensor([list(tokens)], device=size.device)
        return model(batch).logits[0, -rows:].float().cpu()

    def filled() -> KVBuffer:
        buffer = KVBuffer(1024)
        for _ in ours.prefill(prompt, buffer):
            pass
        return buffer

    report: dict[str, dict[str, float]] = {}

    def judge(name: str, got: Tensor, path: Sequence[int], rows: int) -> None:
        want = logits(exact, [*prompt, *path], rows)
        error = (got.float().cpu() - want).abs().max().item()
        peer = (logits(theirs, [*prompt, *path], rows) - want).abs().max().item()
        before = report.get(name, {"ours": 0.0, "transformers": 0.0})
        report[name] = {
            "ours": max(error, before["ours"]),
            "transformers": max(peer, before["transformers"]),
            "logit_std": want.std().item(),
        }

    buffer = filled()
    judge("plain step", ours.step([last], buffer), [last], 1)
    judge("chain", ours.step([last, *draft], buffer), [last, *draft], 1 + len(draft))

    tree = ours.step([last, *draft], buffer, TREE)
    for node in range(len(TREE)):
        judge("tree", tree[node + 1 : node + 2], [last, *_path_to(node, draft)], 1)

    buffer.commit(PATH)
    kept = [last, *(draft[row - 1] for row in PATH[1:])]
    judge("committed path", ours.step([draft[-1]], buffer), [*kept, draft[-1]], 1)

    buffer = filled()
    ours.step([last, *draft], buffer, TREE)  # and nothing is committed
    judge("dropped tree", ours.step([last], buffer), [last], 1)

    piece = draft * 16  # 128 tokens: the kernels of a prefill
    judge("wide chain", ours.step([last, *piece], filled()), [last, *piece], 1 + len(piece))
    return report


def _path_to(node: int, draft: Sequence[int]) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, draft[node])
        node = TREE[node]
    return path


def faults(report: dict[str, dict[str, float]]) -> list[str]:
    """Return the cases whose error is more than rounding explains."""
    return [
        f"{name}: error {case['ours']:.4g}, transformers has {case['transformers']:.4g}"
        for name, case in report.items()
        if not case["ours"]
        <= TOLERANCE * case["transformers"] + FLOOR_ERROR * max(case["logit_std"], 1)
    ]


# --- cost ----------------------------------------------------------------------------------------


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
        ours = _our_steps(size, model, prefix)
        out["prefixes"][prefix] = {"floor_ms": floor, "ours_ms": ours, "transformers_ms": theirs}
        say(f"{prefix} cached: floor {floor:.2f} ms")
        for n in size.widths:
            say(f"  {n:>3} tokens: ours {ours[n]:8.2f} ms, transformers {theirs[n]:8.2f} ms")
    prompt = torch.randint(0, size.vocab, (size.prefixes[0],)).tolist()
    out["prefill"] = {"tokens": len(prompt), **_prefills(size, model, prompt)}
    return out


def _random_kv(size: Setting, prefix: int) -> Tensor:
    shape = (size.kv_heads, prefix, size.hidden // size.heads)
    return torch.randn(shape, device=size.device, dtype=size.dtype)


def _our_steps(size: Setting, model: LlamaForCausalLM, prefix: int) -> dict[int, float]:
    target = TargetModel(model)
    buffer = KVBuffer(prefix + max(size.widths))
    for layer in range(size.layers):
        buffer.write(layer, _random_kv(size, prefix), _random_kv(size, prefix))
    buffer.commit(range(prefix))
    return {n: timed(size, lambda n=n: target.step([7] * n, buffer)) for n in size.widths}  # type: ignore[misc]


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
    once = Setting(**{f: getattr(size, f) for f in Setting.__slots__} | {"repeats": 2})
    model.set_attn_implementation("sdpa")
    batch = torch.tensor([prompt], device=size.device)
    theirs = timed(
        once,
        lambda: model(batch, past_key_values=DynamicCache(config=model.config), logits_to_keep=1),
    )
    target = TargetModel(model)
    ours = timed(once, lambda: list(target.prefill(prompt, KVBuffer(len(prompt)))))
    return {"ours_ms": ours, "transformers_ms": theirs}


def say(line: str) -> None:
    """Report progress without touching standard output's last line."""
    print(line, file=sys.stderr, flush=True)


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
        say(f"{name:<36} error {case['ours']:.4g} (transformers {case['transformers']:.4g})")
    wrong = faults(report)
    if wrong:
        sys.exit("Wrong results: " + "; ".join(wrong))
    document = {
        "device": torch.cuda.get_device_name(0) if size.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "correctness": report,
        **costs(size),
        "seconds": time.perf_counter() - start,
    }
    line = json.dumps(document)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
