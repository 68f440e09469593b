"""The losslessness matrix of drafters that read the target, and of their combinations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import fakes
import pytest
from fakes import ScriptedDrafter
from tiny import FAMILIES, VOCAB

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.base import Drafter
from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.fused import FusedDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.recycling import RecyclingDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.stats import DecodingStats

NUM_TOKENS = 32
PROMPT = [*range(40, 60), *range(45, 55), 7, 8, 45, 46]
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
    "sampled": SamplingParams(
        max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.9, top_p=0.95, top_k=40, seed=11
    ),
}


@cache
def target(family: str) -> TargetModel:
    return TargetModel(FAMILIES[family]())


@cache
def truth(family: str, sampling: str) -> tuple[int, ...]:
    return tuple(decode(family, None, sampling, None))


def decode(family, drafter, sampling, n, stats=None):
    config = SpeculationConfig(num_draft_tokens=n, max_draft_tokens=16)
    decoder = SpeculativeDecoder(target(family), drafter, config=config)
    return [
        t for b in decoder.generate(PROMPT, SAMPLINGS[sampling], stats=stats) for t in b.token_ids
    ]


def fused(*scripts: fakes.Propose) -> FusedDrafter:
    return FusedDrafter(
        [SuffixDrafter(tree=True), RecyclingDrafter(), *map(ScriptedDrafter, scripts)]
    )


def with_model(family: str) -> FusedDrafter:
    model = CascadeDrafter(ModelDrafter(target(family)), SuffixDrafter())
    return FusedDrafter([SuffixDrafter(), RecyclingDrafter()], model)


MAKERS: dict[str, Callable[[str, tuple[int, ...]], Drafter]] = {
    "recycling": lambda family, ids: RecyclingDrafter(),
    "recycling, steps alone": lambda family, ids: RecyclingDrafter(prompt=False),
    "fused": lambda family, ids: fused(),
    "fused with an oracle": lambda family, ids: fused(fakes.oracle(ids)),
    "fused with wrong ones": lambda family, ids: fused(
        fakes.always_wrong(ids, VOCAB), fakes.too_long(ids), fakes.empty()
    ),
    "fused with trees": lambda family, ids: fused(
        fakes.as_tree(fakes.partly_right(ids, VOCAB), VOCAB)
    ),
    "fused with a model": lambda family, ids: with_model(family),
}


@pytest.mark.parametrize("sampling", sorted(SAMPLINGS))
@pytest.mark.parametrize("n", [None, 1, 2, 5, 16])
@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ids_equal_plain_decoding(family, name, n, sampling):
    """Greedy, and sampled with one seed, the ids are plain decoding's: one draw decides each node."""
    stats = DecodingStats()
    expected = truth(family, sampling)
    drafter = MAKERS[name](family, expected)
    assert tuple(decode(family, drafter, sampling, n, stats)) == expected
    assert not stats.faults
    assert stats.drafted


@pytest.mark.parametrize("name", ["recycling", "fused with trees", "fused with a model"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_target_s_rows_stay_true(family, name):
    """Drafters that read the target's rows leave them as a fresh forward makes them."""
    expected = truth(family, "greedy")
    config = SpeculationConfig(num_draft_tokens=8)
    decoder = SpeculativeDecoder(target(family), MAKERS[name](family, expected), config=config)
    seen: list[KVBuffer] = []
    lease = decoder.lease

    def spied(*args, **kwargs):
        made = lease(*args, **kwargs)
        seen.append(made.buffer)
        return made

    decoder.lease = spied
    ids = list(PROMPT)
    for block in decoder.generate(PROMPT, SAMPLINGS["greedy"]):
        ids += block.token_ids
        if block.token_ids:
            check_rows(target(family), seen[0], ids)


def check_rows(model: TargetModel, buffer: KVBuffer, ids: list[int]) -> None:
    """Assert that keys and values are those of all of ``ids`` but the last."""
    assert buffer.length == len(ids) - 1
    fresh = KVBuffer(len(ids))
    for _ in model.prefill(ids[:-1], fresh):
        pass
    for layer in range(buffer.num_layers):
        pairs = zip(
            buffer.rows(layer, 0, buffer.length), fresh.rows(layer, 0, fresh.length), strict=True
        )
        for ours, theirs in pairs:
            assert (ours - theirs).abs().max() < 2e-4
