"""Tokens drawn in a row without the host: the drafts, the rows and the distributions of drawing them one by one."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from fakes_graphs import OUR_FAMILIES, RECORDERS, Counted, executor, graph_target, taped
from steps import close, decoded, prefilled, random_ids, shared_target
from tiny import EOS, FAMILIES, VOCAB, tiny_llama

from rasd_integrations.config import SamplingParams
from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.papers.gathered_kv import GatheredKV
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.executors.base import Drawn, Sampler
from rasd_integrations.engine.executors.cuda_graphs import executor as graphs
from rasd_integrations.engine.executors.cuda_graphs.loop import ROOM
from rasd_integrations.engine.kv.buffer import GRANULE, KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification.sampling import draw, sampling_distribution
from rasd_integrations.errors import DecodingError
from rasd_integrations.types import DraftContext, TokenBlock

SAMPLINGS = {"greedy": (0.0, 1.0, 0), "sampled": (0.8, 1.0, 0), "nucleus": (1.1, 0.7, 9)}


def same(logits: torch.Tensor) -> torch.Tensor:
    return logits


def drafts(model, context, blocks, budget, confidence=0.0, helper=None):
    """Return a drafter's drafts, with ``blocks`` committed after each, and its session's forwards."""
    drafter = ModelDrafter(model, confidence=confidence)
    if helper is not None:
        drafter = CascadeDrafter(drafter, helper)
    session = drafter.start(context)
    out = [session.propose(budget)]
    for block in blocks:
        session.observe(TokenBlock(tuple(block)))
        out.append(session.propose(budget))
    buffer = session._lease.buffer
    return out, session, buffer


@pytest.mark.slow
@pytest.mark.parametrize("recorder", sorted(RECORDERS))
@pytest.mark.parametrize("sampling", sorted(SAMPLINGS))
@pytest.mark.parametrize("budget", [1, ROOM + 5])
@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_drafts_are_those_of_drawing_one_by_one(family, budget, sampling, recorder):
    """Tokens, distributions, logits and likelihoods, over blocks that agree with the draft and that do not."""
    make = FAMILIES[family]
    temperature, top_p, top_k = SAMPLINGS[sampling]
    context = DraftContext(
        prompt_ids=random_ids(30), temperature=temperature, top_p=top_p, top_k=top_k, seed=3
    )
    blocks = [random_ids(n, seed=n) for n in (1, 4, 2)]
    wanted, _, _ = drafts(TargetModel(make(1)), context, blocks, budget)
    model = graph_target(partial(make, 1), RECORDERS[recorder])
    got, session, _ = drafts(model, context, blocks, budget)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.token_ids == theirs.token_ids
        close(ours.logits, theirs.logits)
        if sampling == "greedy":
            assert ours.node_probs == pytest.approx(theirs.node_probs, rel=1e-4)
        else:
            torch.testing.assert_close(ours.probs, theirs.probs, atol=1e-4, rtol=1e-3)
    assert session.forwards >= sum(map(len, got))


@pytest.mark.parametrize("recorder", sorted(RECORDERS))
def test_one_recording_serves_every_length(recorder):
    """After the first draft and the second, no length is recorded again, and nobody steps or asks in between."""
    counted = Counted(RECORDERS[recorder])
    model = graph_target(partial(tiny_llama, 1), counted)
    session = ModelDrafter(model, confidence=0.0).start(DraftContext(prompt_ids=random_ids(30)))
    proposed(session, [5, 5, 5])
    recorded, counted.replays = counted.recordings, 0
    budgets = [2, 3, 7, ROOM, 12]
    assert proposed(session, budgets) == budgets
    assert counted.recordings == recorded
    assert counted.replays == sum(budgets)  # one of each reads what was committed


def proposed(session, budgets) -> list[int]:
    """Return the lengths of a session's drafts, each with one token committed behind it."""
    lengths = []
    for budget in budgets:
        lengths.append(len(session.propose(budget)))
        session.observe(TokenBlock((7,)))
    return lengths


def test_the_device_is_asked_once_a_draft(monkeypatch):
    """However many tokens it has, its tokens and probabilities come in one reading."""
    model = graph_target(partial(tiny_llama, 1), taped)
    reads = []
    monkeypatch.setattr(Drawn, "read", lambda self, read=Drawn.read: reads.append(1) or read(self))
    session = ModelDrafter(model, confidence=0.0).start(DraftContext(prompt_ids=random_ids(30)))
    assert proposed(session, [8, 8, 1, ROOM]) == [8, 8, 1, ROOM]
    assert len(reads) == 4


@pytest.mark.parametrize("recorder", sorted(RECORDERS))
@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_rows_are_those_of_a_fresh_forward(family, recorder):
    """What the loop has laid down is what a prefill of the same tokens lays down."""
    make = partial(FAMILIES[family], 1)
    model = graph_target(make, RECORDERS[recorder])
    prompt = random_ids(30)
    got, session, buffer = drafts(model, DraftContext(prompt_ids=prompt), [random_ids(3, 5)], 9)
    held = [*session.ids, *got[-1].token_ids][: buffer.length]
    assert buffer.length == len(prompt) + 3 + 9 - 1
    fresh = prefilled(TargetModel(make()), held, buffer.capacity)
    for layer in range(buffer.num_layers):
        for ours, theirs in zip(
            buffer.rows(layer, 0, buffer.length), fresh.rows(layer, 0, len(held)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_longer_prefixes_and_other_memory_are_followed(monkeypatch):
    """Past the edge of a bucket, and where the buffer moves between drafts, drafts stay the same."""
    monkeypatch.setattr(graphs, "FIRST_KV_BUCKET", GRANULE)
    counted = Counted(taped)
    model = graph_target(partial(tiny_llama, 1), counted)
    context = DraftContext(prompt_ids=random_ids(GRANULE - 9))
    blocks = [random_ids(7, seed) for seed in range(5)] + [random_ids(600, 9), [4], [5]]
    wanted, _, _ = drafts(TargetModel(tiny_llama(1)), context, blocks, 6)
    counted.recordings = 0
    got, _, buffer = drafts(model, context, blocks, 6)
    assert [draft.token_ids for draft in got] == [draft.token_ids for draft in wanted]
    assert buffer.capacity > 2 * GRANULE
    assert counted.recordings >= 2


@pytest.mark.parametrize("confidence", [0.3, 1.0])
def test_an_unlikely_token_ends_the_draft(confidence):
    """The draft is as long as where each token is asked for, and the next one is right."""
    context = DraftContext(prompt_ids=random_ids(30))
    blocks = [random_ids(2, 6), random_ids(1, 7)]
    wanted, _, _ = drafts(TargetModel(tiny_llama(1)), context, blocks, 10, confidence)
    model = graph_target(partial(tiny_llama, 1), taped)
    got, session, buffer = drafts(model, context, blocks, 10, confidence)
    assert [draft.token_ids for draft in got] == [draft.token_ids for draft in wanted]
    assert min(map(len, got)) < 10
    assert buffer.length == len(session.ids) + len(got[-1]) - 1


def test_a_helper_goes_first_and_the_loop_goes_on():
    """A guess is verified in one wide step; the rest of the draft is drawn in a row."""
    prompt = random_ids(12) * 4
    context = DraftContext(prompt_ids=prompt, chunk_ids=[prompt])
    blocks = [prompt[:3], prompt[3:7]]
    wanted, _, _ = drafts(TargetModel(tiny_llama(1)), context, blocks, 9, helper=SuffixDrafter())
    model = graph_target(partial(tiny_llama, 1), taped)
    got, _, _ = drafts(model, context, blocks, 9, helper=SuffixDrafter())
    assert [draft.token_ids for draft in got] == [draft.token_ids for draft in wanted]


def test_logits_come_for_every_token():
    """The same as drawn one by one."""
    context = DraftContext(prompt_ids=random_ids(30))
    wanted, _, _ = drafts(TargetModel(tiny_llama(1)), context, [[4, 5]], 6)
    got, _, _ = drafts(graph_target(partial(tiny_llama, 1), taped), context, [[4, 5]], 6)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.logits.shape == (6, VOCAB)
        close(ours.logits, theirs.logits)


@pytest.mark.parametrize("size", [VOCAB - 2, VOCAB + 13])
def test_other_sizes_and_forbidden_tokens_are_fitted_in_the_loop(size):
    """Cropped, padded and masked as outside of it."""
    allowed = torch.rand(VOCAB, generator=torch.Generator().manual_seed(0)) < 0.5
    context = DraftContext(prompt_ids=random_ids(30), temperature=1.0, seed=4)
    got = []
    for model in (
        TargetModel(tiny_llama(5, vocab_size=size)),
        graph_target(partial(tiny_llama, 5, vocab_size=size), taped),
    ):
        drafter = ModelDrafter(model, vocab_size=VOCAB, confidence=0.0, allowed=allowed)
        session = drafter.start(context)
        got.append([])
        for token in (5, 6, 7):
            got[-1].append(session.propose(5).token_ids)
            session.observe(TokenBlock((token,)))
    assert got[0] == got[1]
    assert all(bool(allowed[token]) for draft in got[1] for token in draft)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "n"), [(0.0, None), (0.0, 5), (0.0, 20), (0.9, 5), (0.9, 20)]
)
@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_answers_are_those_of_eager_drafters(family, n, temperature):
    """Target and drafter on graphs: greedy the ids of plain decoding, sampled those of eager steps."""
    make = FAMILIES[family]
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=40, ignore_eos=True)
    models = [graph_target(partial(make, seed), taped) for seed in (0, 1)]
    found = decoded(models[0], ModelDrafter(models[1], confidence=0.0), params, n=n)
    if temperature == 0:
        assert found == decoded(shared_target(family), params=params)
    else:
        eager = [TargetModel(make(seed)) for seed in (0, 1)]
        assert found == decoded(eager[0], ModelDrafter(eager[1], confidence=0.0), params, n=n)


def test_a_drafter_that_is_its_target_is_always_right():
    """Both on the same graphs, over memory of their own."""
    model = graph_target(tiny_llama, taped)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    found = decoded(model, ModelDrafter(model, confidence=0.0), params, n=7)
    assert found == decoded(shared_target(), params=params)


@pytest.mark.parametrize("what", ["steps", "draws"])
def test_a_recording_that_fails_costs_speed_only(what, monkeypatch, caplog):
    """The draft is finished by the same steps unrecorded, and one warning says so; steps keep their graphs."""
    model = graph_target(partial(tiny_llama, 1), taped)
    recorder = executor(model)._recorder

    def failing(run):
        draws = getattr(run, "__name__", "") == "run"
        if draws == (what == "draws"):
            msg = "operation not permitted when stream is capturing"
            raise RuntimeError(msg)
        return recorder(run)

    monkeypatch.setattr(executor(model), "_recorder", failing)
    context = DraftContext(prompt_ids=random_ids(30))
    blocks = [random_ids(2, seed) for seed in range(6)]
    wanted, _, _ = drafts(TargetModel(tiny_llama(1)), context, blocks, 5)
    got, _, _ = drafts(model, context, blocks, 5)
    assert [draft.token_ids for draft in got] == [draft.token_ids for draft in wanted]
    assert executor(model).is_off == (what == "steps")
    assert len(caplog.records) == 1
    assert executor(model).num_graphs == (what == "draws")


def test_graphs_of_drafts_go_with_their_buffer():
    """Neither the recorded step nor its sampler keeps the memory of an answer that is over."""
    model = graph_target(partial(tiny_llama, 1), taped)
    drafter = ModelDrafter(model, confidence=0.0)
    session = drafter.start(DraftContext(prompt_ids=random_ids(30)))
    proposed(session, [4, 4, 4])
    assert executor(model).num_graphs == 2
    memory = weakref.ref(session._lease.buffer.memory)
    session.close()
    del session
    gc.collect()
    assert memory() is None
    assert executor(model).num_graphs == 0


def test_what_cannot_be_drawn_in_a_row_is_refused():
    """Gathered rows, empty prefixes, kept hidden states and other executors: the caller draws by itself."""
    sampler = Sampler(0.0, 1.0, 0, same)
    model = graph_target(tiny_llama, taped)
    buffer = prefilled(model, random_ids(30))
    hidden = KVBuffer(64, keeps_hidden=True)
    for _ in model.prefill(random_ids(30), hidden):
        pass
    generator = torch.Generator()
    for other in (GatheredKV(buffer, [0, 1, 5], 64), KVBuffer(8), hidden):
        assert model.draw([1], other, 4, sampler, generator) is None
    eager = shared_target()
    assert eager.draw([1], prefilled(eager, [1, 2]), 4, sampler, generator) is None
    assert model.draw([1], buffer, 4, sampler, generator) is not None
    assert buffer.length == 30


def test_what_was_drawn_outlives_the_next_draft():
    """The memory of the loop is the executor's, what it returned is the caller's."""
    sampler = Sampler(0.0, 1.0, 0, same)
    model = graph_target(tiny_llama, taped)
    buffer, generator = prefilled(model, random_ids(30)), torch.Generator()
    first, second = (model.draw([k], buffer, 4, sampler, generator) for k in (1, 2))
    kept = first.read(), first.logits.clone()
    model.draw([3], buffer, 4, sampler, generator)
    assert (first.read(), True) == (kept[0], torch.equal(first.logits, kept[1]))
    assert first.read() != second.read()


@pytest.mark.parametrize("sampling", sorted(SAMPLINGS))
def test_a_sampler_draws_what_the_host_draws(sampling):
    """The same tokens from the same numbers, and the probability of each."""
    temperature, top_p, top_k = SAMPLINGS[sampling]
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 2
    sampler = Sampler(temperature, top_p, top_k, same)
    numbers = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, chances, _ = sampler(logits, numbers)
    probs = (sampling_distribution(temperature, top_p, top_k) or partial(torch.softmax, dim=-1))(
        logits
    )
    if sampling == "greedy":
        assert torch.equal(tokens, logits.argmax(-1))
    else:
        assert torch.equal(tokens, draw(probs, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(chances, probs.gather(-1, tokens[:, None]).squeeze(-1))


def test_a_row_without_a_token_is_reported():
    """Where everything is forbidden the draft fails with the reason, and the tokens before it were read safely."""
    sampler = Sampler(0.0, 1.0, 0, lambda logits: logits.fill_(float("-inf")))
    model = graph_target(tiny_llama)
    buffer = prefilled(model, random_ids(30))
    drawn = model.draw([1], buffer, 4, sampler, torch.Generator())
    with pytest.raises(DecodingError, match="No token"):
        drawn.read()


def test_the_end_of_text_ends_a_draft():
    """Tokens behind it are forgotten, with their rows."""
    model = graph_target(partial(tiny_llama, 1), taped)
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[EOS] = True
    drafter = ModelDrafter(model, confidence=0.0, allowed=allowed)
    session = drafter.start(DraftContext(prompt_ids=random_ids(30)))
    assert session.propose(6).token_ids == (EOS,)
    assert session._lease.buffer.length == 30
