"""Ctrl-C at every line of what answers share: the next answer comes, and is right."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
from interrupts import Place, Tracer
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, SamplingParams, process
from rasd_integrations.decoding import decoder
from rasd_integrations.engine import step_queue, target
from rasd_integrations.engine.kv import buffer, prefix_cache
from rasd_integrations.runtime import admission, pipeline, rasd

SOON_S = 30.0
DOCUMENT = "The river rises in the hills and ends in the sea. It is long. " * 2
PROMPT = DOCUMENT + "Where does it rise?"
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)
LONGER = SamplingParams(max_tokens=12, ignore_eos=True)
QUEUE = (step_queue, process, decoder)
SHARED = (*QUEUE, target, buffer, prefix_cache, admission, pipeline, rasd)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def engine(model) -> RASD:
    return RASD.from_model(model, tiny_tokenizer(), drafter="auto")


def ask(engine: RASD, params: SamplingParams = PARAMS) -> tuple[int, ...]:
    return engine.generate(PROMPT, params).token_ids


def soon(engine: RASD, params: SamplingParams = PARAMS) -> tuple[int, ...]:
    """Ask in another thread, which must not hang."""
    answers: list[tuple[int, ...]] = []
    thread = threading.Thread(target=lambda: answers.append(ask(engine, params)), daemon=True)
    thread.start()
    thread.join(SOON_S)
    return answers[0] if answers else ()


def check_kept(engine: RASD) -> None:
    """See that what is kept for later prompts holds the rows that a fresh prefill makes."""
    own = engine._engine.decoder()
    for entry in own.prefix_cache._entries:
        assert not entry.in_use
        ids, kept = entry.ids.tolist(), entry.buffer
        fresh = buffer.KVBuffer(len(ids))
        for _ in own.target.prefill(ids, fresh):
            pass
        for layer in range(kept.num_layers):
            mine, expected = kept.rows(layer, 0, len(ids)), fresh.rows(layer, 0, len(ids))
            torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-3)


def check_sane(engine: RASD) -> None:
    """See that nothing is under way, and that counters are no nonsense."""
    own, gate = engine._engine.decoder(), admission.shared_admission(torch.device("cpu"))
    if (
        gate.live
    ):  # a place that an interrupt left goes with its frames, which Python 3.13 ties in a circle
        gc.collect()
    assert (gate.live, gate.waiting) == (0, 0)
    assert own.target._turns._leader is None
    assert 0 <= engine.stats.accepted <= engine.stats.drafted
    assert engine.stats.faults == ()


def places(engine: RASD, *modules: ModuleType) -> list[Place]:
    """Return every line once, where it is reached for the last time: in the midst of the answer or at its end."""
    tracer = Tracer(*modules)
    tracer.run(lambda: ask(engine))
    return list({place[:3]: place for place in tracer.reached}.values())


@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_the_next_answer_right(model):
    """Fault 18: one answer, interrupted once at every line of what answers share."""
    expected = ask(engine(model))
    mine, lines = engine(model), set()
    ask(mine)
    for n, place in enumerate(places(mine, *SHARED)):
        tracer = Tracer(*SHARED)
        try:
            assert tracer.run(lambda: ask(mine), place) == expected
        except KeyboardInterrupt:
            lines.add(place[:3])
        assert soon(mine) == expected, place
        check_sane(mine)
        if n % 10 == 0:
            check_kept(mine)
    check_kept(mine)
    assert len(lines) > 250


@pytest.mark.slow
def test_an_interrupt_beside_another_answer_leaves_both_right(model):
    """Fault 18: the same with a second answer at work, which leads or waits."""
    expected, longer = (ask(engine(model), params) for params in (PARAMS, LONGER))
    mine, lines = engine(model), set()
    ask(mine)
    for place in places(mine, *QUEUE):
        tracer, begun = Tracer(*QUEUE), threading.Event()
        pool = ThreadPoolExecutor(2)

        def other(begun: threading.Event = begun) -> tuple[int, ...]:
            out: tuple[int, ...] = ()
            for chunk in mine.stream(PROMPT, LONGER):
                out += chunk.token_ids
                begun.set()
            return out

        def interrupted(tracer: Tracer = tracer, place: Place = place) -> None:
            try:
                assert tracer.run(lambda: ask(mine), place) == expected
            except KeyboardInterrupt:
                lines.add(place[:3])

        beside = pool.submit(other)
        assert begun.wait(SOON_S)
        pool.submit(interrupted).result(SOON_S)
        assert beside.result(SOON_S) == longer, place
        pool.shutdown()
        assert soon(mine) == expected, place
        check_sane(mine)
    check_kept(mine)
    assert len(lines) > 120
