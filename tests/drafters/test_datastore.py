"""The datastore drafter: its trees, its options, and what it learns."""

from __future__ import annotations

import time

import numpy as np
import pytest
from fakes_datastore import encode, ids_store, random_ids

from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.drafters.datastore import DatastoreDrafter
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import DraftContext, TokenBlock


def propose(store, prompt, budget=16, **options):
    return DatastoreDrafter(store, **options).start(DraftContext(prompt_ids=prompt)).propose(budget)


# --- trees ---------------------------------------------------------------------------------------


def test_the_tree_follows_the_counts():
    """Shares times trust in the match: the most likely nodes, parents before their children."""
    store = ids_store([1, 2, 3, 4], [9, 2, 3, 4, 5], [8, 2, 3, 6], [7, 2, 5])
    draft = propose(store, [0, 0, 2], 9)
    assert draft.token_ids == (3, 5, 4, 6, 5)
    assert draft.parents == (-1, -1, 0, 0, 2)
    one, two, three = 1 / 4, 1 / 4 * 2 / 5, 1 / 4 * 2 / 5 * 3 / 6  # trust at depth 1, 2, 3
    shares = (3 / 4 * one, 1 / 4 * one, 2 / 4 * two, 1 / 4 * two, 1 / 4 * three)
    assert draft.node_probs == pytest.approx(shares)
    assert draft.source == "datastore"


def test_a_longer_match_is_trusted_further():
    """One token known drafts little of a rare continuation; many drafts all of it."""
    text = list(range(40))
    store = ids_store(text)
    assert len(propose(store, [5], 30, min_probability=0.02).token_ids) == 4
    assert len(propose(store, text[:6], 30, min_probability=0.02).token_ids) == 18


def test_a_chain_follows_the_most_frequent():
    """Without trees each node has one child, and the helper's draft is that chain."""
    store = ids_store([1, 2, 3, 4], [9, 2, 3, 4, 5], [8, 2, 3, 6], [7, 2, 5])
    draft = propose(store, [0, 2], 9, tree=False)
    assert (draft.token_ids, draft.is_chain) == ((3, 4, 5), True)
    session = DatastoreDrafter(store).start(DraftContext(prompt_ids=[0]))
    assert session.propose_after([2], 2) == (3, 4)
    assert session.propose_after([2, 3], 9) == (4, 5)
    assert len(session.propose(9)) == 0
    for rows in (
        ([1, 9], [1, 4]),
        ([1, 4], [1, 9]),
    ):  # equal counts: not the order of the texts decides
        assert propose(ids_store(*rows), [1], tree=False).token_ids == (4,)


@pytest.mark.parametrize("budget", [1, 2, 5, 64, 200])
def test_a_draft_keeps_to_the_budget(budget):
    """Never more tokens than asked for, nor than the drafter's own limit."""
    store = ids_store(*([1, 2, i, *range(100, 300)] for i in range(5, 50)))
    draft = propose(store, [1, 2], budget, min_probability=1e-9)
    assert len(draft) == min(budget, 64)
    assert all(parent < i for i, parent in enumerate(draft.parents))


def test_nothing_known_or_no_budget_gives_an_empty_draft():
    """An empty store, an unknown context, no budget, a match that is too short: nothing, no error."""
    store = ids_store([1, 2, 3])
    assert len(propose(ids_store(), [1, 2])) == 0
    assert len(propose(store, [7, 8])) == 0
    assert len(propose(store, [])) == 0
    assert len(propose(store, [1, 2], 0)) == 0
    assert len(propose(store, [9, 2], min_match=2)) == 0
    assert propose(store, [1, 2], min_match=2).token_ids == (3,)


def test_drafts_depend_on_the_context_and_the_texts_only():
    """Sessions do not see one another; a store grown in parts drafts what one built at once drafts."""
    rows = [random_ids(30, seed=i % 9) + random_ids(20, seed=i) for i in range(40)]
    whole, grown = ids_store(*rows), ids_store()
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
    store = ids_store(list(range(50)))
    session = DatastoreDrafter(store, min_match=5).start(DraftContext(prompt_ids=[10, 11, 12]))
    assert len(session.propose(4)) == 0
    session.observe(TokenBlock((13, 14)))
    assert session.propose(4).token_ids == (15, 16, 17, 18)


# --- the face ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_match": 0}, r"min_match is 0, but must be in 1..16"),
        ({"min_match": 17}, r"min_match is 17"),
        ({"max_draft": 0}, r"max_draft is 0"),
        ({"max_rows": 0}, r"max_rows is 0"),
        ({"min_probability": 1.5}, r"min_probability is 1.5, but must be in 0..1"),
    ],
    ids=["short", "long", "draft", "rows", "probability"],
)
def test_options_out_of_their_range_are_refused(options, message):
    """The error names the value and the limit."""
    with pytest.raises(ConfigurationError, match=message):
        DatastoreDrafter(ids_store(), **options)


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
