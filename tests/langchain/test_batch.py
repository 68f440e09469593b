"""Answers of one call at the same time: their order, errors and limits, and that all stop with their caller."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager

import pytest
from fakes_langchain import Answer
from langchain_core.caches import InMemoryCache
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.langchain import RASDLLM, ChatRASD
from rasd_integrations.runtime import admission
from rasd_integrations.runtime.admission import Admission
from rasd_integrations.runtime.together import as_they_end
from rasd_integrations.types import TextDelta

PROMPTS = [f"p{i}" for i in range(8)]
ANSWERS = [f"answer to {prompt}" for prompt in PROMPTS]
LONG = "word " * 5000


def answering(llm, answer):
    """Let the engine say `answer(text of the prompt)`."""
    text = lambda prompt: prompt if isinstance(prompt, str) else prompt[-1]["content"]  # noqa: E731
    llm._rasd.answer = lambda prompt: answer(text(prompt))
    return llm


def texts(answers):
    return [a if isinstance(a, str | Exception) else a.text for a in answers]


@pytest.fixture(params=[ChatRASD, RASDLLM])
def either(request, fake_engine):
    """Return a model of each kind."""
    return answering(request.param(model="org/one"), "answer to {}".format)


@pytest.fixture
def llm(fake_engine):
    """Return a completion model, which LangChain hands all prompts of a call at once."""
    return answering(RASDLLM(model="org/one"), "answer to {}".format)


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


class Endless(Answer):
    """An answer that goes on until nobody asks for more, or for ten seconds."""

    ran_out = False

    def pieces(self):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            yield TextDelta(" word")
        self.ran_out = True


# --- order and limits ---


def test_prompts_are_answered_at_the_same_time_in_order(either):
    """Every answer waits for all to have begun; the results are in the order of the prompts."""
    everyone = threading.Barrier(len(PROMPTS), timeout=30)
    answering(either, lambda prompt: everyone.wait() * 0 or f"answer to {prompt}")
    assert ANSWERS == texts(either.batch(PROMPTS, config={"max_concurrency": len(PROMPTS)}))
    if isinstance(either, RASDLLM):
        assert ANSWERS == [g[0].text for g in either.generate(PROMPTS).generations]


async def test_prompts_are_answered_at_the_same_time_on_an_event_loop(either):
    """The same for the asynchronous call."""
    engine = either._rasd
    answering(either, lambda p: Waiting(f"answer to {p}").wait_for(engine, len(PROMPTS)))
    assert ANSWERS == texts(await either.abatch(PROMPTS))
    if isinstance(either, RASDLLM):
        engine.most_open_streams = 0
        result = await either.agenerate(PROMPTS)
        assert ANSWERS == [g[0].text for g in result.generations]


def test_max_concurrency_is_a_limit(either):
    """No more prompts run at once than the limit allows."""
    pair = threading.Barrier(2, timeout=30)
    answering(either, lambda prompt: pair.wait() * 0 or f"answer to {prompt}")
    assert ANSWERS == texts(either.batch(PROMPTS, config={"max_concurrency": 2}))
    assert 2 == either._rasd.most_open_streams


async def test_a_long_list_is_not_begun_all_at_once(llm):
    """A call with more prompts than may run at once begins the rest as the first end."""
    engine = llm._rasd
    answering(llm, lambda prompt: Waiting(f"answer to {prompt}").wait_for(engine, 32))
    prompts = [f"p{i}" for i in range(80)]
    assert [f"answer to {p}" for p in prompts] == await llm.abatch(prompts)
    assert 32 == engine.most_open_streams


def test_no_prompts_are_no_answers(either):
    """An empty call is no fault."""
    assert [] == either.batch([])
    assert [] == either.generate([]).generations


def test_a_cached_prompt_takes_no_part(llm):
    """Only what the cache does not know is answered, in its place."""
    llm = llm.model_copy(update={"cache": InMemoryCache()})
    llm.batch(PROMPTS[:3])
    assert ANSWERS == llm.batch(PROMPTS)
    assert len(PROMPTS) == len(llm._rasd.calls)


# --- errors, and callers that leave ---


@pytest.mark.parametrize("how", ["batch", "batch_as_completed"])
def test_an_error_ends_the_others(either, how):
    """Fault 5: the first error is raised; answers under way stop within a step, none is left open."""
    begun = threading.Barrier(3, timeout=30)
    others = [Endless(), Endless()]

    def answer(prompt):
        begun.wait()
        return 1 / 0 if prompt == "bad" else others[prompt == "longer"]

    answering(either, answer)
    with pytest.raises(ZeroDivisionError):
        list(getattr(either, how)(["long", "bad", "longer"]))
    assert (3, 0) == (either._rasd.most_open_streams, either._rasd.open_streams)
    assert [False, False] == [other.ran_out for other in others]


async def test_an_error_ends_the_others_on_an_event_loop(llm):
    """The same for the asynchronous call."""
    answering(llm, lambda prompt: LONG if prompt != "bad" else 1 / 0)
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

    answering(llm, answer)
    task = asyncio.create_task(llm.abatch(["one", "two", "three"]))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 0 == llm._rasd.open_streams
    assert llm._rasd.steps < 100


def test_exceptions_may_be_returned_with_the_answers(either):
    """LangChain's `return_exceptions` gives the error in the place of its prompt."""
    answering(either, lambda prompt: f"answer to {prompt}" if prompt != "p3" else 1 / 0)
    results = either.batch(PROMPTS, config={"max_concurrency": 1}, return_exceptions=True)
    assert isinstance(results[3], ZeroDivisionError)
    assert [*ANSWERS[:3], *ANSWERS[4:]] == texts([*results[:3], *results[4:]])
    assert 1 == either._rasd.most_open_streams


def test_a_caller_that_leaves_stops_all(either):
    """Fault 5: after the first answer nobody waits for the others any more."""
    answering(either, lambda prompt: "soon" if prompt == "one" else Endless())
    ended = either.batch_as_completed(["one", "two", "three"])
    number, answer = next(ended)
    ended.close()
    assert (0, ["soon"], 0) == (number, texts([answer]), either._rasd.open_streams)


def test_an_interrupted_caller_stops_all():
    """Fault 5: what waits for its turn never begins, what runs is waited for."""
    begun, ran = threading.Event(), []

    def job(number: int) -> int:
        ran.append(number)
        begun.set()
        time.sleep(0.05)
        return number

    ended = as_they_end([lambda n=n: job(n) for n in range(50)], limit=2)
    next(ended)
    assert begun.is_set()
    with pytest.raises(KeyboardInterrupt):
        ended.throw(KeyboardInterrupt)
    count = len(ran)
    time.sleep(0.1)
    assert count == len(ran) < 10


# --- memory ---


@pytest.fixture(params=[ChatRASD, RASDLLM])
def scarce(request, monkeypatch):
    """Return a real model of each kind, and a gate that admits one answer at a time and records how many ran."""

    class Watched(Admission):
        seen: tuple[int, ...] = ()

        @contextmanager
        def admit(self, nbytes, cancelled=None):
            with super().admit(nbytes, cancelled):
                self.seen = (*self.seen, self.live)
                yield

    gate = Watched(1)
    monkeypatch.setattr(admission, "shared_admission", lambda device: gate)
    return request.param.from_model(tiny_llama(), tiny_tokenizer(), max_tokens=8), gate


def soon(call):
    """Return what ``call`` does in another thread, which must not hang."""
    ended: list[object] = []
    thread = threading.Thread(target=lambda: ended.append(call()), daemon=True)
    thread.start()
    thread.join(30)
    assert ended, "it hangs"
    return ended[0]


def test_answers_over_the_limit_of_memory_wait_for_one_another(scarce):
    """One by one, each whole and in its place."""
    llm, gate = scarce
    alone = [text for prompt in PROMPTS for text in texts([llm.invoke(prompt)])]
    assert alone == soon(lambda: texts(llm.batch(PROMPTS)))
    assert gate.seen == (1,) * 2 * len(PROMPTS)


def test_a_stream_that_is_held_open_holds_up_no_other_answer(scarce):
    """A consumer that asks for another answer before it ends its stream does not wait for itself."""
    llm, gate = scarce

    def nested():
        stream = llm.stream("p1")
        next(stream)
        inner = texts([llm.invoke("p2"), *llm.batch(["p2", "p3"])])
        return inner, len([*stream])

    (first, again, _), rest = soon(nested)
    assert (first, rest > 0) == (again, True)
    assert gate.seen == (1, 1, 1)


def test_answers_that_wait_for_memory_leave_with_their_caller(scarce):
    """An error in one ends the call while another answer holds all memory."""
    llm, gate = scarce

    def failing():
        with pytest.raises(ValueError, match="empty"):
            llm.batch(["p1", ""])
        return gate.waiting

    with gate.admit(1):
        assert soon(failing) == 0
    assert gate.seen == (1,)
