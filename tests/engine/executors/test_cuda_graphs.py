"""Steps at fixed addresses: padded, rounded, recorded and replayed, they say what eager steps say."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from itertools import pairwise

import fakes
import pytest
import torch
from fakes import ScriptedDrafter
from fakes_graphs import (
    OUR_FAMILIES,
    RECORDERS,
    Counted,
    executor,
    fill_behind,
    graph_target,
    taped,
)
from steps import TREE, close, decoded, prefilled, random_ids, shared_target
from tiny import FAMILIES, VOCAB, tiny_llama

from rasd_integrations.config import SamplingParams
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.papers.gathered_kv import GatheredKV
from rasd_integrations.engine.attention import Scoring, Segment, StepContext
from rasd_integrations.engine.executors.cuda_graphs import executor as graphs
from rasd_integrations.engine.executors.cuda_graphs import fixed
from rasd_integrations.engine.executors.cuda_graphs.executor import ROW_BUCKETS, kv_bucket
from rasd_integrations.engine.kv.buffer import GRANULE, KVBuffer
from rasd_integrations.engine.target import TargetModel


def test_buckets_hold_what_they_are_asked_for():
    """Rows of keys are rounded up by halves from 4096, never past what the buffer has."""
    sizes = sorted({kv_bucket(rows, 200_000) for rows in range(1, 131_073, 97)})
    assert sizes[:4] == [4096, 6144, 9216, 13824]
    assert all(1.45 < b / a < 1.55 for a, b in pairwise(sizes))
    assert len(sizes) <= 10
    assert all(kv_bucket(rows, 1 << 20) >= rows for rows in range(1, 300_000, 1013))
    assert kv_bucket(300, 512) == 512


@pytest.mark.slow
@pytest.mark.parametrize("recorder", sorted(RECORDERS))
@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_logits_equal_eager_at_every_row_bucket_edge(family, recorder):
    """Chains as wide as a bucket, one narrower and one wider: eager's logits, recorded and replayed."""
    make = FAMILIES[family]
    eager, ours = shared_target(family), graph_target(make, RECORDERS[recorder])
    ids = random_ids(40)
    expected, buffer = prefilled(eager, ids, 256), prefilled(ours, ids, 256)
    edges = sorted({n + d for n in ROW_BUCKETS for d in (-1, 0, 1)} - {0, 65})
    for n in edges:
        for seed in (n, n + 1000, n + 2000):  # eager, recorded, replayed with others
            row = random_ids(n, seed)
            close(ours.step(row, buffer), eager.step(row, expected))
    assert executor(ours).num_graphs == len(ROW_BUCKETS)


@pytest.mark.parametrize("recorder", sorted(RECORDERS))
@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_one_graph_follows_the_length_and_the_trees(family, recorder):
    """A graph that was recorded once is right for every later length, width and tree of its buckets."""
    make = FAMILIES[family]
    counted = Counted(RECORDERS[recorder])
    eager, ours = shared_target(family), graph_target(make, counted)
    ids = random_ids(5)
    expected, buffer = prefilled(eager, ids, 256), prefilled(ours, ids, 256)
    counted.recordings = counted.replays = 0
    for round_ in range(12):
        n = 5 + round_ % 4  # rows 5 to 8 share a bucket
        row = random_ids(n, seed=round_)
        parents = TREE[: n - 1] if round_ % 3 else None
        close(ours.step(row, buffer, parents), eager.step(row, expected, parents))
        kept = [0, 1, 3][: 1 + round_ % 3] if parents else list(range(n))
        buffer.commit(kept)
        expected.commit(kept)
    assert (counted.recordings, counted.replays) == (1, 11)
    close(ours.step([7], buffer), eager.step([7], expected))


@pytest.mark.slow
@pytest.mark.parametrize("recorder", sorted(RECORDERS))
@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_logits_equal_eager_at_every_length_bucket_edge(family, recorder, monkeypatch):
    """Lengths that just fill a bucket of keys, and those that spill over into the next, which is recorded again."""
    monkeypatch.setattr(graphs, "FIRST_KV_BUCKET", GRANULE)
    make = FAMILIES[family]
    counted = Counted(RECORDERS[recorder])
    eager, ours = shared_target(family), graph_target(make, counted)
    for bucket in (GRANULE, 2 * GRANULE, 3 * GRANULE):
        for length in (bucket - 5, bucket - 4, bucket - 3, bucket - 1, bucket, bucket + 1):
            ids = random_ids(length, seed=length)
            expected, buffer = prefilled(eager, ids, 1280), prefilled(ours, ids, 1280)
            counted.recordings = 0
            for seed in range(3):
                row = random_ids(4, seed)
                close(ours.step(row, buffer), eager.step(row, expected))
            assert counted.recordings == 1
            assert kv_bucket(length + 4, 1280) in [
                b for runs in executor(ours)._graphs.values() for _, b in runs
            ]


def test_a_longer_prefix_drops_the_graphs_it_has_outgrown(monkeypatch):
    """Past the edge of a bucket its graphs go, and the next bucket's are recorded."""
    monkeypatch.setattr(graphs, "FIRST_KV_BUCKET", GRANULE)
    ours = graph_target(tiny_llama)
    buffer = prefilled(ours, random_ids(250), 1024)
    for _ in range(2):
        ours.step([1, 2], buffer)
    assert executor(ours).num_graphs == 1
    buffer.commit(range(2))
    ours.step([1] * 8, buffer)  # 260 rows
    assert executor(ours).num_graphs == 0
    ours.step([1] * 8, buffer)
    assert executor(ours).num_graphs == 1


@pytest.mark.parametrize("recorder", sorted(RECORDERS))
def test_a_grown_buffer_is_recorded_anew(recorder):
    """A graph of memory that the buffer has left is never run again, and keeps nothing alive."""
    counted = Counted(RECORDERS[recorder])
    eager, ours = shared_target(), graph_target(tiny_llama, counted)
    ids = random_ids(240)
    expected, buffer = prefilled(eager, ids), prefilled(ours, ids)
    for _ in range(2):
        close(ours.step([1, 2], buffer), eager.step([1, 2], expected))
    memory = weakref.ref(buffer.memory)
    assert executor(ours).num_graphs == 1
    more = random_ids(40, seed=1)
    for target, held in ((ours, buffer), (eager, expected)):
        for _ in target.prefill(more, held):
            pass
    gc.collect()
    assert memory() is None
    assert executor(ours).num_graphs == 0
    counted.recordings = 0
    for _ in range(3):
        close(ours.step([1, 2], buffer), eager.step([1, 2], expected))
    assert counted.recordings == 1


@pytest.mark.parametrize("recorder", sorted(RECORDERS))
def test_graphs_go_with_their_buffer(recorder):
    """A stream that ends takes its graphs along."""
    ours = graph_target(tiny_llama, RECORDERS[recorder])
    buffer = prefilled(ours, random_ids(20))
    for _ in range(2):
        ours.step([1], buffer)
    assert executor(ours).num_graphs == 1
    del buffer
    gc.collect()
    assert executor(ours).num_graphs == 0


@pytest.mark.parametrize("recorder", sorted(RECORDERS))
def test_streams_take_turns_on_their_own_graphs(recorder):
    """Two buffers, one executor: each graph reads and writes the memory of its own."""
    eager, ours = shared_target(), graph_target(tiny_llama, RECORDERS[recorder])
    pairs = [
        (prefilled(ours, ids), prefilled(eager, ids))
        for ids in (random_ids(30, seed=5), random_ids(70, seed=6))
    ]
    for seed in range(4):
        for buffer, expected in pairs:
            row = random_ids(3, seed)
            close(ours.step(row, buffer), eager.step(row, expected))
            buffer.commit(range(2))
            expected.commit(range(2))
    assert executor(ours).num_graphs == 2


@pytest.mark.parametrize("recorder", sorted(RECORDERS))
@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_a_step_writes_its_own_rows_and_nothing_else(family, recorder):
    """Rows that pad a step leave no trace: everything but the step's own rows lies as it lay."""
    ours = graph_target(FAMILIES[family], RECORDERS[recorder])
    buffer = prefilled(ours, random_ids(30))
    fill_behind(buffer, 0.5)  # comparable, as NaN is not
    for _ in range(2):
        ours.step([1, 2, 3, 4, 5], buffer)
    layers = range(buffer.num_layers)
    before = [tuple(t.clone() for t in buffer.rows(layer, 0, buffer.capacity)) for layer in layers]
    ours.step([6, 7, 8, 9, 10], buffer)  # three rows pad it
    for layer in layers:
        for old, new in zip(before[layer], buffer.rows(layer, 0, buffer.capacity), strict=True):
            changed = (old != new).any(-1).any(0).nonzero().flatten().tolist()
            assert changed == [30, 31, 32, 33, 34]


@pytest.mark.parametrize("recorder", sorted(RECORDERS))
@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_what_was_never_written_is_never_read(family, recorder):
    """Memory behind the step may hold anything, NaN too."""
    make = FAMILIES[family]
    eager, ours = shared_target(family), graph_target(make, RECORDERS[recorder])
    ids = random_ids(30)
    expected, buffer = prefilled(eager, ids), prefilled(ours, ids)
    fill_behind(buffer, float("nan"))
    for seed in range(3):
        row = random_ids(3, seed)
        close(ours.step(row, buffer), eager.step(row, expected))


def test_the_last_row_of_a_buffer_can_be_written():
    """Padding reaches past the end of the memory; nothing is laid there."""
    eager, ours = shared_target(), graph_target(tiny_llama, taped)
    ids = random_ids(GRANULE - 5)
    expected, buffer = prefilled(eager, ids), prefilled(ours, ids)
    for seed in range(3):
        row = random_ids(5, seed)
        close(ours.step(row, buffer), eager.step(row, expected))
    assert buffer.capacity == GRANULE
    assert executor(ours).num_graphs == 1


def test_logits_outlive_the_next_step():
    """What a step returned is its caller's; the next replay does not change it."""
    ours = graph_target(tiny_llama, taped)
    buffer = prefilled(ours, random_ids(30))
    ours.step([1, 2], buffer)
    first = ours.step([1, 2], buffer)
    kept = first.clone()
    second = ours.step([3, 4], buffer)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("recorder", sorted(RECORDERS))
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("n", [None, 5])
@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_decoding_on_graphs_is_lossless(family, n, shape, recorder):
    """Chains and trees on graphs give the ids of plain eager decoding."""
    make = FAMILIES[family]
    truth = decoded(shared_target(family))
    propose = fakes.partly_right(truth, VOCAB)
    if shape == "tree":
        propose = fakes.as_tree(propose, VOCAB)
    counted = Counted(RECORDERS[recorder])
    ours = graph_target(make, counted)
    counted.replays = 0
    assert decoded(ours, ScriptedDrafter(propose), n=n) == truth
    assert decoded(ours) == truth
    assert counted.replays > 40  # plain decoding alone replays all steps but the first two


def test_sampled_decoding_on_graphs_draws_the_same_ids():
    """With a seed the same numbers are drawn from the same distributions."""
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=30, ignore_eos=True)
    expected = decoded(shared_target(), params=params)
    ours = graph_target(tiny_llama, taped)
    drafter = ScriptedDrafter(fakes.random_tokens(VOCAB))
    assert decoded(ours, drafter, params, n=4) == decoded(ours, params=params) == expected


def test_hidden_states_come_along():
    """Buffers that keep final hidden states get those of the real rows."""
    eager, ours = shared_target(), graph_target(tiny_llama, taped)
    held = []
    for target in (eager, ours):
        buffer = KVBuffer(64, keeps_hidden=True)
        for _ in target.prefill(random_ids(20), buffer):
            pass
        for seed in range(3):
            target.step(random_ids(3, seed), buffer)
            buffer.commit(range(3))
        held.append(buffer.hidden()[1])
    assert held[0].shape == (29, 48)
    torch.testing.assert_close(*held, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_a_graph_runs_eagerly():
    """Prefill, empty prefixes, wide steps, gathered rows and several answers at once are not recorded."""
    counted = Counted()
    ours = graph_target(tiny_llama, counted)
    counted.recordings = 0
    buffer = prefilled(ours, random_ids(30))
    gathered = GatheredKV(buffer, [0, 1, 5, 6], 64)
    positions = torch.arange(30, 32)
    segments = tuple(Segment(b, positions, None) for b in (buffer, buffer.copy(30, 64)))
    both = StepContext(positions.repeat(2), segments)
    for _ in range(3):
        ours.step([1] * 65, buffer)
        ours.step([1, 2], gathered)
        ours.step([1, 2], KVBuffer(8))
        ours._executor.step(torch.tensor([1, 2, 1, 2]), both, num_logits=4)
        ours._executor.step(
            torch.tensor([1, 2]), StepContext(positions, segments[:1]), num_logits=0
        )
    assert counted.recordings == 0
    for _ in range(2):
        ours.step([1, 2], buffer)
    assert counted.recordings == 1


def test_graphs_stay_within_a_bound(monkeypatch):
    """However many buffers and shapes there are, so many graphs are held at most."""
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 3)
    ours = graph_target(tiny_llama)
    buffers = [prefilled(ours, random_ids(20, seed)) for seed in range(3)]
    for buffer in buffers:
        for n in (1, 2, 3):
            for _ in range(2):
                ours.step([1] * n, buffer)
                assert executor(ours).num_graphs <= 3


def test_a_row_that_pads_is_never_laid_down():
    """Where it would lie, lies the real row that it repeats, whatever became of its own keys and values."""
    buffer = KVBuffer(GRANULE)
    k, v, q = torch.randn(3, 1, 2, 4, 8).unbind(0)
    buffer.write(0, k[0, :, :2], v[0, :, :2])
    buffer.commit([0, 1])
    inputs = fixed.FixedInputs(4, torch.device("cpu"))
    inputs.fill(torch.tensor([5, 6, 7]), Segment(buffer, torch.arange(2, 5), None))
    segment = fixed.FixedSegment(inputs, buffer.pinned(GRANULE), None)
    segment.attend(0, q, k, v, Scoring(1.0))
    keys, values = buffer.rows(0, 2, 5)
    assert torch.equal(keys, k[0, :, :3])
    assert torch.equal(values, v[0, :, :3])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafter_models_run_on_graphs_too(temperature):
    """A drafter's distributions, collected over its steps, are its own at every place of the chain."""
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=30, ignore_eos=True)
    counted = Counted(taped)
    eager = [TargetModel(tiny_llama(seed)) for seed in (0, 1)]
    ours = [graph_target(partial(tiny_llama, seed), counted) for seed in (0, 1)]
    expected, found = (
        decoded(target, ModelDrafter(model, confidence=0.0), params, n=4)
        for target, model in (eager, ours)
    )
    assert expected == found
    assert counted.replays > 40
