"""The user's model object outside of our steps: as it was before, whoever calls it and whenever."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from tiny import FAMILIES, VOCAB, tiny_gpt2, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from rasd_integrations.config import SamplingParams
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.engine.executors.eager import EagerExecutor
from rasd_integrations.engine.executors.factory import has_openvino, make_executor
from rasd_integrations.engine.module_copy import shared_copy
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def gemma2():
    """Scores with a cap, which sdpa cannot do."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**_SMALL)).eval()


def gpt_oss():
    """Attention sinks."""
    torch.manual_seed(0)
    config = GptOssConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2)
    model = GptOssForCausalLM(config).eval().requires_grad_(requires_grad=False)
    for layer in model.model.layers:
        layer.self_attn.sinks.fill_(2.0)
    return model


def modules_and_flags(model):
    """Everything about the modules that a step could leave changed."""
    return [
        (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), *map(id, m._parameters.values()))
        for m in model.modules()
    ]  # fmt: skip


def answer(target, n=24, prompt=range(1, 30)):
    blocks = SpeculativeDecoder(target).generate(list(prompt), SamplingParams(max_tokens=n))
    return [token for block in blocks for token in block.token_ids]


def generated(model, n=24, prompt=range(1, 30)):
    options = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0}
    return model.generate(torch.tensor([list(prompt)]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("make", [gemma2, gpt_oss, tiny_llama, tiny_gpt2])
def test_a_model_is_the_users_again_after_a_step(make):
    """Fault 22: config, hooks, flags and ``generate`` are as before, whether the model is taken or refused."""
    model = make()
    config = copy.deepcopy(model.config.to_dict())
    attention = model.config._attn_implementation
    seen, wanted = modules_and_flags(model), generated(model)
    with contextlib.suppress(ConfigurationError):
        answer(TargetModel(model))
    assert attention == model.config._attn_implementation
    assert config == model.config.to_dict()
    assert seen == modules_and_flags(model)
    assert wanted == generated(model)


@pytest.mark.slow
def test_a_compiled_model_is_the_users_again():
    """Fault 22: tracing in float32 does not touch the weights of a bfloat16 model that somebody else uses."""
    if not has_openvino():
        pytest.skip("OpenVINO is not installed")
    model = tiny_llama().to(torch.bfloat16)
    seen, wanted = modules_and_flags(model), generated(model)
    dtypes = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            dtypes.update(weight.dtype for weight in model.parameters())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        make_executor("openvino", model)
    finally:
        done.set()
        thread.join()
    assert dtypes == {torch.bfloat16}
    assert seen == modules_and_flags(model)
    assert wanted == generated(model)


def test_the_users_own_calls_and_our_answers_do_not_meet():
    """Fault 23: ``model()`` in a thread, while answers run and early-exit copies are made of it."""
    model = tiny_llama()
    target = TargetModel(model)
    wanted = answer(target)
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        theirs = model(ids).logits
    done, wrong = threading.Event(), []

    def call() -> None:
        with torch.inference_mode():
            while not done.is_set():
                if not torch.equal(model(ids).logits, theirs):
                    wrong.append(1)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        answers = [answer(target) for _ in range(10)]
        copied = [answer(TargetModel(shared_copy(model))) for _ in range(3)]
    finally:
        done.set()
        thread.join()
    assert answers == [wanted] * 10
    assert copied == [wanted] * 3
    assert not wrong


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_dropout_never_reaches_an_answer(family):
    """Fault 26: a model in train mode answers as in eval mode, and stays in train mode."""
    model, trained = FAMILIES[family](), FAMILIES[family]()
    for module in trained.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trained.train()
    target = TargetModel(trained)
    wanted = answer(TargetModel(model))
    assert [answer(target) for _ in range(3)] == [wanted] * 3
    assert all(module.training for module in trained.modules())


def test_the_copy_has_the_same_weights_and_nothing_else_in_common():
    """Parameters are the same objects; modules, configs and computed buffers are not."""
    model = tiny_llama()
    new = shared_copy(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in new.parameters()]
    assert not {id(m) for m in model.modules()} & {id(m) for m in new.modules()}
    assert not {id(b) for b in model.buffers()} & {id(b) for b in new.buffers()}
    assert new.config is new.model.config is new.model.layers[0].self_attn.config
    assert new.config is not model.config


def test_weights_that_change_are_read():
    """An executor follows a training step: the weights are not copied."""
    model, other = tiny_llama(), tiny_llama(seed=1)
    executor = EagerExecutor(model)
    with torch.inference_mode():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    assert answer(TargetModel(other)) == answer(TargetModel(model, executor=executor))
    assert VOCAB == model.config.vocab_size


def test_a_forward_that_somebody_wrapped_is_wrapped_in_the_copy():
    """Bound methods and partials, as accelerate lays them, lead to the copied module."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    seen = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    model = tiny_llama()
    add_hook_to_module(model.model.layers[0].mlp, Hook())
    new = shared_copy(model)
    with torch.inference_mode():
        new(torch.arange(4)[None])
    assert seen == [new.model.layers[0].mlp]


def test_an_adapter_that_is_switched_is_switched_in_answers():
    """Layers of peft's kind keep what is on in an attribute, which a switch sets on the user's object."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self._disable_adapters = base, False

        def forward(self, x):
            out = self.base(x)
            return out if self._disable_adapters else out + 3 * x.flip(-1)

    model = tiny_llama()
    plain = answer(TargetModel(model))
    layer = model.model.layers[1].self_attn
    layer.o_proj = Adapted(layer.o_proj)
    target = TargetModel(model)
    adapted = answer(target)
    layer.o_proj._disable_adapters = True
    assert answer(target) == plain != adapted
    layer.o_proj._disable_adapters = False
    assert answer(target) == adapted
