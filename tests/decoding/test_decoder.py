"""The loop: whatever is drafted, the ids are those of plain decoding and the cache is true."""

from __future__ import annotations

from functools import cache, partial

import fakes
import pytest
import torch
from fakes import ScriptedDrafter
from steps import shared_target
from tiny import EOS, FAMILIES, VOCAB, WINDOW, tiny_llama

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.engine.executors.eager import EagerExecutor
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel, _forward
from rasd_integrations.errors import (
    ContextOverflowError,
    DeviceMemoryError,
    PromptError,
)
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft

NUM_TOKENS = 40
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return shared_target()


def prompt_ids(n: int = 24, seed: int = 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n,), generator=generator).tolist()


def decode(target, drafter=None, params=GREEDY, n=None, ids=None, cache=None, stats=None):
    config = SpeculationConfig(num_draft_tokens=n, max_draft_tokens=64)
    decoder = SpeculativeDecoder(target, drafter, config=config, prefix_cache=cache)
    blocks = decoder.generate(ids or prompt_ids(), params, stats=stats)
    return [t for block in blocks for t in block.token_ids]


@cache
def plain(family: str = "llama") -> tuple[int, ...]:
    """Return the answer of a shared target without a drafter."""
    return tuple(decode(shared_target(family)))


def stock_greedy(model, ids, max_new_tokens=NUM_TOKENS):
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # else transformers takes every id 0 for padding
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_plain_decoding_equals_generate(family):
    """Without a drafter the ids are transformers' own."""
    ids = prompt_ids(40)
    expected = stock_greedy(FAMILIES[family](), ids)
    assert (
        decode(TargetModel(FAMILIES[family]()), params=SamplingParams(max_tokens=40), ids=ids)
        == expected
    )


SCRIPTS = fakes.scripts(VOCAB)


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("script", sorted(SCRIPTS))
@pytest.mark.parametrize("n", [None, 1, 2, 5, 16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_ids_equal_plain_decoding(family, n, script, shape):
    """The losslessness matrix, greedy, float32; the schedule chooses if no length is given."""
    target, truth = shared_target(family), list(plain(family))
    propose = SCRIPTS[script](truth)
    if shape == "tree":
        propose = fakes.as_tree(propose, VOCAB)
    assert decode(target, ScriptedDrafter(propose), n=n) == truth


def test_an_oracle_s_drafts_are_accepted_whole(target):
    """Blocks are of n + 1 tokens until the room ends, and the counters agree with them."""
    truth, stats = list(plain()), DecodingStats()
    config = SpeculationConfig(num_draft_tokens=5)
    decoder = SpeculativeDecoder(target, ScriptedDrafter(fakes.oracle(truth)), config=config)
    blocks = [b for b in decoder.generate(prompt_ids(), GREEDY, stats=stats) if b.token_ids]
    assert [len(b.token_ids) for b in blocks] == [6, 6, 6, 6, 6, 6, 4]
    assert [b.num_accepted_tokens for b in blocks] == [5, 5, 5, 5, 5, 5, 3]
    assert [b.finish_reason for b in blocks] == [None] * 6 + ["length"]
    assert (stats.target_steps, stats.generated_tokens, stats.prompt_tokens) == (7, NUM_TOKENS, 24)
    assert stats.as_dict()["drafters"] == {"s": {"drafted": 33, "accepted": 33}}
    assert stats.acceptance_rate == 1.0
    assert stats.mean_acceptance_length == pytest.approx(1 + 33 / 7)


def check_cache(target: TargetModel, buffer: KVBuffer, ids: list[int]) -> None:
    """Assert that ``buffer`` holds all of ``ids`` but the last and continues like a fresh forward."""
    assert buffer.length == len(ids) - 1
    fresh = KVBuffer(len(ids))
    for _ in target.prefill(ids[:-1], fresh):
        pass
    torch.testing.assert_close(
        target.step(ids[-1:], buffer), target.step(ids[-1:], fresh), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("n", [None, 5])
def test_cache_is_true_after_every_block(family, shape, n):
    """After each block, length and logits are those of a fresh forward."""
    target, truth = shared_target(family), list(plain(family))
    propose = fakes.partly_right(truth, VOCAB)
    if shape == "tree":
        propose = fakes.as_tree(propose, VOCAB)
    cache = PrefixCache(1 << 20)
    config = SpeculationConfig(num_draft_tokens=n)
    decoder = SpeculativeDecoder(
        target, ScriptedDrafter(propose), config=config, prefix_cache=cache
    )
    ids = prompt_ids()
    for block in decoder.generate(ids, GREEDY):
        if not block.token_ids:
            continue
        ids = [*ids, *block.token_ids]
        check_cache(target, cache._entries[-1].buffer, ids)
    assert len(ids) == 24 + NUM_TOKENS


@pytest.mark.parametrize("n", [1, 5, 16])
def test_end_token_inside_a_block_ends_the_answer(target, n):
    """Nothing after the first end token is committed."""
    truth = list(plain())
    eos = truth[17]
    end = truth.index(eos) + 1
    ending = TargetModel(tiny_llama())
    ending.eos_ids = frozenset([eos])
    cache, stats = PrefixCache(1 << 20), DecodingStats()
    params = SamplingParams(max_tokens=NUM_TOKENS)
    drafter = ScriptedDrafter(fakes.oracle(truth))
    assert decode(ending, drafter, params, n=n, cache=cache, stats=stats) == truth[:end]
    check_cache(ending, cache._entries[-1].buffer, prompt_ids() + truth[:end])
    assert stats.generated_tokens == end


def test_closing_a_stream_frees_its_session_and_keeps_a_true_cache(target):
    """Close in mid-stream: the session is closed and the kept rows are those of the ids so far."""
    truth = list(plain())
    cache = PrefixCache(1 << 20)
    drafter = ScriptedDrafter(fakes.oracle(truth))
    config = SpeculationConfig(num_draft_tokens=3)
    decoder = SpeculativeDecoder(target, drafter, config=config, prefix_cache=cache)
    blocks = decoder.generate(prompt_ids(), GREEDY)
    seen: list[int] = []
    while len(seen) < 8:
        seen += next(blocks).token_ids
    blocks.close()
    assert drafter.sessions[0].closed
    assert not cache._entries[0].in_use
    assert len(cache) == 1
    check_cache(target, cache._entries[0].buffer, prompt_ids() + seen)
    assert decode(target, cache=cache) == truth


def test_the_prefill_says_the_first_token(target):
    """It takes no step and waits for no drafter, who then starts behind it."""
    truth = list(plain())
    executor = Counting(target._executor)
    counted = TargetModel(target.model, executor=executor)
    drafter = ScriptedDrafter(fakes.oracle(truth))
    blocks = SpeculativeDecoder(counted, drafter).generate(prompt_ids(), GREEDY)
    pieces = [next(blocks), next(blocks)]
    assert [block.token_ids for block in pieces] == [(), (truth[0],)]
    assert (executor.steps, drafter.sessions) == (0, [])
    assert [t for block in blocks for t in block.token_ids] == truth[1:]
    assert drafter.sessions[0].answer == truth


def test_an_answer_of_one_token_starts_no_drafter(target):
    """Nothing would come of its draft."""
    drafter, stats = ScriptedDrafter(fakes.empty()), DecodingStats()
    params = SamplingParams(max_tokens=1)
    assert decode(target, drafter, params, stats=stats) == [plain()[0]]
    assert not drafter.sessions
    assert (stats.target_steps, stats.generated_tokens) == (1, 1)


def test_closing_a_stream_before_its_first_token_keeps_a_true_cache(target):
    """The kept rows are those of the whole prompt."""
    cache = PrefixCache(1 << 20)
    blocks = SpeculativeDecoder(target, prefix_cache=cache).generate(prompt_ids(), GREEDY)
    assert not next(blocks).token_ids
    blocks.close()
    buffer = cache._entries[0].buffer
    assert buffer.length == len(prompt_ids())
    check_cache(target, buffer, [*prompt_ids(), 1])
    assert decode(target, cache=cache) == list(plain())


def test_failing_drafter_costs_speed_only(target):
    """An error in a drafter is reported, and the answer is whole."""
    truth = list(plain())
    stats = DecodingStats()
    assert decode(target, ScriptedDrafter(fakes.failing(after=2)), n=4, stats=stats) == truth
    assert stats.off_reason == "drafter 'scripted' failed: RuntimeError: the script says so"


def test_unknown_ids_in_a_draft_are_dropped(target):
    """A draft with ids outside the vocabulary changes nothing."""
    truth = list(plain())
    drafter = ScriptedDrafter(lambda answer, budget: Draft((VOCAB + 5, 1, 2), source="s"))
    assert decode(target, drafter, n=3) == truth


def test_two_streams_interleave(target):
    """Streams that take turns give what each gives alone."""
    prompts = [prompt_ids(30, seed=5), prompt_ids(45, seed=6)]
    alone = [decode(target, ids=ids) for ids in prompts]
    decoder = SpeculativeDecoder(target, prefix_cache=PrefixCache(1 << 20))
    streams = [decoder.generate(ids, GREEDY) for ids in prompts]
    seen: list[list[int]] = [[], []]
    for _ in range(200):
        for stream, out in zip(streams, seen, strict=True):
            out += next(stream).token_ids if len(out) < NUM_TOKENS else ()
    assert seen == alone


def test_closing_one_stream_leaves_the_other(target):
    """The stream that goes on is exact."""
    ids = prompt_ids(30, seed=5)
    alone = decode(target, ids=ids)
    decoder = SpeculativeDecoder(target, prefix_cache=PrefixCache(1 << 20))
    kept, dropped = decoder.generate(ids, GREEDY), decoder.generate(ids, GREEDY)
    seen = [*next(kept).token_ids, *next(kept).token_ids]
    next(dropped), next(dropped)
    dropped.close()
    assert [*seen, *(t for b in kept for t in b.token_ids)] == alone


@pytest.mark.parametrize("n", [0, 1, 4])
def test_seeded_sampling_is_reproducible_and_independent_of_drafts(target, n):
    """With a seed, deterministic drafts change no sampled id."""
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=30, ignore_eos=True)
    plain = decode(target, params=params)
    assert len(set(plain)) > 3
    assert decode(target, ScriptedDrafter(fakes.partly_right(plain, VOCAB)), params, n=n) == plain
    assert decode(target, params=SamplingParams(temperature=0.9, seed=12, max_tokens=30)) != plain


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1] * (WINDOW - 27), ContextOverflowError, f"window is {WINDOW}: 13 too many"),
        ([], PromptError, "no tokens"),
        ([1, VOCAB], PromptError, "outside"),
    ],
    ids=["too long", "empty", "a foreign id"],
)
def test_bad_prompts_are_refused_at_the_call(target, ids, error, message):
    """Before any work: when called, not when read."""
    with pytest.raises(error, match=message):
        SpeculativeDecoder(target).generate(ids, GREEDY)


def test_a_prompt_and_its_answer_may_fill_the_window(target):
    """To its last token."""
    SpeculativeDecoder(target).generate([1] * (WINDOW - NUM_TOKENS), GREEDY)


def test_the_drafters_draws_are_not_the_verifiers(target):
    """A session has another seed than the answer: with the same numbers accepted drafts would be biased."""
    drafter = ScriptedDrafter(fakes.empty())
    decode(target, drafter, SamplingParams(temperature=0.9, seed=11, max_tokens=2))
    assert drafter.sessions[0].context.seed != 11


def test_budget_never_exceeds_the_room(target):
    """The drafter is never asked for more than the answer may still hold."""
    drafter = ScriptedDrafter(fakes.empty())
    decode(target, drafter, SamplingParams(max_tokens=4, ignore_eos=True), n=16)
    assert drafter.sessions[0].budgets == [3, 2, 1]


def test_eos_is_part_of_the_token_ids(target):
    """The end token ends the block and stays in the ids, as in transformers."""
    truth = list(plain())
    ending = TargetModel(tiny_llama())
    ending.eos_ids = frozenset([truth[2], EOS])
    got = decode(ending, params=SamplingParams(max_tokens=NUM_TOKENS))
    assert got == truth[: truth.index(truth[2]) + 1]


class Counting(EagerExecutor):
    """An executor that counts its decoding steps."""

    def __init__(self, executor):
        self.executor, self.steps = executor, 0

    def step(self, ids, context, *, num_logits):
        self.steps += num_logits == len(ids)
        return self.executor.step(ids, context, num_logits=num_logits)


class FullMemory(Counting):
    """An executor that runs out of memory at its third step."""

    def step(self, ids, context, *, num_logits):
        out = super().step(ids, context, num_logits=num_logits)
        if self.steps == 3:
            raise torch.OutOfMemoryError
        return out


def test_out_of_memory_fails_the_request_and_nothing_else():
    """The error has sizes and advice; a stream beside it and the next answer are right."""
    target = TargetModel(tiny_llama())
    truth = list(plain())
    decoder = SpeculativeDecoder(target, prefix_cache=PrefixCache(1 << 20))
    other = decoder.generate(prompt_ids(), GREEDY)
    seen = [*next(other).token_ids, *next(other).token_ids]
    target._turns._run = partial(_forward, FullMemory(target._executor))
    with pytest.raises(DeviceMemoryError, match=r"over 3\d cached ones .* Shorten the prompt"):
        list(decoder.generate(prompt_ids(30, seed=9), GREEDY))
    assert [*seen, *(t for b in other for t in b.token_ids)] == truth
    assert decode(target) == truth
