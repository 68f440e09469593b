"""Answers side by side on one model: batched steps say what each answer alone would, and nobody stalls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fakes
import pytest
import torch
from fakes import ScriptedDrafter
from tiny import FAMILIES, VOCAB, WINDOW, tiny_llama, tiny_tokenizer
from transformers import PreTrainedModel

from rasd_integrations import RASD, SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.engine.attention import StepContext
from rasd_integrations.engine.executors.base import StepOutput
from rasd_integrations.engine.executors.eager import EagerExecutor
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import PREFILL_PIECE, TargetModel
from rasd_integrations.errors import DeviceMemoryError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import DraftContext

SOON_S = 20.0
STALL_S = 0.05  # the longest that an event loop may stand still
TREE = [-1, -1, 0, 0, 1, 2]


class Gated(EagerExecutor):
    """Holds its first step until so many requests wait behind it; remembers who ran with whom."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.batches: list[list[int]] = []  # rows of each segment
        self.refuse: Callable[[StepContext], None] = lambda context: None
        self.waiting_for = 0
        self.target: TargetModel | None = None

    def step(self, ids: torch.Tensor, context: StepContext, *, num_logits: int) -> StepOutput:
        if self.target is not None and num_logits == len(ids):
            self.batches.append([s.rows for s in context.segments])
            deadline = time.monotonic() + SOON_S
            while len(self.target._turns._queue) < self.waiting_for:
                assert time.monotonic() < deadline
                time.sleep(0.0005)
            self.waiting_for = 0
        self.refuse(context)
        return super().step(ids, context, num_logits=num_logits)


def gated(model: PreTrainedModel) -> tuple[TargetModel, Gated]:
    executor = Gated(model)
    target = executor.target = TargetModel(model, executor=executor)
    return target, executor


def random_ids(n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n,), generator=generator).tolist()


def prefilled(target: TargetModel, ids: Sequence[int]) -> KVBuffer:
    buffer = KVBuffer(len(ids) + 64)
    for _ in target.prefill(ids, buffer):
        pass
    return buffer


def warmed(target: TargetModel, prompts: Sequence[list[int]]) -> PrefixCache:
    """Return a cache of the prompts' keys and values, so that answers begin with a step."""
    cache = PrefixCache(1 << 30)
    for ids in prompts:
        for _ in SpeculativeDecoder(target, prefix_cache=cache).prefill(ids):
            pass
    return cache


def side_by_side(executor: Gated, steps: Sequence[Callable[[], object]]) -> list[object]:
    """Run the first step alone, and the others, which have waited for it by then, together."""
    executor.waiting_for = len(steps) - 1
    with ThreadPoolExecutor(len(steps)) as pool:
        futures = [pool.submit(steps[0])]
        while not executor.batches:
            time.sleep(0.0005)
        futures += [pool.submit(step) for step in steps[1:]]
    return [f.result() if f.exception() is None else f.exception() for f in futures]


# Prefix length, rows and parents of answers that meet in one forward.
MIXED = [
    (10, 1, None),
    (3, 1, None),
    (90, 5, None),
    (200, 7, TREE),
    (1, 1, None),
    (33, 7, TREE),
    (15, 12, None),
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_batched_step_is_each_answers_own(family):
    """Chains and trees over short and long prefixes, windows included, have their own logits and rows."""
    target, executor = gated(FAMILIES[family]())
    alone = TargetModel(FAMILIES[family]())
    prompts = [random_ids(n, seed=i) for i, (n, _, _) in enumerate(MIXED)]
    drafts = [random_ids(rows, seed=50 + i) for i, (_, rows, _) in enumerate(MIXED)]
    buffers = [prefilled(target, ids) for ids in prompts]
    logits = side_by_side(
        executor,
        [lambda i=i: target.step(drafts[i], buffers[i], MIXED[i][2]) for i in range(len(MIXED))],
    )
    assert [[1], sorted(rows for _, rows, _ in MIXED[1:])] == list(map(sorted, executor.batches))
    for i, (_, rows, parents) in enumerate(MIXED):
        expected = alone.step(drafts[i], prefilled(alone, prompts[i]), parents)
        torch.testing.assert_close(logits[i], expected, atol=2e-4, rtol=1e-4)
        path = [0] if parents is None else [0, 1, 3]  # the first node and its first child
        kept = range(rows) if parents is None else path
        buffers[i].commit(list(kept))
        text = [*prompts[i], *(drafts[i][row] for row in kept)]
        assert len(text) == buffers[i].length
        after = target.step([7], buffers[i])
        expected = alone.step([7], prefilled(alone, text))
        torch.testing.assert_close(after, expected, atol=5e-4, rtol=1e-3)


SCRIPTS = [
    lambda truth: None,
    lambda truth: fakes.partly_right(truth, VOCAB),
    lambda truth: fakes.as_tree(fakes.partly_right(truth, VOCAB), VOCAB),
    fakes.oracle,
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_answers_side_by_side_have_the_ids_of_each_alone(family):
    """Plain, chain and tree decoding, stepping together, say what plain decoding alone says."""
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = [random_ids(20 + 13 * i, seed=i) for i in range(len(SCRIPTS))]
    alone = SpeculativeDecoder(TargetModel(FAMILIES[family]()))
    truths = [[t for b in alone.generate(ids, params) for t in b.token_ids] for ids in prompts]
    target, executor = gated(FAMILIES[family]())
    cache = warmed(target, prompts)

    def answer(i: int) -> list[int]:
        script = SCRIPTS[i](truths[i])
        config = SpeculationConfig(num_draft_tokens=5, max_draft_tokens=64)
        drafter = None if script is None else ScriptedDrafter(script)
        decoder = SpeculativeDecoder(target, drafter, config=config, prefix_cache=cache)
        return [t for b in decoder.generate(prompts[i], params) for t in b.token_ids]

    answers = side_by_side(executor, [lambda i=i: answer(i) for i in range(len(SCRIPTS))])
    assert truths == answers
    assert len(SCRIPTS) - 1 <= max(len(rows) for rows in executor.batches)


def test_a_stream_that_is_closed_leaves_the_others_right():
    """Closing an answer that steps together with others changes nothing for them."""
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    prompts = [random_ids(30, seed=i) for i in range(4)]
    plain = SpeculativeDecoder(TargetModel(tiny_llama()))
    truths = [[t for b in plain.generate(ids, params) for t in b.token_ids] for ids in prompts]
    target, executor = gated(tiny_llama())
    decoder = SpeculativeDecoder(target, prefix_cache=warmed(target, prompts))

    def answer(i: int) -> list[int]:
        out: list[int] = []
        blocks = decoder.generate(prompts[i], params)
        for block in blocks:
            out += block.token_ids
            if i == 1 and len(out) == 5:
                blocks.close()
        return out

    answers = side_by_side(executor, [lambda i=i: answer(i) for i in range(4)])
    assert [truths[0], truths[1][:5], truths[2], truths[3]] == answers
    assert 3 <= max(len(rows) for rows in executor.batches)


def four_steps(executor: Gated, target: TargetModel) -> list[object]:
    buffers = [prefilled(target, random_ids(20, seed=i)) for i in range(4)]
    return side_by_side(
        executor, [lambda b=b, i=i: target.step([1, 2 + i], b) for i, b in enumerate(buffers)]
    )


def test_a_batch_that_does_not_fit_runs_one_by_one():
    """Where only the joint forward is too large, every answer still gets its step."""
    target, executor = gated(tiny_llama())

    def refuse(context: StepContext) -> None:
        if len(context.segments) > 1:
            msg = "CUDA out of memory"
            raise torch.OutOfMemoryError(msg)

    executor.refuse = refuse
    logits = four_steps(executor, target)
    assert [[2], [2, 2, 2], [2], [2], [2]] == executor.batches
    executor.refuse = lambda context: None
    for i in range(4):
        expected = target.step([1, 2 + i], prefilled(target, random_ids(20, seed=i)))
        torch.testing.assert_close(logits[i], expected, atol=1e-5, rtol=1e-5)


def test_an_answer_that_does_not_fit_fails_alone():
    """Memory that runs out for one answer is that answer's error, with its own figures."""
    target, executor = gated(tiny_llama())

    def refuse(context: StepContext) -> None:
        for segment in context.segments:
            if segment.rows == 3:
                raise MemoryError

    executor.refuse = refuse
    buffers = [prefilled(target, random_ids(20, seed=i)) for i in range(4)]
    steps = [[1], [2, 3], [4, 5, 6], [7]]
    results = side_by_side(
        executor,
        [lambda b=b, s=s: target.step(s, b) for b, s in zip(buffers, steps, strict=True)],
    )
    assert isinstance(results[2], DeviceMemoryError)
    assert "step of 3 tokens over 20 cached" in str(results[2])
    for i in (0, 1, 3):
        expected = target.step(steps[i], prefilled(target, random_ids(20, seed=i)))
        torch.testing.assert_close(results[i], expected, atol=1e-5, rtol=1e-5)


def test_room_that_cannot_be_had_fails_before_the_queue(monkeypatch):
    """An answer whose buffer cannot grow never holds up a batch."""
    target, executor = gated(tiny_llama())
    buffer = prefilled(target, random_ids(20))

    def reserve(num_rows: int) -> None:
        raise MemoryError

    monkeypatch.setattr(buffer, "reserve", reserve)
    with pytest.raises(DeviceMemoryError, match="step of 1 tokens"):
        target.step([1], buffer)
    assert [] == executor.batches


def test_batching_can_be_turned_off():
    """With one row a batch every step runs alone."""
    target, executor = gated(tiny_llama())
    target.max_batch_rows = 1
    four_steps(executor, target)
    assert [[2]] * 4 == executor.batches


@pytest.mark.parametrize(("rope", "rows"), [("dynamic", 1), ("linear", 64)])
def test_a_rope_that_reads_the_whole_batch_is_not_batched(rope, rows):
    """Where one answer's length turns another's angles, each step runs alone."""
    model = tiny_llama(rope_parameters={"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0})
    assert rows == TargetModel(model).max_batch_rows


def lengths(target: TargetModel, ids: list[int]) -> list[int]:
    """Return how much is prefilled after each piece."""
    buffer = KVBuffer(2048)
    return [buffer.length for _ in target.prefill(ids, buffer)]


def test_prefill_takes_short_pieces_while_another_thread_decodes():
    """A step waits for a short piece; without one in sight the pieces are long."""
    target = TargetModel(tiny_llama())
    ids = random_ids(2 * PREFILL_PIECE)
    assert [PREFILL_PIECE, 2 * PREFILL_PIECE] == lengths(target, ids)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(target.step, [1], KVBuffer(8)).result()
    pieces = lengths(target, ids)
    assert PREFILL_PIECE >= 4 * pieces[0]
    assert len(ids) == pieces[-1]


def test_one_thread_may_hold_several_streams():
    """Turns are held for a step, so streams interleaved in one thread do not wait for each other."""
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    decoder = SpeculativeDecoder(TargetModel(tiny_llama()))
    truths = [[b.token_ids for b in decoder.generate(random_ids(9, i), params)] for i in range(2)]
    streams = [decoder.generate(random_ids(9, i), params) for i in range(2)]
    pairs = list(zip(*streams, strict=True))
    assert truths == [[pair[i].token_ids for pair in pairs] for i in range(2)]


def test_a_target_that_drafts_for_itself_decodes_side_by_side():
    """A drafter that steps on the same model, between the answer's own steps, blocks nobody."""
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    prompts = [random_ids(30, seed=i) for i in range(4)]
    target, executor = gated(tiny_llama())
    plain = SpeculativeDecoder(TargetModel(tiny_llama()))
    truths = [[t for b in plain.generate(ids, params) for t in b.token_ids] for ids in prompts]
    config = SpeculationConfig(num_draft_tokens=3)
    decoder = SpeculativeDecoder(target, ModelDrafter(target, confidence=0.0), config=config)

    def answer(i: int) -> list[int]:
        stats = DecodingStats()
        blocks = decoder.generate(prompts[i], params, context=DraftContext(()), stats=stats)
        ids = [t for b in blocks for t in b.token_ids]
        assert stats.drafted == stats.accepted >= 8  # its own greedy guesses are right
        return ids

    assert truths == side_by_side(executor, [lambda i=i: answer(i) for i in range(4)])


@pytest.mark.slow
async def test_twenty_async_streams_say_what_each_says_alone():
    """Many streams on one model all end, each with its own answer."""
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    texts = [f"Letter {i}: the owl of house {i} " * (1 + i % 4) for i in range(20)]
    rasd = RASD.from_model(tiny_llama(), tiny_tokenizer())
    truths = [rasd.generate(text, params).text for text in texts]
    fresh = RASD.from_model(tiny_llama(), tiny_tokenizer())

    async def answer(text: str) -> str:
        return "".join([chunk.text async for chunk in fresh.astream(text, params)])

    assert truths == await asyncio.wait_for(asyncio.gather(*map(answer, texts)), timeout=6 * SOON_S)


async def longest_stall(work: Callable[[], Coroutine[Any, Any, object]]) -> float:
    """Return the longest time in which the loop did not come round while ``work`` was awaited."""
    longest = 0.0
    done = asyncio.create_task(work())
    last = time.perf_counter()
    while not done.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    await done
    return longest


async def test_the_event_loop_turns_while_a_prompt_is_prefilled():
    """Prefill and decoding in a worker leave the loop free; of three tries, as the machine is shared."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    rasd = RASD.from_model(tiny_llama(), tiny_tokenizer(), prefix_cache_bytes=0)
    stalls = []
    for i in range(3):
        prompt = f"{i} " + "The owl sleeps by day. " * ((WINDOW - 100) // 23)
        stalls.append(await longest_stall(lambda p=prompt: rasd.agenerate(p, params)))
    assert min(stalls) < STALL_S
