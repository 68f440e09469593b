"""The datastore's benchmarks: replayed answers, and that the figures of the table are made."""

from __future__ import annotations

import json

import datastore
import datastore_steps
import pytest
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.drafters.datastore import DatastoreDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.types import Draft

ANSWER = list(range(10, 50))


def test_what_is_accepted_of_a_draft_is_its_path_along_the_answer():
    """Chains and trees are walked as the verifier walks them."""
    tree = Draft((1, 5, 2, 6), (-1, -1, 0, 1))
    cases = [
        (Draft((1, 2, 3)), (1, 2, 9), 2),
        (Draft((1, 2, 3)), (9,), 0),
        (tree, (5, 6, 7), 2),
        (tree, (1, 6), 1),
        (Draft(), (1,), 0),
    ]
    for draft, following, accepted in cases:
        assert datastore_steps.accepted(draft, following) == accepted


def test_a_replay_counts_the_steps_of_a_decoding():
    """A store of the answer takes 16 drafted tokens and one more a step; an empty one takes 40 steps."""
    store = TokenStore(lambda text: list(text.encode()))
    assert datastore_steps.replay(DatastoreDrafter(store), [9], ANSWER, 16) == 40
    store.add_ids([[9, *ANSWER]])
    assert datastore_steps.replay(DatastoreDrafter(store), [9], ANSWER, 16) == 3
    either = datastore_steps.Either(SuffixDrafter(min_match=2), DatastoreDrafter(store))
    assert datastore_steps.replay(either, [9], ANSWER, 16) == 3


@pytest.mark.slow
def test_the_tables_have_every_figure(tmp_path):
    """A small store goes through all that is measured."""
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_llama().config.save_pretrained(tmp_path / "model")
    path = tmp_path / "texts.rest"
    cost = datastore.build(path, 0.02, str(tmp_path / "model"), None)
    cost |= datastore.use(path, 20, str(tmp_path / "model"), None)
    document = json.loads(json.dumps({"costs": [cost]}))
    lines = datastore.table(document).splitlines()
    assert len(lines) == len(datastore.ROWS) + 1
    assert cost["tokens"] >= 20_000
    assert cost["copied_nodes"] > 1
    figures = {"datastore": {"scientific_qa": {4: 1.25, 8: 1.5, 16: 2.0}}}
    assert "1.25 1.50 2.00" in datastore_steps.table(figures)
