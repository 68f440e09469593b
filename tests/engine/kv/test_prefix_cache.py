"""Keys and values found again by prefix: what is reused, what is kept apart, what goes."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama

from rasd_integrations.config import SamplingParams
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.stats import DecodingStats

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel(tiny_llama())


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


DOCUMENT = random_ids(120, seed=1)
QUESTIONS = [random_ids(12, seed=s) for s in (2, 3, 4)]


def ask(target: TargetModel, cache: PrefixCache, ids: list[int], namespace: str = ""):
    stats = DecodingStats()
    decoder = SpeculativeDecoder(target, prefix_cache=cache)
    blocks = decoder.generate(ids, PARAMS, stats=stats, namespace=namespace)
    return [t for b in blocks for t in b.token_ids], stats.cached_prompt_tokens


def test_second_question_reuses_the_document(target):
    """The shared head is not prefilled again, and the answer is the cold one."""
    cache = PrefixCache(1 << 30)
    for i, question in enumerate(QUESTIONS):
        answer, cached = ask(target, cache, DOCUMENT + question)
        assert answer == ask(target, PrefixCache(0), DOCUMENT + question)[0]
        assert cached == (0 if i == 0 else 120)
    assert len(cache) == 1


def test_same_prompt_again_runs_one_token(target):
    """All but the last prompt token is reused."""
    cache = PrefixCache(1 << 30)
    ids = DOCUMENT + QUESTIONS[0]
    first = ask(target, cache, ids)
    assert ask(target, cache, ids) == (first[0], len(ids) - 1)


def test_conversation_reuses_its_own_answer(target):
    """A follow-up that holds the answer before reuses its keys and values."""
    cache = PrefixCache(1 << 30)
    ids = DOCUMENT + QUESTIONS[0]
    answer, _ = ask(target, cache, ids)
    _, cached = ask(target, cache, [*ids, *answer, *QUESTIONS[1]])
    assert cached == len(ids) + len(answer) - 1


def test_namespaces_share_nothing(target):
    """Another tenant's entry is not seen."""
    cache = PrefixCache(1 << 30)
    ask(target, cache, DOCUMENT + QUESTIONS[0], namespace="a")
    assert ask(target, cache, DOCUMENT + QUESTIONS[1], namespace="b")[1] == 0
    assert ask(target, cache, DOCUMENT + QUESTIONS[1], namespace="a")[1] == 120


def test_short_common_head_does_not_destroy_a_long_entry(target):
    """A prompt that shares only its first tokens copies them and leaves the entry."""
    cache = PrefixCache(1 << 30)
    ask(target, cache, DOCUMENT + QUESTIONS[0])
    assert ask(target, cache, DOCUMENT[:30] + QUESTIONS[1])[1] == 30
    assert ask(target, cache, DOCUMENT + QUESTIONS[2])[1] == 120


def test_stream_copies_from_one_that_is_still_running(target):
    """Two streams on one document: the second copies the first's rows and both are exact."""
    cache = PrefixCache(1 << 30)
    decoder = SpeculativeDecoder(target, prefix_cache=cache)
    first = decoder.generate(DOCUMENT + QUESTIONS[0], PARAMS)
    head = [*next(first).token_ids, *next(first).token_ids]
    answer, cached = ask(target, cache, DOCUMENT + QUESTIONS[1])
    assert cached == 120
    assert answer == ask(target, PrefixCache(0), DOCUMENT + QUESTIONS[1])[0]
    rest = [t for b in first for t in b.token_ids]
    assert head + rest == ask(target, PrefixCache(0), DOCUMENT + QUESTIONS[0])[0]


def test_least_recently_used_goes_first(target):
    """Entries over the budget leave, the oldest first."""
    probe = PrefixCache(1 << 30)
    ask(target, probe, DOCUMENT)
    cache = PrefixCache(int(2.5 * probe.nbytes))
    others = [random_ids(120, seed=s) for s in (10, 11)]
    ask(target, cache, DOCUMENT)
    ask(target, cache, others[0])
    ask(target, cache, DOCUMENT)
    ask(target, cache, others[1])
    assert len(cache) == 2
    assert ask(target, cache, DOCUMENT)[1] == 119
    assert ask(target, cache, others[0])[1] == 0


def test_zero_budget_keeps_nothing(target):
    """A cache of no bytes holds buffers at work only."""
    cache = PrefixCache(0)
    ask(target, cache, DOCUMENT)
    assert (len(cache), cache.nbytes) == (0, 0)


def test_clear_forgets_idle_buffers(target):
    """After clear, a known prompt is cold."""
    cache = PrefixCache(1 << 30)
    ask(target, cache, DOCUMENT)
    cache.clear()
    assert ask(target, cache, DOCUMENT)[1] == 0
