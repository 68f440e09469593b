"""Drafts from a part of the target's own rows: the target's ids whatever is left out, its rows untouched."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from drafting import decode, filled, random_ids
from tiny import FAMILIES, tiny_llama

from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.papers import sparse_kv
from rasd_integrations.drafters.papers.gathered_kv import GatheredKV
from rasd_integrations.drafters.papers.sparse_kv import SparseKVDrafter, find_pieces
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import DraftContext, TokenBlock

SMALL = {"max_rows": 48, "sink": 4, "window": 8, "confidence": 0.0}
PATTERNS = ["chunks", "window", "power"]


PROMPT = random_ids(160, seed=1)
CHUNKS = [PROMPT[100:120], PROMPT[40:52]]


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel(tiny_llama())


def context(**changes: object) -> DraftContext:
    return DraftContext(**{"prompt_ids": PROMPT, "chunk_ids": CHUNKS, **changes})


plainly = partial(decode, ids=PROMPT, context=context())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_rows_draft_the_targets_own_tokens(family, monkeypatch):
    """Over a gathered buffer of all rows every draft is accepted whole, across a new choice of rows too."""
    monkeypatch.setattr(sparse_kv, "_FRESH", 16)
    target = TargetModel(FAMILIES[family]())
    target.eos_ids = frozenset()  # a draft ends at an end token, and random models write some
    drafter = SparseKVDrafter("window", max_rows=250, sink=0, confidence=0.0)
    everything = sparse_kv._Layout([(0, 0)], 250, 250, power=False)
    monkeypatch.setattr(drafter, "_layout", lambda _: everything)
    stats = DecodingStats()
    plainly(target, drafter, n=7, stats=stats)
    assert stats.acceptance_rate == 1.0
    assert stats.target_steps == 4


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_draft_is_that_of_freshly_gathered_rows(family, pattern):
    """After blocks that contradict the drafts, the draft is that of rows gathered from a new prefill."""
    target = TargetModel(FAMILIES[family]())
    drafter = SparseKVDrafter(pattern, **SMALL)
    session = drafter.start(context())
    live = filled(target, PROMPT[:-1])
    session.attach(target, live)
    ids = list(PROMPT)
    for seed, size in enumerate((1, 4, 9)):
        session.propose(5)
        block = random_ids(size, seed + 20)
        target.step([ids[-1], *block[:-1]], live)
        live.commit(range(size))
        ids += block
        session.observe(TokenBlock(tuple(block)))
    first = drafter.start(context())._layout.rows(len(PROMPT) - 1)
    rows = GatheredKV(filled(target, ids[:-1]), [*first, *range(len(PROMPT) - 1, len(ids) - 1)], 64)
    expected: list[int] = []
    for _ in range(6):
        last = expected[-1:] or ids[-1:]
        logits = target.step(last, rows)
        rows.commit([0])
        expected.append(int(logits[0].argmax()))
    assert list(session.propose(6).token_ids) == expected


def test_rows_are_chosen_anew_as_the_answer_grows(target, monkeypatch):
    """Memory stays constant: never more than the chosen rows, the fresh ones and one draft."""
    monkeypatch.setattr(sparse_kv, "_FRESH", 8)
    drafter = SparseKVDrafter("window", max_rows=24, sink=4, confidence=0.0)
    session = drafter.start(context())
    ids = [*PROMPT, *random_ids(60, 5)]
    live = filled(target, PROMPT[:-1])
    session.attach(target, live)
    for at in range(len(PROMPT), len(ids), 3):
        session.propose(5)
        assert session._rows.length <= 24 + 8 + 5
        assert session._rows.next_position >= at
        target.step(ids[at - 1 : at + 2], live)
        live.commit(range(3))
        session.observe(TokenBlock(tuple(ids[at : at + 3])))
    held = session._rows.positions(0, 24, torch.device("cpu")).tolist()
    assert held[:4] == [0, 1, 2, 3]
    assert held[4] > len(PROMPT)


def test_chunks_of_the_prompt_are_found():
    """Whole chunks, chunks whose border tokens merged, and chunks in pieces; with two tokens around."""
    prompt = list(range(1000, 1100))
    whole, merged = prompt[20:40], [7, *prompt[51:69], 7]
    pieces = [*prompt[70:80], 5, 5, *prompt[85:95]]
    assert find_pieces(prompt, [whole, merged, pieces]) == [(18, 42), (49, 71), (68, 82), (83, 97)]
    assert find_pieces(prompt, [prompt[:10], prompt[-9:]]) == [(0, 12), (89, 100)]
    assert find_pieces(prompt, [[1, 2, 3], prompt[20:25], []]) == []


def test_a_pattern_takes_its_rows_best_first():
    """Sink, window and end of the prompt first, then chunks in order until the room is full."""
    prompt = list(range(1000, 1200))
    chunks = [prompt[100:120], prompt[40:60]]
    drafter = SparseKVDrafter("chunks", max_rows=42, sink=3, window=5)
    layout = drafter.start(context(prompt_ids=prompt, chunk_ids=chunks))._layout
    assert layout.rows(200) == [0, 1, 2, *range(38, 48), *range(98, 122), *range(195, 200)]
    # With the answer's last rows there is less room for the second chunk.
    assert layout.rows(220) == [
        0, 1, 2, *range(38, 43), *range(98, 122), *range(195, 200), *range(215, 220),
    ]  # fmt: skip


def test_powers_of_two_are_blocks_before_the_window():
    """The rows that the last ones see at distances 8, 16, 32, ..., in equal shares."""
    drafter = SparseKVDrafter("power", max_rows=22, sink=2, window=5)
    layout = drafter.start(context())._layout
    near = [*range(149, 152), *range(141, 144), *range(125, 128), *range(93, 96), *range(29, 32)]
    assert layout.rows(160) == [0, 1, *sorted(near), *range(155, 160)]


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {"prompt_ids": PROMPT[30:70]}),
        ({"pattern": "window", "window": 44}, {"prompt_ids": PROMPT[:94]}),
        ({}, {"chunk_ids": []}),
        ({}, {"chunk_ids": [random_ids(30, 9)]}),
        ({"max_rows": 90}, {"chunk_ids": [PROMPT[20:110]]}),
    ],
    ids=["short", "short-window", "no-chunks", "foreign-chunks", "nothing-left-out"],
)
def test_silence_without_cost(target, options, changes):
    """Where little would be left out nothing is gathered, and the helper's drafts are free."""
    drafter = SparseKVDrafter(**{**SMALL, **options})
    steps = []
    for each in (drafter, CascadeDrafter(drafter, SuffixDrafter())):
        session = each.start(context(**changes))
        session.attach(target, filled(target, PROMPT[:-1]))
        steps.append((len(session.propose(5)), session.forwards, session._rows))
        session.close()
    assert steps[0] == (0, 0, None)
    assert steps[1][1:] == (0, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "middle"}, "pattern is 'middle', but must be one of"),
        ({"sink": -1}, "sink is -1, but must be at least 0"),
        ({"window": 0}, "window is 0, but must be at least 1"),
        ({"max_rows": 64}, "max_rows is 64, but must be at least sink \\+ window, 65"),
        ({"confidence": 1.5}, "confidence is 1.5, but must be in 0..1"),
    ],
)
def test_bad_options_are_refused(options, message):
    """The error names the option, its value and the limit."""
    with pytest.raises(ConfigurationError, match=message):
        SparseKVDrafter(**options)
