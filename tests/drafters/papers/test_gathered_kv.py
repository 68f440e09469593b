"""Gathered rows keep their positions; pinned buffers share memory and leave it as it was."""

from __future__ import annotations

import pytest
import torch
from drafting import filled, random_ids
from tiny import FAMILIES, tiny_llama

from rasd_integrations.drafters.papers.gathered_kv import GatheredKV
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel

IDS = random_ids(80, seed=1)
NEXT = [5, 9, 17, 31]


def positions(buffer: KVBuffer, end: int) -> list[int]:
    return buffer.positions(0, end, torch.device("cpu")).tolist()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_rows_gathered_continue_alike(family):
    """A gathered buffer of all rows gives the live one's logits, chain and tree."""
    target = TargetModel(FAMILIES[family]())
    live = filled(target, IDS)
    gathered = GatheredKV(live, range(80), 80)
    assert (gathered.length, gathered.next_position) == (80, 80)
    for parents in (None, [-1, -1, 1]):
        torch.testing.assert_close(
            target.step(NEXT, gathered, parents), target.step(NEXT, live, parents)
        )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_left_out_rows_are_masked_rows(family):
    """Over gathered rows a step says what the model says with the other keys masked out."""
    model = FAMILIES[family]()
    target = TargetModel(model)
    rows = [0, 1, 2, 40, 41, 42, 43, 70, 71, 79]
    got = target.step(NEXT, GatheredKV(filled(target, IDS), rows, 16))
    seen = torch.ones(84, 84, dtype=torch.bool).tril()
    seen[80:, :80] = False
    seen[80:, rows] = True
    mask = torch.zeros(84, 84).masked_fill(~seen, float("-inf"))
    stock = FAMILIES[family]()
    expected = stock(torch.tensor([[*IDS, *NEXT]]), attention_mask=mask[None, None]).logits[0, 80:]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
@pytest.mark.parametrize("n", [1, 4, 40], ids=["one", "few", "over-the-window"])
def test_sliding_layers_see_gathered_rows_by_position(family, n):
    """Layers with a window lose the rows that stand too far back, wherever they lie."""
    target = TargetModel(FAMILIES[family]())
    live = filled(target, IDS)
    ids = IDS[:n]
    near = [*range(2), *range(50, 80)]  # all that the windows of 16 and 24 reach, and a sink
    whole, part = GatheredKV(live, range(80), 80), GatheredKV(live, near, 64)
    layers = list(live._keys)[:-1] if family == "gemma3" else list(live._keys)
    target.step(ids, whole)
    target.step(ids, part)
    # Sliding layers come first, so what they hand on is the same; Gemma-3's last layer sees all rows.
    for layer in layers:
        for store in ("_keys", "_values"):
            torch.testing.assert_close(
                getattr(part, store)[layer][:, 32 : 32 + n],
                getattr(whole, store)[layer][:, 80 : 80 + n],
            )
    if family == "mistral":
        torch.testing.assert_close(target.step(ids, part), target.step(ids, live))


def test_gathered_rows_grow_from_the_live_ones():
    """Rows appended from the live buffer equal rows that were gathered at once."""
    target = TargetModel(tiny_llama())
    live = filled(target, IDS)
    early = GatheredKV(live.copy(60, 80), [0, 1, 30, 59], 8)
    assert early.next_position == 60
    early.extend(live, 60, 80)
    late = GatheredKV(live, [0, 1, 30, 59, *range(60, 80)], 32)
    assert (early.length, early.next_position) == (late.length, late.next_position) == (24, 80)
    assert positions(early, 24) == positions(late, 24)
    torch.testing.assert_close(target.step(NEXT, early), target.step(NEXT, late))


def test_rows_are_found_by_position():
    """The first row from a position on, before, between and behind gathered rows."""
    target = TargetModel(tiny_llama())
    gathered = GatheredKV(filled(target, IDS), [0, 10, 20, 60], 8)
    assert [gathered.first_from(p) for p in (0, 1, 10, 59, 60, 61, 79, 80, 82)] == [
        0, 1, 1, 3, 3, 4, 4, 4, 6,
    ]  # fmt: skip
    assert not filled(target, IDS).is_gathered
    assert filled(target, IDS).first_from(33) == 33


def test_guesses_are_truncated_and_gathered_rows_stay():
    """Rows behind the gathered ones can be dropped; the next position follows."""
    live = filled(TargetModel(tiny_llama()), IDS)
    gathered = GatheredKV(live, [0, 10, 20, 60], 8)
    gathered.extend(live, 78, 80)
    assert (gathered.length, gathered.next_position) == (6, 82)
    gathered.truncate(5)
    assert gathered.next_position == 81
    gathered.truncate(1)
    assert (gathered.length, gathered.next_position) == (4, 80)


def test_hidden_states_stay_behind():
    """A gathered buffer keeps none; the live one's are untouched."""
    live = filled(TargetModel(tiny_llama()), IDS, keeps_hidden=True)
    gathered = GatheredKV(live, [0, 5, 9], 8)
    assert not gathered.keeps_hidden
    assert gathered.hidden()[1].numel() == 0
    assert len(live.hidden()[1]) == 80


def test_a_pinned_buffer_shares_memory_and_not_the_length():
    """Rows run on it lie in the live buffer's spare room, whose rows and length stay."""
    target = TargetModel(tiny_llama())
    live = filled(target, IDS)
    fresh = target.step(NEXT, filled(target, IDS))
    held = [t.clone() for t in live.rows(1, 0, 80)]
    live.reserve(300)
    pinned = live.pinned(live.capacity)
    pinned.length = live.length
    logits = target.step(NEXT, pinned)
    pinned.commit(range(4))
    assert (pinned.length, live.length) == (84, 80)
    assert pinned.rows(0, 80, 84)[0].data_ptr() == live._keys[0][:, 80:84].data_ptr()
    for row, old in zip(live.rows(1, 0, 80), held, strict=True):
        assert torch.equal(row, old)
    torch.testing.assert_close(logits, fresh)
    torch.testing.assert_close(target.step(NEXT, live), fresh)
