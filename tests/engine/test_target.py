"""Steps of every family against the stock module: chains, trees, pieces of a prefill."""

from __future__ import annotations

import pytest
import torch
from steps import prefilled, random_ids, shared_target
from tiny import FAMILIES, tiny_llama

from rasd_integrations.engine import attention
from rasd_integrations.engine.attention import Segment, StepContext
from rasd_integrations.engine.executors.packing import pack_linears
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import PREFILL_PIECE, TargetModel


def fresh_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return the stock module's logits after the last of ``ids``, computed from scratch."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, TargetModel]:
    """A stock module and a target around another copy of it."""
    return FAMILIES[request.param](), shared_target(request.param)


@pytest.mark.parametrize("prompt", [1, 15, 16, 40, 200])
def test_chain_step_equals_fresh_forwards(family, prompt):
    """Each row of a chain step is the stock module's logits for that prefix."""
    stock, target = family
    ids = random_ids(prompt + 6)
    buffer = prefilled(target, ids[: prompt - 1]) if prompt > 1 else KVBuffer(8)
    logits = target.step(ids[prompt - 1 :], buffer)
    for row in range(7):
        expected = fresh_logits(stock, ids[: prompt + row])
        torch.testing.assert_close(logits[row], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("prompt", [3, 30])
def test_tree_step_equals_fresh_forwards(family, prompt):
    """Each node of a tree sees its ancestors only."""
    stock, target = family
    ids = random_ids(prompt)
    nodes, parents = random_ids(7, seed=1), [-1, -1, 0, 0, 1, 2, 5]
    buffer = prefilled(target, ids[:-1])
    logits = target.step([ids[-1], *nodes], buffer, parents)
    for node, parent in enumerate(parents):
        path = [nodes[node]]
        while parent >= 0:
            path.insert(0, nodes[parent])
            parent = parents[parent]
        torch.testing.assert_close(
            logits[1 + node], fresh_logits(stock, ids + path), atol=2e-4, rtol=1e-4
        )


def test_wide_tree_step_equals_fresh_forwards():
    """A tree of more rows than a decoding step usually has keeps its mask."""
    stock, target = tiny_llama(), TargetModel(tiny_llama())
    ids, nodes = random_ids(10), random_ids(90, seed=1)
    parents = [-1 if i < 45 else i - 45 for i in range(90)]
    logits = target.step([ids[-1], *nodes], prefilled(target, ids[:-1]), parents)
    expected = fresh_logits(stock, [*ids, nodes[44], nodes[89]])
    torch.testing.assert_close(logits[90], expected, atol=2e-4, rtol=1e-4)


def test_committed_path_of_a_tree_continues_like_a_fresh_forward(family):
    """After committing a path, the buffer holds just that path."""
    stock, target = family
    ids, nodes = random_ids(20), random_ids(5, seed=1)
    buffer = prefilled(target, ids[:-1])
    target.step([ids[-1], *nodes], buffer, [-1, -1, 1, 2, 0])
    buffer.commit([0, 2, 3])
    assert buffer.length == 22
    logits = target.step([nodes[3]], buffer)
    expected = fresh_logits(stock, [*ids, nodes[1], nodes[2], nodes[3]])
    torch.testing.assert_close(logits[0], expected, atol=2e-4, rtol=1e-4)


def test_prefill_in_pieces_equals_one_forward(family):
    """Pieces longer and shorter than a window give the stock module's logits."""
    stock, target = family
    ids = random_ids(2 * PREFILL_PIECE + 77)
    buffer = prefilled(target, ids[:-1])
    assert buffer.length == len(ids) - 1
    torch.testing.assert_close(
        target.step(ids[-1:], buffer)[0], fresh_logits(stock, ids), atol=5e-4, rtol=1e-3
    )


def test_step_leaves_the_prefix_unchanged():
    """Rows of a step that is not committed are forgotten."""
    target = TargetModel(tiny_llama())
    ids = random_ids(30)
    buffer = prefilled(target, ids[:-1])
    before = target.step(ids[-1:], buffer).clone()
    target.step([1, 2, 3, 4], buffer)
    assert buffer.length == 29
    torch.testing.assert_close(target.step(ids[-1:], buffer), before, atol=0, rtol=0)


def test_buffer_grows_without_losing_rows():
    """Rows stand where they stood after the buffer outgrew its capacity."""
    target = TargetModel(tiny_llama())
    ids = random_ids(700)
    small, large = KVBuffer(10), KVBuffer(2000)
    for buffer in (small, large):
        for _ in target.prefill(ids, buffer):
            pass
    for layer in range(2):
        for a, b in zip(small.rows(layer, 0, 700), large.rows(layer, 0, 700), strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_copy_is_independent():
    """A copied buffer does not see later writes to its source."""
    target = TargetModel(tiny_llama())
    ids = random_ids(40)
    buffer = prefilled(target, ids)
    copy = buffer.copy(20, 64)
    buffer.truncate(5)
    for _ in target.prefill(random_ids(30, seed=5), buffer):
        pass
    torch.testing.assert_close(
        target.step([7], copy), target.step([7], prefilled(target, ids[:20])), atol=1e-5, rtol=1e-5
    )


def test_packed_weights_give_the_same_logits():
    """Repacked linear layers change rounding only."""
    packed = tiny_llama()
    assert pack_linears(packed) == 15
    ids = random_ids(30)
    logits = [
        target.step(ids[-1:], prefilled(target, ids[:-1]))
        for target in (TargetModel(tiny_llama()), TargetModel(packed))
    ]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_model_stays_usable_in_transformers():
    """A model that an engine uses still generates the same ids by itself."""
    stock, shared = tiny_llama(), tiny_llama()
    TargetModel(shared)
    ids = torch.tensor([random_ids(12)])
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    assert stock.generate(ids, **options).tolist() == shared.generate(ids, **options).tolist()


def test_bfloat16_steps_stay_near_float32():
    """In bfloat16 a step errs as much as the stock module does."""
    reference = tiny_llama()
    half = tiny_llama().to(torch.bfloat16)
    ids = random_ids(300)
    exact = fresh_logits(reference, ids)
    stock_error = (fresh_logits(half, ids).float() - exact).norm()
    target = TargetModel(half)
    ours = target.step(ids[-1:], prefilled(target, ids[:-1]))[0].float()
    assert (ours - exact).norm() < 2 * stock_error


def test_a_step_context_knows_answers_and_nothing_of_drafts():
    """A step carries positions, segments and a wish; a segment its buffer, its rows and who sees whom."""
    assert set(StepContext.__dataclass_fields__) == {"positions", "segments", "rows"}
    slots = {s for s in Segment.__slots__ if s[0] != "_"}
    assert slots == {"buffer", "positions", "rows", "tail_mask"}


def test_a_buffer_that_grows_keeps_its_rows():
    """Every row of keys and values is there after the move, and in every layer."""
    buffer = prefilled(TargetModel(tiny_llama()), random_ids(200))
    memory = buffer.memory
    held = [[part.clone() for part in buffer.rows(layer, 0, 200)] for layer in range(2)]
    buffer.reserve(5000)
    assert buffer.memory is not memory
    for layer, parts in enumerate(held):
        assert all(map(torch.equal, buffer.rows(layer, 0, 200), parts))


def test_masks_are_made_once_a_step(monkeypatch):
    """Layers of one kind share their masks: one for the full ones, one for the sliding ones."""
    made: list[int | None] = []
    stock = attention._blocked

    def counted(segment, prefix, window, device):
        made.append(window)
        return stock(segment, prefix, window, device)

    target = TargetModel(FAMILIES["gemma3"]())
    buffer = prefilled(target, random_ids(30))
    monkeypatch.setattr(attention, "_blocked", counted)
    target.step([1, 2, 3], buffer, [-1, -1])
    assert [16, None] == made


def test_bytes_of_a_token_are_those_of_its_keys_and_values():
    """Two layers of two key heads of eight numbers, keys and values, in float32."""
    target = TargetModel(tiny_llama())
    assert 2 * 2 * 2 * 8 * 4 == target.kv_bytes_per_token
    assert 40 * target.kv_bytes_per_token == prefilled(target, random_ids(40)).nbytes
