"""Drafts of the target's first layers: the target's ids, its rows untouched, nothing prefilled."""

from __future__ import annotations

import pytest
import torch
from drafting import decode, filled, random_ids
from tiny import tiny_llama
from torch import nn

from rasd_integrations.drafters.papers.early_exit import EarlyExitDrafter, shallow
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import DraftContext

PROMPT = random_ids(60, seed=1)


def deep_llama(seed: int = 0) -> TargetModel:
    return TargetModel(tiny_llama(seed, num_hidden_layers=4))


@pytest.mark.parametrize("n", [4, None])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_prompts_are_drafted_from(length, n):
    """Fault 33: of a prompt of one token the target has read nothing when the first draft is asked for."""
    target, stats, drafter = deep_llama(), DecodingStats(), EarlyExitDrafter(1, confidence=0.0)
    ids = PROMPT[:length]
    plain = decode(target, ids=ids)
    drafted = decode(target, drafter, n=n, ids=ids, stats=stats)
    assert plain == drafted
    assert stats.faults == ()
    assert n is None or stats.drafted > 0  # the schedule may choose to leave it out


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_draft_is_the_first_layers_own_answer(layers):
    """Over the target's rows the first layers say what they say over their own prefill."""
    target = deep_llama()
    stock = tiny_llama(num_hidden_layers=4)
    stock.model.layers = stock.model.layers[:layers]
    stock.config.num_hidden_layers = layers
    expected = list(PROMPT)
    for _ in range(6):
        expected.append(int(stock(torch.tensor([expected])).logits[0, -1].argmax()))
    session = EarlyExitDrafter(layers, confidence=0.0).start(DraftContext(prompt_ids=PROMPT))
    live = filled(target, PROMPT[:-1])
    session.attach(target, live)
    draft = session.propose(6)
    assert list(draft.token_ids) == expected[60:]
    assert draft.node_probs is not None
    assert list(draft.node_probs) == sorted(draft.node_probs, reverse=True)
    assert live.length == 59


def test_layers_that_add_nothing_are_drafted_for_whole():
    """Where the later layers pass the state on, every draft of the first ones is accepted."""
    target, stats = deep_llama(), DecodingStats()
    target.eos_ids = frozenset()
    for layer in target.model.model.layers[2:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    target.model.generation_config.eos_token_id = None
    target.model.config.eos_token_id = None
    decode(target, EarlyExitDrafter(2, confidence=0.0), n=7, ids=PROMPT, stats=stats)
    assert stats.acceptance_rate == 1.0
    assert stats.target_steps == 4


def test_weights_are_shared_and_the_target_stays_whole():
    """The first layers have the target's own weights; the target keeps all of them, and one model serves all."""
    target, drafter = deep_llama(), EarlyExitDrafter(2)
    short = drafter.first_layers(target)
    assert short is drafter.first_layers(target)
    assert len(short.model.model.layers) == short.model.config.num_hidden_layers == 2
    mine, theirs = (m.model.model.layers[1].parameters() for m in (short, target))
    assert list(map(id, mine)) == list(map(id, theirs))
    assert short.model.lm_head.weight is target.model.lm_head.weight
    assert len(target.model.model.layers) == target.model.config.num_hidden_layers == 4
    assert short.model.model._forward_hooks is not target.model.model._forward_hooks
    assert drafter.first_layers(deep_llama(3)) is not short


def test_the_models_go_with_their_target():
    """A drafter does not keep a target alive."""
    drafter = EarlyExitDrafter(1)
    drafter.first_layers(deep_llama())
    assert len(drafter._models) == 0


def test_too_few_layers_or_none_to_be_found_are_refused():
    """The error names the number, or the module without a list."""
    with pytest.raises(ConfigurationError, match="layers is 4, but the target has 4"):
        shallow(tiny_llama(num_hidden_layers=4), 4)
    model = tiny_llama()
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ConfigurationError, match="does not keep its 2 layers in one list"):
        shallow(model, 1)


def test_a_target_too_shallow_costs_speed_only():
    """What is seen at the start of an answer is reported, and the answer is whole."""
    target, stats = TargetModel(tiny_llama()), DecodingStats()
    drafted = decode(target, EarlyExitDrafter(7), ids=PROMPT, stats=stats)
    assert drafted == decode(target, ids=PROMPT)
    assert stats.off_reason is not None
    assert "layers is 7, but the target has 2" in stats.off_reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers is 0, but must be at least 1"),
        ({"layers": 2, "confidence": -0.1}, "confidence is -0.1, but must be in 0..1"),
    ],
)
def test_bad_options_are_refused(options, message):
    """The error names the option, its value and the limit."""
    with pytest.raises(ConfigurationError, match=message):
        EarlyExitDrafter(**options)
