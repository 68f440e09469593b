"""Parts of a buffer: gathered rows keep their positions, views share memory and leave it as it was."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, tiny_llama

from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel

IDS = torch.randint(0, 256, (80,), generator=torch.Generator().manual_seed(1)).tolist()
NEXT = [5, 9, 17, 31]


def filled(target: TargetModel, ids: list[int] = IDS, **options: bool) -> KVBuffer:
    buffer = KVBuffer(len(ids), **options)
    for _ in target.prefill(ids, buffer):
        pass
    return buffer


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_rows_gathered_continue_alike(family):
    """A gathered buffer of all rows gives the live one's logits, chain and tree."""
    target = TargetModel(FAMILIES[family]())
    live = filled(target)
    gathered = live.gather(range(80), 80)
    assert (gathered.length, gathered.shift) == (80, 0)
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
    got = target.step(NEXT, filled(target).gather(rows, 16))
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
    live = filled(target)
    ids = IDS[:n]
    near = [*range(2), *range(50, 80)]  # all that the windows of 16 and 24 reach, and a sink
    whole, part = live.gather(range(80), 80), live.gather(near, 64)
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
    live = filled(target)
    early = live.copy(60, 80).gather([0, 1, 30, 59], 8)
    assert early.shift == 56
    early.extend(live, 60, 80)
    late = live.gather([0, 1, 30, 59, *range(60, 80)], 32)
    assert (early.length, early.shift) == (late.length, late.shift) == (24, 56)
    assert early.positions(0, 24).tolist() == late.positions(0, 24).tolist()
    torch.testing.assert_close(target.step(NEXT, early), target.step(NEXT, late))


def test_rows_of_gathered_rows_keep_their_positions():
    """Gathering twice is gathering once."""
    target = TargetModel(tiny_llama())
    live = filled(target)
    twice = live.gather(range(0, 80, 2), 64).gather([0, 1, 20, 39], 8)
    assert twice.positions(0, 4).tolist() == [0, 2, 40, 78]
    once = live.gather([0, 2, 40, 78], 8)
    assert twice.shift == once.shift == 76
    torch.testing.assert_close(target.step(NEXT, twice), target.step(NEXT, once))


def test_rows_are_found_by_position():
    """The first row from a position on, before, between and behind gathered rows."""
    target = TargetModel(tiny_llama())
    gathered = filled(target).gather([0, 10, 20, 60], 8)
    assert [gathered.first_from(p) for p in (0, 1, 10, 59, 60, 61, 79, 80, 82)] == [
        0, 1, 1, 3, 3, 4, 4, 4, 6,
    ]  # fmt: skip
    assert not filled(target).is_gathered
    assert filled(target).first_from(33) == 33


def test_truncation_and_copies_keep_positions():
    """Cut among gathered rows, a buffer goes on behind the last one that is left; copies agree."""
    target = TargetModel(tiny_llama())
    live = filled(target)
    gathered = live.gather([0, 10, 20, 60], 8)
    gathered.extend(live, 78, 80)
    copied = gathered.copy(5, 8)
    assert (copied.length, copied.shift) == (5, 76)
    gathered.truncate(4)
    assert gathered.shift == 76
    gathered.truncate(3)
    assert gathered.shift == 18
    assert gathered.copy(2, 8).shift == 9
    gathered.truncate(0)
    assert (gathered.shift, gathered.is_gathered) == (0, False)


def test_hidden_states_stay_behind():
    """A gathered buffer keeps none; the live one's are untouched."""
    live = filled(TargetModel(tiny_llama()), keeps_hidden=True)
    gathered = live.gather([0, 5, 9], 8)
    assert not gathered.keeps_hidden
    assert gathered.hidden()[1].numel() == 0
    assert len(live.hidden()[1]) == 80


def test_a_view_shares_memory_and_not_the_length():
    """Rows run on a view lie in the live buffer's spare room; its rows and its length stay."""
    target = TargetModel(tiny_llama())
    live = filled(target)
    fresh = target.step(NEXT, filled(target))
    held = [t.clone() for t in live.rows(1, 0, 80)]
    view = live.view(2, 300)
    logits = target.step(NEXT, view)
    view.commit(range(4))
    assert (view.length, live.length) == (84, 80)
    assert view.rows(0, 80, 84)[0].data_ptr() == live._keys[0][:, 80:84].data_ptr()
    for row, old in zip(live.rows(1, 0, 80), held, strict=True):
        assert torch.equal(row, old)
    torch.testing.assert_close(logits, fresh)
    torch.testing.assert_close(target.step(NEXT, live), fresh)
    assert live.view(1, 4).num_layers == 1


def test_a_view_keeps_gathered_positions():
    """A view of gathered rows continues as they do."""
    target = TargetModel(tiny_llama())
    gathered = filled(target).gather([0, 10, 60], 8)
    torch.testing.assert_close(target.step(NEXT, gathered.view(2, 8)), target.step(NEXT, gathered))
