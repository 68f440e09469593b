"""Whether steps on a device are right: ours, eagerly and on graphs, against float32 and transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rasd_integrations.engine.executors.cuda_graphs.executor import GraphExecutor
from rasd_integrations.engine.kv.buffer import KVBuffer
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


PROMPTS = (
    16,
    599,
)  # a short one, where a wrong mask shows at once, and one of several prefill pieces


def correctness(size: Setting) -> dict[str, dict[str, float]]:
    """Compare our steps with float32, in float32 and in the wanted dtype, two layers of the full width.

    Returns:
        For each case our largest logit error, that on graphs, that of transformers' sdpa in the same
        dtype, and the spread of the logits.
    """
    report: dict[str, dict[str, float]] = {}
    for dtype in dict.fromkeys((torch.float32, size.dtype)):
        theirs = build(size, 2, dtype, 2048)
        ours, on_graphs = targets(build(size, 2, dtype, 2048))
        exact = build(size, 2, torch.float32, 2048)
        exact.load_state_dict(theirs.state_dict())  # the same rounded weights, exact arithmetic
        for length in PROMPTS:
            cases = _cases(size, ours, theirs, exact, length)
            graphs = _cases(size, on_graphs, theirs, exact, length)
            name = f"{str(dtype).removeprefix('torch.')}, {length} cached"
            for case, figures in cases.items():
                report[f"{name}, {case}"] = {**figures, "graphs": graphs[case]["ours"]}
    return report


def targets(model: PreTrainedModel) -> tuple[TargetModel, TargetModel]:
    """Return the model behind eager steps, and behind graphs."""
    executor = GraphExecutor(model)
    if executor.is_off:
        say("graphs are off: their rows are eager ones")
    return TargetModel(model), TargetModel(model, executor=executor)


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

    def step(tokens: list[int], buffer: KVBuffer, parents: Sequence[int] | None = None) -> Tensor:
        ours.step(tokens, buffer, parents)
        return ours.step(tokens, buffer, parents)  # a graph is recorded when a shape comes again

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
    judge("plain step", step([last], buffer), [last], 1)
    judge("chain", step([last, *draft], buffer), [last, *draft], 1 + len(draft))

    tree = step([last, *draft], buffer, TREE)
    for node in range(len(TREE)):
        judge("tree", tree[node + 1 : node + 2], [last, *_path_to(node, draft)], 1)

    buffer.commit(PATH)
    kept = [last, *(draft[row - 1] for row in PATH[1:])]
    judge("committed path", step([draft[-1]], buffer), [*kept, draft[-1]], 1)

    buffer = filled()
    step([last, *draft], buffer, TREE)  # and nothing is committed
    judge("dropped tree", step([last], buffer), [last], 1)

    piece = draft * 16  # 128 tokens: the kernels of a prefill
    judge("wide chain", step([last, *piece], filled()), [last, *piece], 1 + len(piece))
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
        f"{name}: {engine} errs by {case[engine]:.4g}, transformers by {case['transformers']:.4g}"
        for name, case in report.items()
        for engine in ("ours", "graphs")
        if not case[engine]
        <= TOLERANCE * case["transformers"] + FLOOR_ERROR * max(case["logit_std"], 1)
    ]


def say(line: str) -> None:
    """Report progress without touching standard output's last line."""
    print(line, file=sys.stderr, flush=True)
