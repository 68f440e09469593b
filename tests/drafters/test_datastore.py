"""The datastore drafter: its trees, and that no store, changing or broken, changes an answer."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_llama

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.datastore import TokenStore
from rasd_integrations.datastore.encoding import SEPARATOR
from rasd_integrations.drafters.base import Drafter
from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.datastore import DatastoreDrafter, best_tree
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.engine.decoder import SpeculativeDecoder
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import DraftContext, TokenBlock

NUM_TOKENS = 40
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(
    temperature=0.9, top_p=0.95, seed=11, max_tokens=NUM_TOKENS, ignore_eos=True
)


def encode(text: str) -> list[int]:
    """Return one id a byte."""
    return list(text.encode())


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT = random_ids(60, seed=19)  # every family has something to say to it


def store_of(*rows: list[int], **options) -> TokenStore:
    store = TokenStore(encode, **options)
    store.add_ids(rows)
    return store


def partly_right(truth: list[int]) -> TokenStore:
    """Return a store of texts that agree with the answer here and there, and of others."""
    start = [*PROMPT[-3:], *truth]
    spoiled = [(t + 1) % 256 if i % 7 == 5 else t for i, t in enumerate(start)]
    forked = [(t + 3) % 256 if i % 5 == 4 else t for i, t in enumerate(start)]
    return store_of(spoiled, forked, random_ids(400, seed=8), start[:20])


def decode(target, drafter=None, params=GREEDY, n=8, stats=None) -> list[int]:
    decoder = SpeculativeDecoder(target, drafter, config=SpeculationConfig(num_draft_tokens=n))
    return [t for block in decoder.generate(PROMPT, params, stats=stats) for t in block.token_ids]


def propose(store, prompt, budget=16, **options):
    return DatastoreDrafter(store, **options).start(DraftContext(prompt_ids=prompt)).propose(budget)


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel(tiny_llama())


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [True, False], ids=["tree", "chain"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "gpt2"])
def test_ids_equal_plain_decoding(family, n, params, tree):
    """Greedy or drawn with a seed, the answer is that without drafts; some drafts stand, some fall."""
    target = TargetModel(FAMILIES[family]())
    plain = decode(target, params=params)
    assert len(set(plain)) > 3
    stats = DecodingStats()
    drafter = DatastoreDrafter(partly_right(plain), tree=tree)
    assert decode(target, drafter, params, n, stats) == plain
    counts = stats.as_dict()["drafters"]["datastore"]
    assert 0 < counts["accepted"] < counts["drafted"]


def test_a_store_that_holds_the_answer_is_accepted_whole(target):
    """Blocks are full: 40 tokens in 5 steps of 8 drafted ones."""
    plain = decode(target)
    stats = DecodingStats()
    drafter = DatastoreDrafter(store_of([*PROMPT[-4:], *plain]))
    assert decode(target, drafter, stats=stats) == plain
    assert stats.acceptance_rate == 1.0
    assert stats.target_steps == 5


def test_ids_of_another_vocabulary_are_dropped(target):
    """Ids that the target does not know cut the draft and nothing else."""
    plain = decode(target)
    foreign = [*PROMPT[-4:], *plain[:5], 100_000, *plain[6:]]
    assert decode(target, DatastoreDrafter(store_of(foreign))) == plain


def test_it_drafts_for_a_model_drafter(target):
    """In a cascade the answer stays, and the store saves forwards of the drafter model."""
    model = TargetModel(tiny_llama(3))
    plain = decode(target)
    alone = ModelDrafter(model, confidence=0.0)
    helped = CascadeDrafter(alone, DatastoreDrafter(partly_right(decode(model))))
    assert decode(target, alone) == decode(target, helped) == plain


# --- stores that change or break while a stream runs ---------------------------------------------


def stream(target, drafter, stats, between):
    """Decode block by block and call ``between`` after the third."""
    decoder = SpeculativeDecoder(target, drafter, config=SpeculationConfig(num_draft_tokens=3))
    ids: list[int] = []
    for number, block in enumerate(decoder.generate(PROMPT, GREEDY, stats=stats)):
        ids += block.token_ids
        if number == 3:
            between()
    return ids


def test_texts_added_in_mid_stream_are_drafted_from(target):
    """The next draft sees them; the answer stays."""
    plain = decode(target)
    store, stats = store_of(), DecodingStats()
    got = stream(target, DatastoreDrafter(store), stats, lambda: store.add_ids([plain]))
    assert got == plain
    assert stats.drafters["datastore"].accepted >= 24
    assert stats.faults == ()


def test_texts_removed_in_mid_stream_are_not_drafted_from(target):
    """The draft after the removal holds nothing of them; the answer stays."""
    plain = decode(target)
    store, stats = TokenStore(lambda text: [*PROMPT[-3:], *plain]), DecodingStats()
    store.add(["the answer"])
    drafted: list[int] = []

    def remove():
        store.remove("the answer")
        drafted.append(stats.drafters["datastore"].drafted)

    assert stream(target, DatastoreDrafter(store), stats, remove) == plain
    assert stats.drafters["datastore"].drafted == drafted[0] > 0
    assert stats.faults == ()


@pytest.mark.parametrize("size", [0, 100, 5000], ids=["emptied", "cut", "grown"])
def test_a_file_spoiled_in_mid_stream_is_a_fault_and_the_answer_stays(target, tmp_path, size):
    """Somebody writes over the mapped file: decoding goes on without the drafter and says why."""
    plain = decode(target)
    path = tmp_path / "texts.rest"
    store_of([*PROMPT[-3:], *plain]).save(path)
    store, stats = TokenStore.open(path, encode), DecodingStats()
    got = stream(target, DatastoreDrafter(store), stats, lambda: os.truncate(path, size))
    assert got == plain
    (fault,) = stats.faults
    assert fault.startswith("drafter 'datastore' failed: RetrievalError: The token store")
    assert "changed in place" in fault
    assert stats.drafters["datastore"].accepted > 0


def test_a_store_saved_over_its_own_file_in_mid_stream_is_no_fault(target, tmp_path):
    """The proper way to change a file: the stream reads the old one to its end."""
    plain = decode(target)
    path = tmp_path / "texts.rest"
    store_of([*PROMPT[-3:], *plain]).save(path)
    store, stats = TokenStore.open(path, encode), DecodingStats()
    got = stream(target, DatastoreDrafter(store), stats, lambda: store_of([1, 2, 3]).save(path))
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
        while not stop.is_set():
            store.add_ids([random_ids(3000, seed=rounds), plain[rounds % 20 :]])
            store.remove([int(store.segments[0].keys[0])])
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
    assert rounds > 0


# --- learning ------------------------------------------------------------------------------------


def test_an_answer_is_learned_when_it_ends(target):
    """The second time the same answer is drafted whole; without a store to learn in, nothing is kept."""
    plain = decode(target)
    learning = DatastoreDrafter(store_of(), learned=store_of(max_tokens=1000), min_match=2)
    first, second, forgetful = DecodingStats(), DecodingStats(), DecodingStats()
    assert decode(target, learning, stats=first) == plain
    assert decode(target, learning, stats=second) == plain
    assert second.target_steps < first.target_steps / 2
    plain_store = DatastoreDrafter(store_of())
    for _ in range(2):
        decode(target, plain_store, stats=forgetful)
    assert forgetful.drafted == 0
    assert len(plain_store.store) == 0


def test_learning_is_bounded():
    """However many answers come, the learned store keeps to its limit and to the newest."""
    learned = store_of(max_tokens=100)
    drafter = DatastoreDrafter(store_of(), learned=learned)
    for i in range(40):
        session = drafter.start(DraftContext(prompt_ids=[1, 2]))
        session.observe(TokenBlock(tuple(range(1000 * i, 1000 * i + 15))))
        session.observe(TokenBlock(tuple(range(1000 * i + 15, 1000 * i + 30))))
        session.close()
        session.close()  # a second time changes nothing
        assert learned.num_tokens <= 100
    assert len(learned) == 3
    assert propose(learned, [39_010], 4).token_ids == (39_011, 39_012, 39_013, 39_014)


def test_a_store_may_learn_for_itself():
    """Given as both, it is read once and grows."""
    store = store_of([1, 2, 3], [1, 2, 4])
    drafter = DatastoreDrafter(store, learned=store)
    session = drafter.start(DraftContext(prompt_ids=[1, 2]))
    session.observe(TokenBlock((3, 9)))
    session.close()
    assert len(store) == 3
    assert propose(store, [3], learned=store).token_ids == (9,)


# --- trees ---------------------------------------------------------------------------------------


def test_the_tree_follows_the_counts():
    """Shares times trust in the match: the likeliest nodes, parents before their children."""
    store = store_of([1, 2, 3, 4], [9, 2, 3, 4, 5], [8, 2, 3, 6], [7, 2, 5])
    draft = propose(store, [0, 0, 2], 9)
    assert draft.token_ids == (3, 4, 5, 6, 5)
    assert draft.parents == (-1, 0, -1, 0, 1)
    assert draft.source == "datastore"


def test_a_longer_match_is_trusted_further():
    """One token known drafts little of a rare continuation; many drafts all of it."""
    text = list(range(40))
    store = store_of(text)
    assert len(propose(store, [5], 30, min_probability=0.2).token_ids) == 4
    assert len(propose(store, text[:6], 30, min_probability=0.2).token_ids) == 24


def test_a_chain_follows_the_most_frequent():
    """Without trees each node has one child, and the helper's draft is that chain."""
    store = store_of([1, 2, 3, 4], [9, 2, 3, 4, 5], [8, 2, 3, 6], [7, 2, 5])
    draft = propose(store, [0, 2], 9, tree=False)
    assert (draft.token_ids, draft.is_chain) == ((3, 4, 5), True)
    session = DatastoreDrafter(store).start(DraftContext(prompt_ids=[0]))
    assert session.propose_after([2], 2) == (3, 4)
    assert session.propose_after([2, 3], 9) == (4, 5)
    assert len(session.propose(9)) == 0


ROWS = st.lists(
    st.lists(st.sampled_from([1, 2, 3, SEPARATOR]), min_size=3, max_size=3), min_size=1, max_size=12
)


@given(ROWS, st.integers(1, 16), st.integers(1, 12))
def test_every_head_of_a_tree_is_the_best_tree_of_its_size(rows, length, budget):
    """Cut to any size, the nodes are the likeliest ones of the trie, and form a tree."""
    tokens, parents = best_tree(rows, length, budget, 0.0)
    ends = [next((i for i, t in enumerate(row) if t == SEPARATOR), len(row)) for row in rows]
    nodes: dict[tuple[int, ...], int] = {}
    for row, end in zip(rows, ends, strict=True):
        for depth in range(1, end + 1):
            nodes[tuple(row[:depth])] = nodes.get(tuple(row[:depth]), 0) + 1
    likely = {path: n / len(rows) * length / (length + len(path)) for path, n in nodes.items()}
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert len(set(paths)) == len(paths) == min(budget, len(likely))
    assert sorted((likely[p] for p in paths), reverse=True) == [likely[p] for p in paths]
    best = sorted(likely.values(), reverse=True)[: len(paths)]
    assert [likely[p] for p in paths] == pytest.approx(best)


@pytest.mark.parametrize("budget", [1, 2, 5, 64, 200])
def test_a_draft_keeps_to_the_budget(budget):
    """Never more tokens than asked for, nor than the drafter's own limit."""
    store = store_of(*([1, 2, i, *range(100, 300)] for i in range(5, 50)))
    draft = propose(store, [1, 2], budget, min_probability=1e-9)
    assert len(draft) == min(budget, 64)
    assert all(parent < i for i, parent in enumerate(draft.parents))


def test_nothing_known_or_no_budget_gives_an_empty_draft():
    """An empty store, an unknown context, no budget, a match that is too short: nothing, no error."""
    store = store_of([1, 2, 3])
    assert len(propose(store_of(), [1, 2])) == 0
    assert len(propose(store, [7, 8])) == 0
    assert len(propose(store, [])) == 0
    assert len(propose(store, [1, 2], 0)) == 0
    assert len(propose(store, [9, 2], min_match=2)) == 0
    assert propose(store, [1, 2], min_match=2).token_ids == (3,)


def test_drafts_depend_on_the_context_and_the_texts_only():
    """Sessions do not see one another; a store grown in parts drafts what one built at once drafts."""
    rows = [random_ids(30, seed=i % 9) + random_ids(20, seed=i) for i in range(40)]
    whole, grown = store_of(*rows), store_of()
    for row in rows:
        grown.add_ids([row])
    drafter = DatastoreDrafter(whole)
    other = drafter.start(DraftContext(prompt_ids=rows[0][:20]))
    other.observe(TokenBlock((1, 2, 3)))
    for seed in range(9):
        for length in (1, 3, 12):
            prompt = random_ids(30, seed=seed)[:length]
            draft = drafter.start(DraftContext(prompt_ids=prompt)).propose(12)
            assert len(draft) > 0
            assert draft == propose(whole, prompt, 12) == propose(grown, prompt, 12)


def test_the_context_is_the_prompt_and_what_was_committed():
    """A match may begin in the prompt and end in the answer."""
    store = store_of(list(range(50)))
    session = DatastoreDrafter(store, min_match=5).start(DraftContext(prompt_ids=[10, 11, 12]))
    assert len(session.propose(4)) == 0
    session.observe(TokenBlock((13, 14)))
    assert session.propose(4).token_ids == (15, 16, 17, 18)


# --- the face ------------------------------------------------------------------------------------


def test_the_drafter_meets_the_protocol():
    """The engine can hold it as a drafter, and the name is the statistics'."""
    drafter = DatastoreDrafter(store_of([1, 2, 3]), name="manuals")
    assert isinstance(drafter, Drafter)
    assert drafter.start(DraftContext(prompt_ids=[1])).propose(3).source == "manuals"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_match": 0}, r"min_match is 0, but must be in 1..16"),
        ({"min_match": 17}, r"min_match is 17"),
        ({"max_draft": 0}, r"max_draft is 0"),
        ({"max_rows": 0}, r"max_rows is 0"),
        ({"learned": TokenStore(lambda text: [1, 2])}, "different tokenizers"),
    ],
    ids=["short", "long", "draft", "rows", "learned"],
)
def test_options_out_of_their_range_are_refused(options, message):
    """The error names the value and the limit."""
    with pytest.raises(ConfigurationError, match=message):
        DatastoreDrafter(store_of(), **options)


def test_a_draft_from_a_megabyte_of_text_takes_under_a_third_of_a_millisecond():
    """250 000 tokens of Zipf's law; half of the look-ups, in processor time (0.06 ms measured alone)."""
    generator = np.random.default_rng(0)
    ids = np.minimum(generator.zipf(1.2, 250_000), 49_000)
    store = TokenStore(encode)
    store.add_ids(np.array_split(ids, 1000))
    drafter = DatastoreDrafter(store)
    took = []
    for place in generator.integers(20, 249_000, 300):
        session = drafter.start(DraftContext(prompt_ids=ids[place - 20 : place].tolist()))
        start = time.thread_time()
        session.propose(16)
        took.append(time.thread_time() - start)
    assert sorted(took)[len(took) // 2] < 0.0003
