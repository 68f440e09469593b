"""Compiled steps over keys and values in 8 bits: drafting changes nothing, rows take half, and nobody else reads them."""

from __future__ import annotations

from functools import partial

import fakes
import pytest
import torch
from fakes import ScriptedDrafter
from steps import TREE, decoded, joint, prefilled, random_ids, shared_target
from tiny import VOCAB, tiny_gemma3, tiny_llama, tiny_tokenizer

from rasd_integrations import RASD
from rasd_integrations.config import CacheDir
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.papers.early_exit import EarlyExitDrafter
from rasd_integrations.drafters.papers.gathered_kv import GatheredKV
from rasd_integrations.drafters.papers.sparse_kv import SparseKVDrafter
from rasd_integrations.engine.executors.factory import make_executor
from rasd_integrations.engine.kv import buffer as kv
from rasd_integrations.engine.kv.buffer import GRANULE
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.runtime.models import wrapped_model
from rasd_integrations.stats import DecodingStats

pytest.importorskip("openvino")

# A scale is a 255th of a row's spread, so that a number is half of that off at most. Sums of many are less.
FAR = 0.05


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return how far the worst row is off, relative."""
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@pytest.fixture
def target() -> TargetModel:
    return shared_target("llama", "openvino-kv8")


PROMPT = random_ids(150)
decoded = partial(decoded, ids=PROMPT)
SCRIPTS = fakes.scripts(VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_greedy_ids_equal_plain_decoding(target, script, shape):
    """Drafts are judged by the rows that plain steps read."""
    truth = decoded(target)
    propose = SCRIPTS[script](truth)
    if shape == "tree":
        propose = fakes.as_tree(propose, VOCAB)
    assert truth == decoded(target, ScriptedDrafter(propose))


@pytest.mark.parametrize("parents", [None, TREE])
def test_logits_are_near_eager_ones_and_equal_after_moves(target, parents, monkeypatch):
    """Rows of a tree's path, of a grown, copied and gathered buffer are those of a fresh one; memory is of any content."""
    allocate = kv.allocate
    monkeypatch.setattr(kv, "allocate", lambda *args, **how: allocate(*args, **how).fill_(255))
    eager = shared_target()
    ids, more = random_ids(GRANULE - 3), random_ids(1 + len(TREE), seed=7)
    buffer, theirs = prefilled(target, ids), prefilled(eager, ids)
    assert off(target.step(more, buffer, parents), eager.step(more, theirs, parents)) < FAR
    path = [0, 1, 3] if parents else [0, 1, 2]  # both are chains of their text
    buffer.commit(path)
    fresh = prefilled(target, ids + [more[i] for i in path])
    wanted = target.step([5, 6], fresh)
    places = list(range(fresh.length))
    for moved in (buffer, buffer.copy(buffer.length, 400), GatheredKV(buffer, places, 400)):
        assert moved.length == fresh.length
        assert off(target.step([5, 6], moved), wanted) < 1e-3


def test_several_answers_in_one_step_say_what_each_says_alone(target):
    """Their rows lie in one arena."""
    buffers = [prefilled(target, random_ids(n, seed=n)) for n in (12, 90, 40)]
    wanted = [target.step([1, 2, 3], buffer.copy(buffer.length, 64)) for buffer in buffers]
    for got, alone in zip(joint(target, [([1, 2, 3], None)] * 3, buffers), wanted, strict=True):
        assert off(got, alone) < 1e-3


def test_a_row_of_a_head_takes_its_size_in_bytes_and_eight(target):
    """Scale and zero are the eight."""
    config = target.model.config
    head = config.hidden_size // config.num_attention_heads
    rows = 2 * config.num_hidden_layers * config.num_key_value_heads
    assert target.kv_bytes_per_token == rows * (head + 8)
    assert shared_target().kv_bytes_per_token == rows * head * 4


def test_windows_are_refused():
    """Some of their steps run eagerly."""
    with pytest.raises(ConfigurationError, match=r"sliding window.*executor='openvino'"):
        make_executor("openvino-kv8", tiny_gemma3())


def test_early_exit_says_that_it_cannot_read_them(target):
    """It costs speed only; drafters that read rows by the target's own steps go on."""
    truth = decoded(target)
    stats = DecodingStats()
    assert decoded(target, EarlyExitDrafter(1), stats=stats) == truth
    assert "cannot read keys and values in 8 bits" in stats.faults[0]
    stats = DecodingStats()
    assert (
        decoded(target, SparseKVDrafter("window", sink=4, window=64, max_rows=80), stats=stats)
        == truth
    )
    assert not stats.faults
    assert stats.drafted > 0


@pytest.mark.slow
def test_kept_prefixes_come_back_and_are_no_others_of_16_bits(tmp_path):
    """From disk they are the same bytes; files and answers tell both executors apart."""
    model, document = tiny_llama(), random_ids(200)
    folder = CacheDir.of(tmp_path, 1 << 30)
    narrow, wide = (
        wrapped_model(model, tiny_tokenizer(), "tiny", name)
        for name in ("openvino-kv8", "openvino")
    )
    cache = narrow.new_cache(1 << 30, folder)
    for _ in SpeculativeDecoder(narrow.target, prefix_cache=cache).prefill(document):
        pass
    found = [
        shared.new_cache(1 << 30, folder).lease([*document, 0], 300).buffer
        for shared in (narrow, wide)
    ]
    assert [buffer.length for buffer in found] == [200, 0]
    kept = cache.lease([*document, 0], 300).buffer
    for layer in range(kept.num_layers):
        for a, b in zip(kept.rows(layer, 0, 200), found[0].rows(layer, 0, 200), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(narrow.target.step([1, 2], kept), narrow.target.step([1, 2], found[0]))
    first, other = (
        RASD.from_model(model, tiny_tokenizer(), executor=executor).identity
        for executor in ("openvino-kv8", "openvino")
    )
    assert first != other
