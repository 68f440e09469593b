"""The dense drafter: its trees, the rows that it reads, and that no draft of its changes an answer."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from drafting import decode as decoded
from drafting import random_ids
from tiny import FAMILIES, VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.datastores.hidden import DenseStore
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.papers.dense import DenseDrafter
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.errors import ConfigurationError, RetrievalError
from rasd_integrations.runtime.models import SharedModel
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import DraftContext, TokenBlock

NUM_TOKENS = 40
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(
    temperature=0.9, top_p=0.95, seed=11, max_tokens=NUM_TOKENS, ignore_eos=True
)


PROMPT = random_ids(60, seed=19)  # every family has something to say to it


@cache
def model(family: str = "llama") -> SharedModel:
    return SharedModel(FAMILIES[family](), tiny_tokenizer(), f"tiny {family}")


def decode(shared, drafter=None, params=GREEDY, n=8, *, prompt=PROMPT, **how):
    return decoded(shared.target, drafter, params, n, ids=prompt, **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


def store_of(folder, shared, name, *rows) -> DenseStore:
    return DenseStore.build(rows, shared, folder / name)


def partly_right_store(folder, family, truth, name) -> DenseStore:
    """Return a store of sequences that leave the answer now and then, and of others."""
    rows = [random_ids(400, seed=8), [*PROMPT, *truth[:20]]]
    for start, every in ((1, 7), (3, 5)):
        spoiled = [(t + start) % 256 if i % every == 4 else t for i, t in enumerate(truth)]
        rows.append([*PROMPT, *spoiled])
    return store_of(folder, model(family), f"{family} {name}", *rows)


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [True, False], ids=["tree", "chain"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("family", "n"), [("llama", 1), ("llama", 5), ("gemma3", 16)])
def test_ids_equal_plain_decoding(folder, family, n, params, tree):
    """Greedy or drawn with a seed, the answer is that without drafts; some drafts stand, some fall."""
    plain = decode(model(family), params=params)
    assert len(set(plain)) > 3
    store = partly_right_store(folder, family, plain, params.temperature)
    stats = DecodingStats()
    drafter = DenseDrafter(store, tree=tree)
    assert decode(model(family), drafter, params, n, stats=stats) == plain
    counts = stats.as_dict()["drafters"]["dense"]
    assert 0 < counts["accepted"] < counts["drafted"]
    assert stats.faults == ()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_store_that_holds_the_answer_is_accepted_whole(folder, family):
    """The target thinks there what it thinks now, so blocks are full: 40 tokens in 5 steps."""
    plain = decode(model(family))
    store = store_of(
        folder, model(family), f"oracle {family}", [*PROMPT, *plain], random_ids(300, 4)
    )
    stats = DecodingStats()
    # Of other places with the same token the oracle's own agrees best.
    drafter = DenseDrafter(store, neighbours=1)
    assert decode(model(family), drafter, stats=stats) == plain
    assert stats.target_steps <= 6  # the first draft may come from the prompt's last tokens
    assert stats.acceptance_rate > 0.9


def test_a_text_that_repeats_itself_is_drafted_right():
    """Once the answer goes in circles, drafts of 8 from its own rounds are accepted whole."""
    looping = tiny_llama(5)
    for name, weight in looping.named_parameters():
        if "self_attn" in name:
            weight.mul_(0.3)
    shared, params = (
        SharedModel(looping, tiny_tokenizer(), "looping"),
        replace(GREEDY, max_tokens=90),
    )
    plain = decode(shared, params=params, prompt=random_ids(20, 1))
    assert plain[-60:] == plain[-4:] * 15
    assert len(set(plain[-4:])) == 4
    config = SpeculationConfig(num_draft_tokens=8)
    decoder = SpeculativeDecoder(shared.target, DenseDrafter(), config=config)
    blocks = [b.token_ids for b in decoder.generate(random_ids(20, 1), params) if b.token_ids]
    assert [token for block in blocks for token in block] == plain
    assert [len(block) for block in blocks[-6:-1]] == [9] * 5


def test_ids_of_another_vocabulary_are_refused(folder):
    """A store cannot be built of ids that the model does not know."""
    with pytest.raises(ConfigurationError, match=r"outside 0\.\.258"):
        store_of(folder, model(), "foreign", [1, 2, 3, VOCAB])


# --- the rows that are read ----------------------------------------------------------------------


def test_rows_that_nobody_asked_for_are_not_drafted_from():
    """A prefix that was run for another drafter has no states; the draft comes from later rows."""
    shared, kept = model(), PrefixCache(1 << 22)
    plain = decode(shared, cache=kept)
    stats = DecodingStats()
    assert decode(shared, DenseDrafter(), cache=kept, stats=stats) == plain
    assert stats.cached_prompt_tokens == len(PROMPT) - 1
    assert stats.faults == ()


# --- drafts --------------------------------------------------------------------------------------


def session_over(states, ids, **options):
    """Return a session whose rows are the given states, one for each token but the last."""
    rows = torch.tensor(states, dtype=torch.float32)
    buffer = KVBuffer(len(ids), keeps_hidden=True)
    buffer.write_hidden(rows)
    buffer.length = len(rows)
    session = DenseDrafter(**options).start(DraftContext(prompt_ids=ids))
    session._buffer = buffer
    return session


A, B, C = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.8, 0.0]


def test_the_most_similar_place_with_the_same_token_is_followed():
    """Place 0 and 3 gave token 7, the one before the last; place 3 is like the present one."""
    ids = [1, 7, 10, 2, 7, 20, 21, 3, 7]
    states = [A, A, A, C, A, A, A, B]  # the last one gave the last 7
    draft = session_over(states, ids, neighbours=1).propose(3)
    assert draft.token_ids == (20, 21, 3)
    assert draft.node_probs == pytest.approx((0.64, 0.64**2, 0.64**3))
    both = session_over(states, ids, min_probability=0.0).propose(5)
    assert both.token_ids[0] == 20
    assert both.source == "dense"


def test_only_places_that_gave_the_same_token_count():
    """A place that is like the present one but went on otherwise is no evidence."""
    ids = [1, 8, 10, 2, 7]
    assert len(session_over([B, A, A, B], ids).propose(4)) == 0


def test_equal_places_are_taken_in_order():
    """Of places that agree alike, the first ones are drafted from; nothing depends on chance."""
    ids = [*(token for i in range(6) for token in (7, 20 + i)), 7]
    draft = session_over([B] * 12, ids, neighbours=2).propose(2)
    assert draft.token_ids == (21, 22)  # no row gave the first token of all
    assert draft.parents == (-1, -1)


def test_places_grow_with_the_answer():
    """What was committed is drafted from as soon as something follows it."""
    session = session_over([A, A], [1, 2, 3])
    assert len(session.propose(4)) == 0
    session.observe(TokenBlock((3, 3)))
    session._buffer.write_hidden(torch.tensor([A, A]))
    session._buffer.length = 4
    # 1 2 3 3 3: the second 3 has a follower.
    assert session.propose(4).token_ids[0] == 3


def test_nothing_known_or_no_budget_gives_an_empty_draft():
    """Without hidden states, places or a budget there is no draft and no error."""
    context = DraftContext(prompt_ids=[1, 2, 1, 2])
    assert len(DenseDrafter().start(context).propose(4)) == 0
    session = session_over([A] * 3, [1, 2, 1, 2])
    assert len(session.propose(0)) == 0
    assert session.propose(1).token_ids == (1,)
    assert len(session_over([A], [5]).propose(4)) == 0
    session.close()
    assert len(session.propose(4)) == 0


@pytest.mark.parametrize("budget", [1, 5, 64, 200])
def test_a_draft_keeps_to_the_budget(budget):
    """Never more tokens than asked for, nor than the drafter's own limit."""
    ids = [*(token for i in range(30) for token in (7, 100 + i)), 7]
    draft = session_over([A] * 60, ids, neighbours=30, min_probability=0.0).propose(budget)
    assert len(draft) == min(budget, 64)


def test_a_chain_has_one_child_a_node():
    """Without trees the draft is the most likely path."""
    ids = [7, 20, 7, 20, 7, 21, 7]
    draft = session_over([A] * 6, ids, tree=False).propose(4)
    assert draft.is_chain
    assert draft.token_ids[:2] == (20, 7)


# --- stores that are wrong or break while a stream runs ------------------------------------------


def test_a_store_of_another_width_is_a_fault_and_the_answer_stays(folder):
    """The fault names both widths; decoding goes on without the drafter."""
    other = SharedModel(tiny_gpt2(), tiny_tokenizer(), "tiny gpt2")
    store = store_of(folder, other, "gpt2", PROMPT)
    stats = DecodingStats()
    assert decode(model(), DenseDrafter(store), stats=stats) == decode(model())
    (fault,) = stats.faults
    assert "RetrievalError" in fault
    assert "width 32, but the target's are 48 wide" in fault


@pytest.mark.parametrize("size", [0, 3000, 1 << 20], ids=["emptied", "cut", "grown"])
def test_a_file_spoiled_in_mid_stream_is_a_fault_and_the_answer_stays(tmp_path, size):
    """Somebody writes over the mapped file: decoding goes on without the drafter and says why."""
    plain = decode(model())
    store = store_of(tmp_path, model(), "spoiled", [*PROMPT, *plain])
    config = SpeculationConfig(num_draft_tokens=3)
    decoder = SpeculativeDecoder(model().target, DenseDrafter(store), config=config)
    stats, ids = DecodingStats(), []
    for number, block in enumerate(decoder.generate(PROMPT, GREEDY, stats=stats)):
        ids += block.token_ids
        if number == 3:
            os.truncate(store.path, size)
    assert ids == plain
    (fault,) = stats.faults
    assert "changed in place" in fault
    assert stats.drafters["dense"].accepted > 0


@pytest.mark.parametrize("seed", range(6))
def test_an_unchecked_file_with_wrong_content_changes_no_answer(tmp_path, seed):
    """Opened without its checksum, a damaged store drafts nonsense or fails; the answer stays."""
    plain = decode(model())
    path = store_of(tmp_path, model(), "damaged", [*PROMPT, *plain], random_ids(300, 4)).path
    data = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(data[:8], "little")
    noise = torch.randint(
        0, 256, (len(data) - head,), generator=torch.Generator().manual_seed(seed)
    )
    for place in range(head + seed, len(data), 3 + 40 * seed):
        data[place] = int(noise[place - head])
    path.write_bytes(bytes(data))
    damaged = DenseStore.open(path.parent, model(), verify=False)
    assert decode(model(), DenseDrafter(damaged, min_probability=0.0)) == plain


# --- the protocol --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": 0}, r"neighbours is 0, but must be in 1\.\.1024"),
        ({"max_draft": 2000}, r"max_draft is 2000, but must be in 1\.\.1024"),
        ({"min_probability": 1.5}, r"min_probability is 1\.5, but must be in 0\.\.1"),
        ({"prompt": False}, "nothing to draft from"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    """Each error names the value and its limit."""
    with pytest.raises(ConfigurationError, match=message):
        DenseDrafter(**options)


def test_a_store_asked_with_another_width_says_so(folder):
    """The library's own error, not numpy's."""
    store = store_of(folder, model(), "asked", PROMPT)
    with pytest.raises(RetrievalError, match=r"of width 48, but was asked with \(5,\)"):
        store.find(torch.zeros(5).numpy(), 1, 3, 3)


def test_a_store_is_asked_where_the_prompt_has_nothing(folder):
    """Given both, the draft is made of both; without the prompt, of the store alone."""
    shared = model()
    store = store_of(folder, shared, "both", [*PROMPT, *decode(shared)])
    stats = DecodingStats()
    decode(shared, DenseDrafter(store, prompt=False), stats=stats)
    assert stats.acceptance_rate > 0.9
    assert stats.drafters["dense"].accepted > 30
