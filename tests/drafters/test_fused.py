"""Fusion: drafts become one tree, nodes go to the most likely paths, and probabilities are calibrated."""

from __future__ import annotations

import time

import fakes
import pytest
import torch
from fakes import ScriptedDrafter

from rasd_integrations.drafters.fused import FusedDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock

CONTEXT = DraftContext(prompt_ids=(1, 2, 3))


def says(*drafts: Draft) -> ScriptedDrafter:
    """Propose ``drafts`` one after the other, the last one for ever."""
    turns = iter(drafts)
    last = drafts[-1]
    return ScriptedDrafter(lambda answer, budget: next(turns, last))


def paths(draft: Draft) -> set[tuple[int, ...]]:
    """Return the paths from the root to each node."""
    spelled: list[tuple[int, ...]] = []
    for token, parent in zip(draft.token_ids, draft.parents, strict=True):
        spelled.append((*(spelled[parent] if parent >= 0 else ()), token))
    return set(spelled)


def test_common_prefixes_are_stored_once():
    """Two chains that agree on two tokens become a tree with one stem."""
    one = Draft((5, 6, 7), node_probs=(0.9, 0.8, 0.7), source="a")
    two = Draft((5, 6, 8, 9), node_probs=(0.9, 0.8, 0.6, 0.5), source="b")
    draft = FusedDrafter([says(one), says(two)]).start(CONTEXT).propose(16)
    assert paths(draft) == {(5,), (5, 6), (5, 6, 7), (5, 6, 8), (5, 6, 8, 9)}
    assert len(draft) == 5
    assert set(draft.sources) == {"a", "b"}


def test_nodes_go_to_the_most_likely_paths():
    """The budget takes the best nodes of both, parents first."""
    one = Draft((5, 6), node_probs=(0.9, 0.1), source="a")
    two = Draft((7, 8), node_probs=(0.5, 0.4), source="b")
    session = FusedDrafter([says(one), says(two)]).start(CONTEXT)
    draft = session.propose(3)
    assert paths(draft) == {(5,), (7,), (7, 8)}
    assert draft.parents == (-1, -1, 1)
    assert draft.sources == ("a", "b", "b")
    assert list(draft.node_probs) == sorted(draft.node_probs, reverse=True)
    sure = says(Draft((5, 6, 7), node_probs=(1.0, 1.0, 1.0)))
    assert FusedDrafter([sure]).start(CONTEXT).propose(2).parents == (-1, 0)


@pytest.mark.parametrize(
    ("probs", "asked"),
    [((0.9, 0.8, 0.7, 0.6), 0), ((0.9, 0.8, 0.7, 0.59), 1), ((0.9, 0.8, 0.7), 1), ((), 1)],
)
def test_a_sure_draft_needs_no_further_part(probs, asked):
    """Four tokens of at least 0.6 each; parts after it are not asked, and lose nothing by it."""
    first = says(Draft(tuple(range(5, 5 + len(probs))), node_probs=probs, source="a"))
    calls = []

    def second(answer, budget):
        calls.append(budget)
        return Draft((9,), node_probs=(0.5,), source="b")

    session = FusedDrafter([first, ScriptedDrafter(second)]).start(CONTEXT)
    draft = session.propose(8)
    assert (len(calls), len(draft)) == (asked, len(probs) + asked)
    session.observe(TokenBlock((5, 6, 7, 1)))
    assert session._parts[1].allowance.balance > 0


def test_an_unrated_draft_counts_less_with_depth():
    """Chains of scripted drafters take part, too."""
    draft = FusedDrafter([says(Draft((5, 6, 7), source="a"))]).start(CONTEXT).propose(2)
    assert draft.token_ids == (5, 6)
    assert draft.node_probs[0] > draft.node_probs[1] > 0


@pytest.mark.parametrize("carried", [False, True], ids=["same answer", "next answer"])
@pytest.mark.parametrize(("said", "said_wrong"), [(0.3, 0.95), (0.1, 0.5)])
def test_a_part_that_promises_too_much_is_found_out(said, said_wrong, carried):
    """It loses its node to a modest one that is right, though that was never verified; the next answer knows it."""
    wrong = says(Draft((50,), node_probs=(said_wrong,), source="wrong"))
    right = ScriptedDrafter(
        lambda answer, budget: Draft((len(answer) + 10,), node_probs=(said,), source="right")
    )
    drafter = FusedDrafter([wrong, right])
    session = drafter.start(CONTEXT)
    seen = []
    for step in range(20):
        seen.append(session.propose(1).sources)
        time.sleep(0.002)  # the target's step, beside which both parts cost nothing
        session.observe(TokenBlock((step + 10,)))
    assert seen[0] == ("wrong",)
    if carried:
        session.close()
        session = drafter.start(CONTEXT)
    assert session.propose(1).sources == ("right",)


def test_nodes_after_the_committed_tokens_are_not_counted():
    """A long right draft of which only the first token was committed is calibrated by that token alone."""
    answer = list(range(10, 60))
    session = FusedDrafter([ScriptedDrafter(fakes.oracle(answer))]).start(CONTEXT)
    for token in answer[:20]:
        session.propose(8)
        session.observe(TokenBlock((token,)))
    node_probs = session.propose(8).node_probs
    assert node_probs[0] > 0.8
    assert node_probs[7] == pytest.approx(node_probs[0] ** 8)


def test_a_part_that_does_not_pay_is_paused():
    """A slow drafter that is always wrong is asked seldom; a quick one is always asked."""
    calls = {"slow": 0, "quick": 0}

    def slow(answer: list[int], budget: int) -> Draft:
        calls["slow"] += 1
        time.sleep(0.004)
        return Draft((50,), source="slow")

    def quick(answer: list[int], budget: int) -> Draft:
        calls["quick"] += 1
        return Draft((51,), source="quick")

    session = FusedDrafter([ScriptedDrafter(slow), ScriptedDrafter(quick)]).start(CONTEXT)
    for token in range(60):
        session.propose(4)
        time.sleep(0.008)  # the target's step
        session.observe(TokenBlock((token,)))
    assert calls["quick"] == 60
    assert 3 <= calls["slow"] <= 12
    for token in range(100):  # drafting is off, yet the pause ends
        session.observe(TokenBlock((token,)))
    before = calls["slow"]
    session.propose(4)
    assert calls["slow"] == before + 1


class Modelled:
    """A drafter of one chain with logits."""

    name = "model"

    def __init__(self, token_ids: tuple[int, ...], logits: torch.Tensor) -> None:
        self.token_ids, self.logits = token_ids, logits
        self.contexts: list[DraftContext] = []

    def start(self, context: DraftContext) -> fakes.ScriptedSession:
        self.contexts.append(context)
        draft = Draft(self.token_ids, logits=self.logits, source="model")
        return fakes.ScriptedSession(lambda answer, budget: draft, context)


def logits(*favourites: tuple[int, ...]) -> torch.Tensor:
    """Return rows whose most likely tokens are these, the first one most."""
    rows = torch.zeros(len(favourites), 100)
    for row, tokens in enumerate(favourites):
        for rank, token in enumerate(tokens):
            rows[row, token] = 12.0 - rank
    return rows


def test_retrieved_branches_that_the_model_does_not_expect_are_pruned():
    """RASD: a continuation stays only if its first token is among the model's top k."""
    model = Modelled((5,), logits((5, 6)))
    parts = [
        says(Draft((6, 7), node_probs=(0.9, 0.9), source="kept")),
        says(Draft((8, 9), node_probs=(0.9, 0.9), source="pruned")),
    ]
    draft = FusedDrafter(parts, model, top_k=2, siblings=0).start(CONTEXT).propose(16)
    assert paths(draft) == {(5,), (6,), (6, 7)}
    free = FusedDrafter(parts, model, top_k=0, siblings=0).start(CONTEXT).propose(16)
    assert (8, 9) in paths(free)


def test_the_model_s_next_most_likely_tokens_stand_beside_its_chain():
    """Each token of the chain has its siblings."""
    model = Modelled((5, 6), logits((5, 15), (6, 16)))
    draft = FusedDrafter([], model, siblings=1).start(CONTEXT).propose(16)
    assert paths(draft) == {(5,), (15,), (5, 6), (5, 16)}


def test_the_model_drafts_greedily_under_any_distribution():
    """A sampled chain has no place in a deterministic tree."""
    model = Modelled((5,), logits((5,)))
    FusedDrafter([], model).start(DraftContext(prompt_ids=(1,), temperature=0.8)).propose(2)
    assert model.contexts[0].temperature == 0


def test_all_parts_are_closed_even_if_one_fails():
    """The first error is raised when everything is closed."""
    good = says(Draft())
    session = FusedDrafter([good, good]).start(CONTEXT)

    def fail() -> None:
        msg = "no"
        raise OSError(msg)

    good.sessions[1].close = fail
    with pytest.raises(OSError, match="no"):
        session.close()
    assert good.sessions[0].closed


def test_nothing_to_fuse_is_refused():
    """Parts and numbers are checked."""
    with pytest.raises(ConfigurationError, match="at least one part"):
        FusedDrafter([])
    with pytest.raises(ConfigurationError, match="top_k is -1"):
        FusedDrafter([SuffixDrafter()], top_k=-1)
    with pytest.raises(ConfigurationError, match=r"object \(not a class\)"):
        FusedDrafter([SuffixDrafter])
