"""Whatever is in a store, and however it changes or breaks, the answer is that of plain decoding."""

from __future__ import annotations

import itertools
import os
import threading
from collections import defaultdict

import pytest
import torch
from drafting import decode as decoded
from fakes_datastore import encode, ids_store, random_ids
from fakes_distributions import Model, distance, outcomes, softmax
from fakes_memory import new_memory
from tiny import tiny_llama

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.datastore import AnswersDrafter, DatastoreDrafter
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification import exact as verification
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import DraftContext, TokenBlock

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=40, ignore_eos=True)
PROMPT = random_ids(60, seed=19)  # every family has something to say to it
SAMPLINGS = pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
SHAPES = pytest.mark.parametrize("tree", [True, False], ids=["tree", "chain"])


def partly_right(truth: list[int]) -> TokenStore:
    """Return a store of texts that agree with the answer here and there, and of others."""
    start = [*PROMPT[-3:], *truth]
    spoiled = [(t + 1) % 256 if i % 7 == 5 else t for i, t in enumerate(start)]
    forked = [(t + 3) % 256 if i % 5 == 4 else t for i, t in enumerate(start)]
    return ids_store(spoiled, forked, random_ids(400, seed=8), start[:20])


def decode(target, drafter=None, params=GREEDY, n=8, stats=None) -> list[int]:
    return decoded(target, drafter, params, n, ids=PROMPT, stats=stats)


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel(tiny_llama())


# --- exactness -----------------------------------------------------------------------------------


def test_a_store_that_holds_the_answer_is_accepted_whole(target):
    """Blocks are full: 40 tokens in 5 steps of 8 drafted ones."""
    plain = decode(target)
    stats = DecodingStats()
    drafter = DatastoreDrafter(ids_store([*PROMPT[-4:], *plain]))
    assert decode(target, drafter, stats=stats) == plain
    assert stats.acceptance_rate == 1.0
    assert stats.target_steps == 5


def test_ids_of_another_vocabulary_are_dropped(target):
    """Ids that the target does not know cut the draft and nothing else."""
    plain = decode(target)
    foreign = [*PROMPT[-4:], *plain[:5], 100_000, *plain[6:]]
    assert decode(target, DatastoreDrafter(ids_store(foreign))) == plain


def answer(model, drafter, length, budget):
    """Draw an answer of ``length`` tokens or more; return it and how many of them were drafted."""
    session = drafter.start(DraftContext(prompt_ids=[0, 1, 2]))
    said: tuple[int, ...] = ()
    accepted = 0
    while len(said) < length:
        draft = session.propose(budget)
        paths: list[tuple[int, ...]] = []
        for parent, token in zip(draft.parents, draft.token_ids, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        logits = torch.stack([model.logits((*said, *path)) for path in [(), *paths]])
        verdict = verification.sample_and_walk(logits, draft, softmax)
        block = (*(draft.token_ids[i] for i in verdict.accepted), verdict.token_id)
        session.observe(TokenBlock(block))
        said += block
        accepted += len(verdict.accepted)
    session.close()
    return said, accepted


def test_what_was_learned_from_one_answer_leaves_the_distribution_of_the_next(oracle):
    """The joint distribution of two answers, the second drafted from the first, is the product of two distributions."""
    model = Model(3, vocab=3)

    def two():
        drafter = AnswersDrafter(new_memory())
        (one, _), (other, drafted) = (answer(model, drafter, 2, 4) for _ in range(2))
        return one[:2], other[:2], drafted

    sampling = outcomes(oracle, two)
    assert any(drafted for _, _, drafted in sampling)
    joint: dict[tuple[tuple[int, ...], ...], float] = defaultdict(float)
    for (one, other, _), weight in sampling.items():
        joint[one, other] += weight
    plain = model.extend({(): 1.0}, 2)
    product = {(a, b): plain[a] * plain[b] for a, b in itertools.product(plain, repeat=2)}
    assert distance(joint, product) < 1e-6


# --- stores that change or break while a stream runs ---------------------------------------------


def stream(target, drafter, params, stats, between):
    """Decode block by block and call ``between`` after the third."""
    decoder = SpeculativeDecoder(target, drafter, config=SpeculationConfig(num_draft_tokens=3))
    ids: list[int] = []
    for number, block in enumerate(decoder.generate(PROMPT, params, stats=stats)):
        ids += block.token_ids
        if number == 3:
            between()
    return ids


@SAMPLINGS
def test_texts_added_in_mid_stream_are_drafted_from(target, params):
    """The next draft sees them; the answer stays."""
    plain = decode(target, params=params)
    store, stats = ids_store(), DecodingStats()
    got = stream(target, DatastoreDrafter(store), params, stats, lambda: store.add_ids([plain]))
    assert got == plain
    assert stats.drafters["datastore"].accepted >= 24
    assert stats.faults == ()


@SAMPLINGS
def test_texts_removed_in_mid_stream_are_not_drafted_from(target, params):
    """The draft after the removal holds nothing of them; the answer stays."""
    plain = decode(target, params=params)
    store, stats = TokenStore(lambda text: [*PROMPT[-3:], *plain]), DecodingStats()
    store.add(["the answer"])
    drafted: list[int] = []

    def remove():
        store.remove("the answer")
        drafted.append(stats.drafters["datastore"].drafted)

    assert stream(target, DatastoreDrafter(store), params, stats, remove) == plain
    assert stats.drafters["datastore"].drafted == drafted[0] > 0
    assert stats.faults == ()


def overwrite(path):
    """Exchange bytes in the file's midst; its size stays."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 64)
    os.utime(path, ns=(1, 1))  # the clock of file times may be coarser than this test is fast


SPOILED = {
    "emptied": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, 100),
    "grown": lambda path: os.truncate(path, 5000),
    "overwritten": overwrite,
}


@SAMPLINGS
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_file_spoiled_in_mid_stream_is_a_fault_and_the_answer_stays(
    target, tmp_path, spoil, params
):
    """Somebody writes over the mapped file: decoding goes on without the drafter and says why."""
    plain = decode(target, params=params)
    path = tmp_path / "texts.rest"
    ids_store([*PROMPT[-3:], *plain]).save(path)
    store, stats = TokenStore.open(path, encode), DecodingStats()
    got = stream(target, DatastoreDrafter(store), params, stats, lambda: spoil(path))
    assert got == plain
    (fault,) = stats.faults
    assert fault.startswith("drafter 'datastore' failed: RetrievalError: The token store")
    assert "changed in place" in fault
    assert stats.drafters["datastore"].accepted > 0


def test_a_store_saved_over_its_own_file_in_mid_stream_is_no_fault(target, tmp_path):
    """The proper way to change a file: the stream reads the old one to its end."""
    plain = decode(target)
    path = tmp_path / "texts.rest"
    ids_store([*PROMPT[-3:], *plain]).save(path)
    store, stats = TokenStore.open(path, encode), DecodingStats()
    drafter = DatastoreDrafter(store)
    got = stream(target, drafter, GREEDY, stats, lambda: ids_store([1, 2, 3]).save(path))
    assert got == plain
    assert stats.faults == ()
    assert stats.acceptance_rate == 1.0


def test_streams_are_exact_while_another_thread_changes_the_store(target):
    """Adding, removing and sorting beside four streams: every answer is the plain one, without a fault."""
    plain = decode(target)
    store = partly_right(plain)
    stop = threading.Event()
    rounds = 0

    def churn():
        nonlocal rounds
        while not (rounds and stop.is_set()):
            store.add_ids([random_ids(3000, seed=rounds), plain[rounds % 20 :]])
            store.remove([int(store.shards[0].keys[0])])
            rounds += 1

    writer = threading.Thread(target=churn)
    writer.start()
    try:
        for _ in range(4):
            stats = DecodingStats()
            assert decode(target, DatastoreDrafter(store), stats=stats) == plain
            assert stats.faults == ()
    finally:
        stop.set()
        writer.join()


def test_an_answer_is_learned_when_it_ends(target):
    """The second time the same answer is drafted whole; a datastore keeps nothing."""
    plain = decode(target)
    learning = AnswersDrafter(new_memory())
    first, second, forgetful = DecodingStats(), DecodingStats(), DecodingStats()
    assert decode(target, learning, stats=first) == plain
    assert decode(target, learning, stats=second) == plain
    assert second.target_steps < first.target_steps / 2
    plain_store = DatastoreDrafter(ids_store())
    for _ in range(2):
        decode(target, plain_store, stats=forgetful)
    assert forgetful.drafted == 0
    assert len(plain_store.store) == 0
