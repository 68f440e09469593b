"""Graphs read weights where they lie: codes of 4 and 8 bits, and dense ones without copies."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from steps import close, prefilled, random_ids
from tiny import tiny_llama
from torch import nn

from rasd_integrations.engine.target import TargetModel
from rasd_integrations.loading.quantised import Coding, QuantisedLinear, QuantisedWeight, packed

pytest.importorskip("openvino")

from rasd_integrations.engine.executors.openvino import executor
from rasd_integrations.engine.executors.openvino.executor import CompiledExecutor


@pytest.mark.parametrize(
    ("kind", "group"), [("i4", 32), ("u4", 16), ("u4", 32), ("i8", 16), ("i8", 192), ("u8", 32)]
)
def test_a_graph_of_codes_says_what_eager_steps_say(kind, group, tmp_path):
    """Groups with a scale of 0 included; the executor compares its logits with eager ones, within 1e-3."""
    model = tiny_llama(head_dim=32, hidden_size=192, intermediate_size=192)
    draw = torch.Generator().manual_seed(0)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                weight = coded(child.weight, kind, group, draw)
                setattr(parent, name, QuantisedLinear(weight))
    ours = TargetModel(
        model, executor=CompiledExecutor(model, cache_dir=tmp_path, identity="codes")
    )
    eager = TargetModel(model)
    ids = random_ids(40)
    close(logits(ours, ids), logits(eager, ids), off=1e-4)
    (kept,) = (tmp_path / "graphs").iterdir()
    assert sum(file.stat().st_size for file in kept.iterdir()) < 1_000_000  # no weights in it
    again = TargetModel(
        model, executor=CompiledExecutor(model, cache_dir=tmp_path, identity="codes")
    )
    assert torch.equal(logits(ours, ids), logits(again, ids))


def logits(target, ids):
    """Return the logits of five tokens behind ``ids``."""
    return target.step(ids[:5], prefilled(target, ids, len(ids) + 8))


def coded(weight, kind, group, draw):
    """Return codes near ``weight``, with one group of which all numbers are the same."""
    most = 15 if kind.endswith("4") else 255
    grouped = weight.detach().reshape(len(weight), -1, group)
    low, high = grouped.amin(2), grouped.amax(2)
    is_signed = kind.startswith("i")
    scales = (grouped.abs().amax(2) / (most // 2)) if is_signed else (high - low) / most
    minimums = None if is_signed else -low
    scales[0, 0] = 0
    shifted = grouped if is_signed else grouped - low[..., None]
    codes = (shifted / scales.where(scales != 0, 1)[..., None]).round()
    codes[0, 0] = torch.randint(0, most // 2, (group,), generator=draw).float()
    whole = codes.clamp(-(most // 2) - 1 if is_signed else 0, most // 2 if is_signed else most)
    plain = whole.to(torch.int8 if is_signed else torch.uint8).reshape(weight.shape)
    coding = Coding(kind, group, has_minimum=not is_signed)
    return QuantisedWeight(coding, packed(plain, kind), scales, minimums)


def test_large_weights_are_not_copied_for_further_widths(monkeypatch, tmp_path):
    """A graph of copies keeps each of its weights once more."""
    model = tiny_llama(head_dim=16)
    made = CompiledExecutor(model, cache_dir=tmp_path)
    if "own" not in made.name:
        pytest.skip("no C++ compiler")
    assert made._attention.widths == (1,)
    monkeypatch.setattr(executor, "_COPIED", 1000)
    assert CompiledExecutor(model, cache_dir=tmp_path)._attention.widths == ()


def test_a_graph_outlives_the_memory_that_its_model_gives_up(tmp_path):
    """A model's owner moves its parameters; the graph goes on with the old ones, as it was compiled."""
    model = tiny_llama(head_dim=32, hidden_size=192, intermediate_size=192)
    target = TargetModel(model, executor=CompiledExecutor(model, cache_dir=tmp_path))
    ids = random_ids(20)
    before = logits(target, ids)
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)
    assert torch.equal(before, logits(target, ids))


ON_ONE_THREAD = """
import torch
torch.set_num_threads(1)
from tiny import tiny_tokenizer, VOCAB
from transformers import LlamaConfig, LlamaForCausalLM
from rasd_integrations import RASD, SamplingParams
torch.manual_seed(0)
config = LlamaConfig(vocab_size=VOCAB, hidden_size=256, intermediate_size=8192, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256)
model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
rasd = RASD.from_model(model, tiny_tokenizer(), executor="openvino")
print(len(rasd.generate("Once upon", SamplingParams(max_tokens=8, ignore_eos=True)).token_ids))
"""


@pytest.mark.slow
def test_one_thread_runs_a_wide_model():
    """A model of a width that OpenVINO's fused MLP takes runs on a single thread, where that one ends the process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_ONE_THREAD],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "8"), done.stderr
