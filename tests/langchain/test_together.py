"""Chat answers of one call at the same time: their order, their limit, and that all stop with their caller."""

from __future__ import annotations

import threading
import time

import pytest
from fakes_langchain import Answer

from rasd_integrations.langchain import ChatRASD
from rasd_integrations.runtime.together import as_they_end
from rasd_integrations.types import TextDelta

QUESTIONS = ["one", "two", "three"]


class Endless(Answer):
    """An answer that goes on until nobody asks for more, or for ten seconds."""

    def pieces(self):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            yield TextDelta(" word")


@pytest.fixture
def llm(fake_engine):
    llm = ChatRASD(model="org/one")
    llm._rasd.answer = lambda prompt: f"answer to {prompt[-1]['content']}"
    return llm


def test_answers_stand_in_the_order_of_the_questions(llm):
    """Every answer waits for all to have begun."""
    everyone = threading.Barrier(len(QUESTIONS), timeout=30)
    llm._rasd.answer = lambda prompt: everyone.wait() * 0 or f"answer to {prompt[-1]['content']}"
    assert [f"answer to {q}" for q in QUESTIONS] == [m.content for m in llm.batch(QUESTIONS)]


@pytest.mark.parametrize("how", ["batch", "batch_as_completed"])
def test_an_error_stops_the_others(llm, how):
    """Fault 5: the first error is raised, and nothing is left running."""
    begun = threading.Barrier(len(QUESTIONS), timeout=30)

    def answer(prompt):
        begun.wait()
        return Endless() if prompt[-1]["content"] != "two" else 1 / 0

    llm._rasd.answer = answer
    with pytest.raises(ZeroDivisionError):
        list(getattr(llm, how)(QUESTIONS))
    assert (3, 0) == (llm._rasd.most_open_streams, llm._rasd.open_streams)


def test_an_error_may_stand_in_the_place_of_an_answer(llm):
    """LangChain's `return_exceptions` and `max_concurrency`."""
    llm._rasd.answer = lambda prompt: "fine" if prompt[-1]["content"] != "two" else 1 / 0
    config = {"max_concurrency": 1}
    answers = llm.batch(QUESTIONS, config=config, return_exceptions=True)
    assert isinstance(answers[1], ZeroDivisionError)
    assert ["fine", "fine"] == [answers[0].content, answers[2].content]
    assert 1 == llm._rasd.most_open_streams
    assert [] == llm.batch([])


def test_a_caller_that_leaves_stops_all(llm):
    """Fault 5: after the first answer nobody waits for the others any more."""
    first = lambda prompt: "soon" if prompt[-1]["content"] == "one" else Endless()  # noqa: E731
    llm._rasd.answer = first
    ended = llm.batch_as_completed(QUESTIONS)
    number, message = next(ended)
    ended.close()
    assert (0, "soon", 0) == (number, message.content, llm._rasd.open_streams)


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
