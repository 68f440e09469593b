"""A family is right or refused at load: what is compared, what is said, and what it leaves behind."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
import transformers
from families import WINDOW, answered, generated, tiny, variants
from tiny import FAMILIES, tiny_llama
from transformers import CONFIG_MAPPING, Phi3ForCausalLM

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.decoding.steps import FixedSteps
from rasd_integrations.drafters.base import Drafter, DraftSession
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.executors import agreement
from rasd_integrations.engine.executors.eager import EagerExecutor
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft


def family(model_type, variant="default"):
    return tiny(dict(variants(model_type))[variant])


def text(n, seed=0):
    return torch.randint(2, 60, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


REFUSED = [
    # Fault 20: accepted once, and wrong.
    ("doge", "default", "off those of its own forward"),
    ("phimoe", "window", "off those of its own forward"),
    ("diffllama", "default", "off those of its own forward"),
    ("opt", "default", "cannot run speculative steps"),
    ("bert", "default", "cannot run speculative steps"),
    # Fault 21: another library's error once.
    ("minimax", "default", "linear_attention.* keep a state that steps cannot go on from"),
    ("zamba2", "default", "keep a state that steps cannot go on from"),
    ("bloom", "default", "cannot run speculative steps"),
    ("openai-gpt", "default", "cannot run speculative steps"),
]


@pytest.mark.parametrize(("model_type", "variant", "said"), REFUSED)
def test_what_steps_would_get_wrong_is_refused_by_name(model_type, variant, said):
    """Faults 20 and 21: the error names the family and why, and is ours."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        TargetModel(family(model_type, variant))
    assert f"model_type '{model_type}'" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt_oss", "granite_swa", "granitemoe_swa", "flint"])
def test_attention_sinks(model_type):
    """Fault 21: their weight is in the softmax's denominator, in a prefill, beyond windows, and in steps."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = family(model_type)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.normal_(1.0, 2.0, generator=torch.Generator().manual_seed(1))
    decoder = SpeculativeDecoder(TargetModel(model))
    for ids in (text(7), text(100)):
        assert answered(decoder, ids, 12) == generated(model, ids, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_right_families_are_taken_in_every_dtype(name, dtype):
    """Rounding alone is no reason to refuse."""
    EagerExecutor(FAMILIES[name]().to(dtype))


def test_a_verdict_is_found_once_for_a_class_and_config(monkeypatch):
    """The second model of a config costs one short text."""
    made = []

    def counted(model):
        made.append(model)
        return small_model(model)

    small_model = agreement.small_model
    monkeypatch.setattr(agreement, "small_model", counted)
    monkeypatch.setattr(agreement, "_verdicts", {})
    for seed in (0, 1):
        EagerExecutor(tiny_llama(seed))
    assert len(made) == 1


def test_a_config_that_cannot_be_made_small_is_compared_as_it_is(monkeypatch):
    """Where its class refuses other numbers, the model itself reads over its window, or is refused."""

    def refused(_):
        msg = "hidden_size must be 48"
        raise ValueError(msg)

    lengths = []
    difference = agreement._difference

    def noted(model, executor, length, **kwargs):
        lengths.append(length)
        return difference(model, executor, length, **kwargs)

    monkeypatch.setattr(agreement, "small_model", refused)
    monkeypatch.setattr(agreement, "_difference", noted)
    monkeypatch.setattr(agreement, "_verdicts", {})
    EagerExecutor(FAMILIES["mistral"]())
    assert max(lengths) > 24
    monkeypatch.setattr(agreement, "_LONGEST", 24)
    monkeypatch.setattr(agreement, "_verdicts", {})
    with pytest.raises(ConfigurationError, match=r"border at 24 tokens.*hidden_size must be 48"):
        EagerExecutor(FAMILIES["mistral"]())


def test_an_object_that_somebody_changed_is_compared_itself():
    """The verdict of the config does not speak for a forward that was replaced."""
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    stock = attention.forward

    def twice(*args, **kwargs):
        out, weights = stock(*args, **kwargs)
        return (out if "rasd_step" in kwargs else 2 * out), weights

    attention.forward = twice
    with pytest.raises(ConfigurationError, match="model_type 'llama'"):
        EagerExecutor(model)


def test_logits_a_hundredth_off_are_refused(monkeypatch):
    """In float32 the limit is a thousandth of their spread."""
    step = EagerExecutor.step

    def off(executor, *args, **kwargs):
        out = step(executor, *args, **kwargs)
        return replace(out, logits=1.01 * out.logits)

    monkeypatch.setattr(EagerExecutor, "step", off)
    with pytest.raises(ConfigurationError, match=r"0\.01 of their spread"):
        EagerExecutor(tiny_llama())


def test_the_comparison_draws_no_random_numbers_of_the_users():
    """A load changes no seed."""
    agreement._verdicts.clear()
    model = tiny_llama()
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    EagerExecutor(model)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_longrope_on_both_sides_of_its_border(model_type):
    """Fault 20: below and above it an answer is that of ``generate``, in pieces, and again from the prefix cache."""
    model = family(model_type, "longrope")
    target = TargetModel(model)
    target._pieces = (10, 10)
    decoder = SpeculativeDecoder(target, prefix_cache=PrefixCache(1 << 24))
    ids = text(70)
    for _ in range(2):
        for length, n in ((12, 12), (WINDOW, 1), (WINDOW + 1, 12), (70, 12), (20, 5)):
            assert answered(decoder, ids[:length], n) == generated(model, ids[:length], n), length


def long_answer(model, ids, n):
    """The greedy answer of the whole text's own forward for each token."""
    ids = list(ids)
    for _ in range(n):
        ids.append(
            int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
    return ids[-n:]


class Continuation(DraftSession):
    """Knows the answer; its tokens are right but for one in five."""

    def __init__(self, answer, wrong):
        self.answer, self.wrong, self.done = answer, wrong, 0

    def propose(self, budget):
        tokens = self.answer[self.done : self.done + budget]
        return Draft(
            tuple((t + self.wrong * (i % 5 == 3)) % 60 for i, t in enumerate(tokens)),
            source="known",
        )

    def observe(self, block):
        self.done += len(block.token_ids)


class Known(Drafter):
    """Starts sessions that know the answer."""

    name = "known"

    def __init__(self, answer, wrong):
        self.answer, self.wrong, self.starts = answer, wrong, 0

    def start(self, context):
        self.starts += 1
        return Continuation(self.answer, self.wrong)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [3, WINDOW])
@pytest.mark.parametrize("model_type", ["phi3", "llama"])
@torch.inference_mode()
def test_an_answer_across_the_border_is_that_of_the_whole_text(model_type, prompt):
    """Fault 20: beyond it all keys are made again, whatever is drafted; ``generate`` of Phi-3 does the same."""
    model, ids, n = family(model_type, "longrope"), text(prompt), 40
    wanted = long_answer(model, ids, n)
    # transformers 5.17 drops the cache at the border and then reads the last token alone.
    reads_again = "next_sequence_length" in inspect.getsource(Phi3ForCausalLM)
    if model_type == "phi3" and reads_again:
        assert wanted == generated(model, ids, n)
    target, cache = TargetModel(model), PrefixCache(1 << 24)
    params = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)
    suffix = SuffixDrafter()
    for drafter in (
        None,
        Known(wanted, 0),
        Known(wanted, 1),
        suffix,
        ModelDrafter(target),
    ):
        for length in (None, 1, 7):
            config = SpeculationConfig(num_draft_tokens=length)
            decoder = SpeculativeDecoder(target, drafter, config=config, prefix_cache=cache)
            stats = DecodingStats()
            blocks = list(decoder.generate(ids, params, stats=stats))
            assert [t for block in blocks for t in block.token_ids] == wanted, (drafter, length)
            assert not stats.faults
    # A prompt that goes on from there is read with long factors, and finds the new keys.
    stats = DecodingStats()
    whole = [*ids, *wanted]
    more = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    blocks = list(SpeculativeDecoder(target, prefix_cache=cache).generate(whole, more, stats=stats))
    assert [t for block in blocks for t in block.token_ids] == long_answer(model, whole, 8)
    assert stats.cached_prompt_tokens >= len(whole) - 2


def test_fixed_steps_that_would_run_over_the_border_are_refused():
    """Fault 20: padding past the border would change the angles of the tokens before it."""
    with pytest.raises(ConfigurationError, match=r"24 is no multiple of the 128 tokens"):
        FixedSteps(TargetModel(family("phi3", "longrope")))
