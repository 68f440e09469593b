"""Malformed drafts: the drafter is given up with a warning that says why, and the answer goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import ScriptedDrafter
from tiny import VOCAB, tiny_llama

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.decoding.drafts import checked
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft

IDS = (1, 2, 3)
ROWS = torch.full((3, VOCAB), 1 / VOCAB)
PROMPT = [5, 6, 7, 8, 9]

MALFORMED = [
    (None, "returned a NoneType"),
    ([1, 2], "returned a list"),
    (Draft(IDS, parents=(-1, 0)), "parents has 2 entries for a draft of 3"),
    (Draft(IDS, parents=(1, -1, 0)), r"parents\[0\] is 1"),
    (Draft(IDS, parents=(-1, 0, -2)), r"parents\[2\] is -2"),
    (Draft(IDS, parents=(-1, 0, 2)), r"parents\[2\] is 2"),
    (Draft(IDS, parents=(-1, 0, 0.5)), "parents is .*integers"),
    (Draft((1, 2.5, 3)), "token_ids is .*integers"),
    (Draft((1, None, 3)), "token_ids is .*integers"),
    (Draft("abc"), "token_ids is 'abc'"),
    (Draft(IDS, node_probs=(0.5, 0.5)), "node_probs has 2 entries"),
    (Draft(IDS, node_probs=(0.5, float("nan"), 0.1)), "node_probs holds nan"),
    (Draft(IDS, node_probs=(0.5, "much", 0.1)), "node_probs holds 'much'"),
    (Draft(IDS, probs=ROWS.numpy()), "probs is a ndarray"),
    (Draft(IDS, probs=ROWS.long()), "probs is a torch.int64"),
    (Draft(IDS, probs=ROWS[:2]), r"probs has shape \(2, 259\), but must have \(3, 259\)"),
    (Draft(IDS, probs=ROWS[:, :-1]), r"probs has shape \(3, 258\)"),
    (Draft(IDS, probs=ROWS[0]), r"probs has shape \(259,\)"),
    (Draft(IDS, parents=(-1, -1, 0), probs=ROWS), "must be a chain"),
    (Draft(IDS, logits=ROWS[:2]), r"logits has shape \(2, 259\)"),
    (Draft(IDS, source=["s"]), r"source is \['s'\]"),
    (Draft(IDS, sources=("a", "b")), "sources has 2 entries"),
    (Draft(IDS, sources=("a", "b", 3)), "source is 3"),
]


def decode(target, drafter=None, stats=None, **sampling):
    config = SpeculationConfig(num_draft_tokens=4, max_draft_tokens=64)
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=7, **sampling)
    blocks = SpeculativeDecoder(target, drafter, config=config).generate(
        PROMPT, params, stats=stats
    )
    return [t for block in blocks for t in block.token_ids]


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel(tiny_llama())


@pytest.mark.parametrize(("draft", "said"), MALFORMED)
def test_a_malformed_draft_is_what_a_failing_drafter_is(target, draft, said, caplog):
    """Fault 29: the drafter is given up, the answer is that of plain decoding, greedy; sampled it is whole."""
    truth, stats = decode(target), DecodingStats()
    drafter = ScriptedDrafter(lambda answer, budget: draft)
    assert decode(target, drafter, stats) == truth
    assert drafter.sessions[0].closed
    (fault,) = stats.faults
    assert fault == stats.off_reason
    assert fault.startswith("drafter 'scripted' failed: DecodingError: ")
    assert ["decoding goes on without it" in r.message for r in caplog.records] == [True]
    with pytest.raises(Exception, match=said):
        checked(draft, 4, VOCAB)
    assert len(decode(target, drafter, temperature=0.9)) == 12


def test_whole_numbers_of_other_libraries_are_ids(target):
    """NumPy's integers come out of arrays; they become plain ones, and ids the target does not know end a draft."""
    draft = Draft(
        tuple(np.arange(3)), parents=tuple(np.array([-1, 0, 1])), node_probs=(1.0, 0.5, 0)
    )
    taken = checked(draft, 2, VOCAB)
    assert (taken.token_ids, taken.parents, taken.node_probs) == ((0, 1), (-1, 0), (1.0, 0.5))
    assert {*map(type, taken.token_ids)} == {int}
    assert checked(Draft((1, VOCAB, 2)), 3, VOCAB).token_ids == (1,)
    assert checked(Draft((1, -1, 2)), 3, VOCAB).token_ids == (1,)
    truth = decode(target)
    right = lambda answer, budget: Draft(tuple(np.array(truth[len(answer) :], int)))  # noqa: E731
    stats = DecodingStats()
    answer = decode(target, ScriptedDrafter(right), stats)
    assert answer == truth
    assert {*map(type, answer)} == {int}
    assert stats.accepted > 0
