"""Two tenants of one server: neither time, drafts, counters nor logs tell one what the other has asked."""

from __future__ import annotations

import json
import logging
import random
import time

import httpx
import numpy as np
import pytest
from served import engines_over, served
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.config import SpeculationConfig

PAIRS = 40
SHUFFLES = 4000
LEAST = 0.01  # a chance as small as this is called a difference
ROUNDS = 2  # a leak shows in each; chance in one of 10,000 runs
LETTERS = 2500
SECRET = "the heron nests in the fourth willow"


@pytest.fixture(scope="module")
def server():
    """Serve a random model to two tenants; drafts have one length, as the schedule's depend on the clock."""
    model, own = tiny_llama(max_position_embeddings=8192), SpeculationConfig(num_draft_tokens=6)
    keys = {"sk-a": "a", "sk-b": "b"}
    with served(engines_over(model, tiny_tokenizer(), speculation=own), keys=keys) as found:
        yield found


@pytest.fixture(scope="module")
def clients(server):
    """Return a client of each tenant, with a connection that stays open."""
    with tenant(server, "a") as a, tenant(server, "b") as b:
        yield {"a": a, "b": b}


def tenant(server, name):
    headers = {"authorization": f"Bearer sk-{name}"}
    return httpx.Client(base_url=server.root, headers=headers, timeout=60)


def body(text, tokens=1):
    """Return a request whose answer has so many tokens."""
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}


def first_token_s(client, text):
    """Return the seconds to the first token of an answer, which is its only one: it may be no text yet."""
    asked, started = body(text) | {"stream": True}, time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=asked) as got:
        events = [(time.perf_counter(), line) for line in got.iter_lines() if line]
    assert events[-1][1] == "data: [DONE]"
    return next(at for at, line in events if '"finish_reason":"length"' in line) - started


def fresh(draw):
    """Return a long text that differs from all others from its first letters on."""
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=LETTERS))


def chance(known, new, draw):
    """Return how often chance alone parts the medians of pairs as far as they are: a permutation test."""

    def apart(one, other):
        return np.abs(np.median(one, axis=-1) - np.median(other, axis=-1))

    one, other = np.array(known), np.array(new)
    swaps = draw.random((SHUFFLES, len(one))) < 0.5
    found = apart(np.where(swaps, other, one), np.where(swaps, one, other))
    return (1 + np.count_nonzero(found >= apart(one, other))) / (1 + SHUFFLES)


def measured(client, clients, seed):
    """Return the chance that texts which A has asked and texts of nobody take ``client`` the same time.

    Each text is asked once: what a tenant has asked, it may know.
    """
    draw = random.Random(seed)
    asked = [fresh(draw) for _ in range(PAIRS)]
    for text in asked:
        first_token_s(clients["a"], text)
    for _ in range(3):  # what is made at a tenant's first answers
        first_token_s(client, fresh(draw))
    known, new = [], []
    for text in asked:
        both = [(known, text), (new, fresh(draw))]
        draw.shuffle(both)
        for times, given in both:
            times.append(first_token_s(client, given))
    return chance(known, new, np.random.default_rng(seed))


# --- time ---


@pytest.mark.slow
def test_a_tenant_hears_of_its_own_texts_in_the_time(clients):
    """Its second question is faster: so the test below would see a difference."""
    assert measured(clients["a"], clients, 0) < LEAST / 10


@pytest.mark.slow
def test_a_tenant_hears_nothing_of_anothers_texts_in_the_time(clients):
    """Prompts that A has asked take B as long as prompts of nobody."""
    assert any(measured(clients["b"], clients, seed) > LEAST for seed in range(1, 1 + ROUNDS))


def test_the_test_tells_a_difference_from_none():
    """A shift of half the noise's width is found in the pairs; the same numbers in another order are not."""
    draw = np.random.default_rng(0)
    times = draw.normal(10, 1, 2 * PAIRS)
    assert chance(times[:PAIRS], times[PAIRS:], draw) > LEAST
    assert chance(times[:PAIRS], times[PAIRS:] + 2, draw) < LEAST / 10
    assert chance(times[:PAIRS] + 2, times[PAIRS:], draw) < LEAST / 10


# --- drafts, counters, logs ---


def answer(client, text, tokens=48):
    """Return an answer and its statistics."""
    got = client.post("/v1/chat/completions", json=body(text, tokens))
    (choice,) = got.json()["choices"]
    return choice["message"]["content"], choice["rasd"]


def remembered(stats):
    """Return the tokens that were accepted from earlier answers."""
    return stats["drafters"].get("answers", {"accepted": 0})["accepted"]


@pytest.mark.slow
def test_nothing_is_drafted_from_anothers_answers(clients):
    """A's second answer is drafted from its first; B's first is not, and its second is from its own."""
    text = "Tell me of the quick brown fox."
    first, again = answer(clients["a"], text), answer(clients["a"], text)
    other, at_last = answer(clients["b"], text), answer(clients["b"], text)
    assert len({first[0], again[0], other[0], at_last[0]}) == 1
    assert (remembered(first[1]), remembered(other[1])) == (0, 0)
    assert remembered(again[1]) > 0
    assert remembered(at_last[1]) > 0
    assert other[1]["cached_prompt_tokens"] == 0 < at_last[1]["cached_prompt_tokens"]


@pytest.mark.slow
def test_nothing_of_a_tenants_text_is_written_elsewhere(server, clients, caplog):
    """Neither in the metrics, nor in the log at its lowest level, nor in the other's statistics."""
    chunks = [{"text": f"It is said that {SECRET}.", "id": "heron-7", "metadata": {"source": "willow.txt"}}]  # fmt: skip
    asked = body(f"It is said that {SECRET}. Where does it nest?", 24)
    asked["rasd"] = {"chunks": chunks, "question": "Where does it nest?"}
    with caplog.at_level(logging.DEBUG):
        got = clients["a"].post("/v1/chat/completions", json=asked).json()
        said = got["choices"][0]["message"]["content"]
        failed = clients["a"].post("/v1/chat/completions", json=asked | {"top_k": SECRET})
        _, stats = answer(clients["b"], "Where does it nest?", 24)
    assert failed.status_code == 400
    assert any(record.name.endswith("exchange") for record in caplog.records)
    logged = caplog.text + "".join(str(vars(record)) for record in caplog.records)
    metrics = clients["b"].get("/metrics").text
    assert "rasd_requests_total" in metrics
    for text in (SECRET, "heron", "willow", "sk-a", said):
        assert [text in where for where in (logged, metrics, json.dumps(stats))] == [False] * 3
