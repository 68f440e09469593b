"""RASDLLM answers the prompts of one call at the same time: order, errors, limits."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from fakes_langchain import Answer
from langchain_core.caches import InMemoryCache

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain import RASDLLM
from rasd_integrations.response_format import Grammar
from rasd_integrations.types import TextDelta

LONG = "word " * 5000


pytestmark = pytest.mark.usefixtures("fake_engine")


@pytest.fixture
def llm():
    llm = RASDLLM(model="org/one")
    llm._rasd.answer = lambda prompt: f"answer to {prompt}"
    return llm


PROMPTS = [f"p{i}" for i in range(8)]
ANSWERS = [f"answer to {prompt}" for prompt in PROMPTS]


@pytest.mark.parametrize("how", ["batch", "generate"])
def test_prompts_are_answered_at_the_same_time_in_order(llm, how):
    """Every answer waits for all to have begun; the results stand as the prompts do."""
    everyone = threading.Barrier(len(PROMPTS), timeout=30)
    llm._rasd.answer = lambda prompt: everyone.wait() * 0 or f"answer to {prompt}"
    if how == "batch":
        assert ANSWERS == llm.batch(PROMPTS)
    else:
        assert ANSWERS == [g[0].text for g in llm.generate(PROMPTS).generations]


class Waiting(Answer):
    """An answer that begins when so many are under way."""

    def wait_for(self, engine, count):
        self.ready = lambda: engine.most_open_streams >= count
        return self

    def pieces(self):
        end = time.monotonic() + 30
        while not self.ready():
            assert time.monotonic() < end, "the others never began"
            yield TextDelta("")
        yield from super().pieces()


async def test_prompts_are_answered_at_the_same_time_on_an_event_loop(llm):
    """The same for the asynchronous call."""
    engine = llm._rasd
    engine.answer = lambda prompt: Waiting(f"answer to {prompt}").wait_for(engine, len(PROMPTS))
    assert ANSWERS == await llm.abatch(PROMPTS)
    engine.most_open_streams = 0
    result = await llm.agenerate(PROMPTS)
    assert ANSWERS == [g[0].text for g in result.generations]


def test_max_concurrency_is_a_limit(llm):
    """LangChain hands over as many prompts at once as the limit allows."""
    pair = threading.Barrier(2, timeout=30)
    llm._rasd.answer = lambda prompt: pair.wait() * 0 or f"answer to {prompt}"
    assert ANSWERS == llm.batch(PROMPTS, config={"max_concurrency": 2})
    assert 2 == llm._rasd.most_open_streams


async def test_a_long_list_is_not_begun_all_at_once(llm):
    """A call with more prompts than may run at once begins the rest as the first end."""
    engine = llm._rasd
    engine.answer = lambda prompt: Waiting(f"answer to {prompt}").wait_for(engine, 32)
    prompts = [f"p{i}" for i in range(80)]
    assert [f"answer to {p}" for p in prompts] == await llm.abatch(prompts)
    assert 32 == engine.most_open_streams


class Endless(Answer):
    """An answer that goes on until nobody asks for more, or for ten seconds."""

    ran_out = False

    def pieces(self):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            yield TextDelta(" word")
        self.ran_out = True


def test_an_error_ends_the_others(llm):
    """The first error is raised; answers that are under way stop within a step, none is left open."""
    begun = threading.Barrier(3, timeout=30)
    others = [Endless(), Endless()]

    def answer(prompt):
        begun.wait()
        if prompt == "bad":
            msg = "the engine is out of order"
            raise RuntimeError(msg)
        return others[prompt == "longer"]

    llm._rasd.answer = answer
    with pytest.raises(RuntimeError, match="out of order"):
        llm.batch(["long", "bad", "longer"])
    assert (3, 0) == (llm._rasd.most_open_streams, llm._rasd.open_streams)
    assert [False, False] == [other.ran_out for other in others]


async def test_an_error_ends_the_others_on_an_event_loop(llm):
    """The same for the asynchronous call."""
    llm._rasd.answer = lambda prompt: LONG if prompt != "bad" else 1 / 0
    with pytest.raises(ZeroDivisionError):
        await llm.abatch(["long", "bad", "longer"])
    assert 0 == llm._rasd.open_streams
    assert llm._rasd.steps < 100


async def test_cancelling_ends_all(llm):
    """A cancelled call leaves no stream open."""
    begun = asyncio.Event()

    def answer(prompt):
        if llm._rasd.open_streams == 3:
            begun.set()
        return LONG

    llm._rasd.answer = answer
    task = asyncio.create_task(llm.abatch(["one", "two", "three"]))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 0 == llm._rasd.open_streams
    assert llm._rasd.steps < 100


def test_exceptions_may_be_returned_with_the_answers(llm):
    """LangChain's `return_exceptions` sees the error in the place of each prompt."""

    def answer(prompt):
        if prompt == "p3":
            msg = "no"
            raise RuntimeError(msg)
        return f"answer to {prompt}"

    llm._rasd.answer = answer
    results = llm.batch(PROMPTS, config={"max_concurrency": 1}, return_exceptions=True)
    assert [*ANSWERS[:3], *ANSWERS[4:]] == [r for r in results if isinstance(r, str)]
    assert isinstance(results[3], RuntimeError)


def test_no_prompts_are_no_answers(llm):
    """An empty call is no fault."""
    assert [] == llm.batch([])
    assert [] == llm.generate([]).generations


def test_a_cached_prompt_takes_no_part(llm):
    """Only what the cache does not know is answered, in its place."""
    llm = llm.model_copy(update={"cache": InMemoryCache()})
    llm.batch(PROMPTS[:3])
    assert ANSWERS == llm.batch(PROMPTS)
    assert len(PROMPTS) == len(llm._rasd.calls)


def test_a_completion_may_be_held_to_a_form(llm):
    """A plain text model takes a response format; tools it refuses."""
    llm.invoke("x", response_format={"type": "json_object"})
    assert Grammar.json_object() == llm._rasd.calls[-1].params.grammar
    with pytest.raises(ConfigurationError, match="functions"):
        llm.invoke("x", functions=[{"name": "f"}])
