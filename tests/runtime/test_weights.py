"""Kept keys and values against weights that change: no answer from old rows, and what clears them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from torch import nn

from rasd_integrations import RASD, SamplingParams, langchain, llama_index
from rasd_integrations.errors import DecodingError
from rasd_integrations.loading.identity import model_identity, weights_state
from rasd_integrations.runtime.models import wrapped_model

PROMPT = "the quick brown fox jumps over the lazy dog and runs"
ASK = [{"role": "user", "content": f"{PROMPT} far away"}]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


class Adapted(nn.Module):
    """A layer of peft's kind: what it adds is switched without a change of any weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.delta = nn.Parameter(0.3 * torch.randn_like(base.weight), requires_grad=False)
        self.merged_adapters: list[str] = []
        self.scaling = {"a": 1.0}
        self._active_adapter: list[str] = []
        self._disable_adapters = False

    def forward(self, x):
        out = self.base_layer(x)
        if self._active_adapter and not self._disable_adapters and not self.merged_adapters:
            out = out + self.scaling["a"] * nn.functional.linear(x, self.delta)
        return out

    def merge(self) -> None:
        """As peft does: past torch's counter of changes."""
        self.base_layer.weight.data += self.delta
        self.merged_adapters.append("a")


def adapted(model) -> Adapted:
    attention = model.model.layers[0].self_attn
    if not isinstance(attention.v_proj, Adapted):
        torch.manual_seed(0)
        attention.v_proj = Adapted(attention.v_proj)
    return attention.v_proj


def train(model) -> None:
    model.requires_grad_(requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.arange(32)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.requires_grad_(requires_grad=False)


def replace(model) -> None:
    layer = model.model.layers[0].self_attn.v_proj
    layer.weight = nn.Parameter(layer.weight.roll(1, dims=0), requires_grad=False)


def through_data(model) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(-1)


def in_inference_mode(model) -> None:
    with torch.inference_mode():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)


def load_other(model) -> None:
    model.load_state_dict(tiny_llama(seed=5).state_dict())


def switch_on(model) -> None:
    adapted(model)._active_adapter = ["a"]


def scale(model) -> None:
    adapted(model)._active_adapter = ["a"]
    adapted(model).scaling["a"] = -2.0


def merge(model) -> None:
    adapted(model).merge()


CHANGES = [
    train, through_data, in_inference_mode, load_other, switch_on, scale, merge,
]  # fmt: skip


def cold(model, tokenizer) -> str:
    """Return the answer of an instance that keeps nothing."""
    options = {"drafter": None, "executor": "eager", "prefix_cache_bytes": 0}
    return RASD.from_model(model, tokenizer, **options).generate(ASK, PARAMS).text


@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_never_comes_from_rows_of_other_weights(change, tmp_path):
    """Fault 24: after any change, the same and a new instance prefill again, in memory and on disk."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    if change in (switch_on, scale, merge):
        adapted(model)
    options = {"drafter": None, "executor": "eager", "cache_dir": tmp_path}
    rasd = RASD.from_model(model, tokenizer, **options)
    rasd.warm([PROMPT])
    before = rasd.generate(ASK, PARAMS)
    assert before.stats.cached_prompt_tokens > 16
    change(model)
    expected = cold(model, tokenizer)
    assert expected != before.text  # else nothing is shown
    after = rasd.generate(ASK, PARAMS)
    assert (after.text, after.stats.cached_prompt_tokens) == (expected, 0)
    again = RASD.from_model(model, tokenizer, **options).generate(ASK, PARAMS)
    assert (again.text, again.stats.cached_prompt_tokens > 16) == (expected, True)
    assert rasd.identity["weights"] == model_identity(model).weights


def test_a_drafter_model_that_was_trained_is_read_anew():
    """Fault 24: the drafter's own rows, too, are of its weights now."""
    target, drafter = tiny_llama(), tiny_llama(seed=1)
    rasd = RASD.from_model(target, tiny_tokenizer(), drafter, executor="eager")
    expected = rasd.generate(ASK, PARAMS).text
    cache = rasd._engine.decoder().drafter
    assert cache is not None
    (kept,) = rasd._engine._drafter_model._caches
    assert len(kept) == 1
    train(drafter)
    assert rasd.generate(ASK, PARAMS).text == expected
    assert len(kept) == 1
    assert kept._entries[0].state == weights_state(drafter)


def test_a_change_in_mid_answer_keeps_nothing():
    """Rows of two states of the weights are given back as those of the first, which nobody finds."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    rasd = RASD.from_model(model, tokenizer, drafter=None, executor="eager")
    stream = rasd.stream(ASK, PARAMS)
    next(stream)
    through_data(model)
    list(stream)
    found = rasd.generate(ASK, PARAMS)
    assert (found.text, found.stats.cached_prompt_tokens) == (cold(model, tokenizer), 0)


def test_weights_put_in_others_place_are_refused():
    """Fault 24: steps hold on to the parameters they were made with; a new instance takes the new ones."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    rasd = RASD.from_model(model, tokenizer, drafter=None, executor="eager")
    before = rasd.generate(ASK, PARAMS).text
    replace(model)
    with pytest.raises(DecodingError, match="Make a new instance"):
        rasd.generate(ASK, PARAMS)
    assert cold(model, tokenizer) != before


@pytest.mark.slow
def test_compiled_steps_of_changed_weights_are_refused(tmp_path):
    """Fault 24: a graph has a copy of the weights: an error of ours, not an answer of the old ones."""
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    model = tiny_llama().bfloat16()
    rasd = RASD.from_model(model, tiny_tokenizer(), drafter=None, executor="openvino")
    rasd.generate(ASK, PARAMS)
    through_data(model)
    with pytest.raises(DecodingError, match="Make a new instance"):
        rasd.generate(ASK, PARAMS)


def test_inference_tensors_are_looked_at():
    """They have no counter of changes; their values are compared."""
    with torch.inference_mode():
        model = tiny_llama()
    before = weights_state(model)
    assert weights_state(model) == before
    in_inference_mode(model)
    assert weights_state(model) != before


def test_the_look_at_the_weights_costs_little():
    """A model of 200 weights is looked at in well under the time of one step."""
    model = tiny_llama(num_hidden_layers=20)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        weights_state(model)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.02


KINDS = {
    "core": RASD,
    "chat": langchain.ChatRASD,
    "llm": langchain.RASDLLM,
    "llama_index": llama_index.RASDLLM,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_clear_cache_forgets_what_is_kept(kind, tmp_path):
    """Fault 24: all classes forget rows in memory, before they are loaded, while they are and when closed."""
    model = tiny_llama()
    llm = kind.from_model(model, tiny_tokenizer(), executor="eager", cache_dir=tmp_path)
    rasd = llm if isinstance(llm, RASD) else llm._rasd
    llm.clear_cache()
    rasd.warm([PROMPT])
    caches = list(wrapped_model(model, rasd._engine._shared.tokenizer, "", "eager")._caches)
    assert sum(map(len, caches)) > 0
    stream = rasd.stream(ASK, PARAMS)
    next(stream)
    llm.clear_cache()
    assert sum(map(len, caches)) == 0
    list(stream)  # goes on; what it held is not kept
    assert sum(map(len, caches)) == 0
    assert list(Path(tmp_path).glob("prefixes/*/*.rasd-prefix"))  # files stay
    llm.close()
    llm.clear_cache()
