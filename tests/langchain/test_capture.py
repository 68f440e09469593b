"""The process's one callback handler: it costs nothing without a model, forgets in time, and never grows."""

from __future__ import annotations

import gc
import uuid

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda

from rasd_integrations.langchain import ChatRASD
from rasd_integrations.langchain.capture import CAPTURE, PromptCapture, content_key

PROMPT = ChatPromptTemplate.from_template("{context}\n{question}")
VALUES = {"context": "c", "question": "q"}


pytestmark = pytest.mark.usefixtures("fake_engine")


@pytest.fixture
def watched(monkeypatch):
    """The process's handler with nothing remembered of other tests."""
    gc.collect()
    for name in ("_runs", "_calls", "_loose"):
        getattr(CAPTURE, name).clear()
    return CAPTURE


class Owner:
    """Something that can be watched for."""


def test_nothing_is_kept_while_no_model_is_alive(watched):
    """The handler sees every chain of the process; without a model of ours it keeps nothing."""
    watched._owners.clear()
    (PROMPT | FakeListChatModel(responses=["a"])).invoke(VALUES)
    PROMPT.invoke(VALUES)
    assert [{}, {}, {}] == [watched._runs, watched._calls, watched._loose]


@pytest.mark.slow
def test_the_last_model_to_go_stops_the_capture(watched):
    """The handler holds models weakly: deleting the model is enough, a copy keeps it going."""
    watched._owners.clear()
    llm = ChatRASD(model="org/one")
    twin = llm.model_copy()
    del llm
    gc.collect()
    assert len(watched._owners) == 1
    del twin
    gc.collect()
    assert len(watched._owners) == 0


def test_a_finished_chain_leaves_no_run_behind(watched):
    """Whatever is remembered of a root run goes with it, failed ones too."""
    llm = ChatRASD(model="org/one")
    (PROMPT | llm).invoke(VALUES)
    list((PROMPT | llm).stream(VALUES))
    stream = (PROMPT | llm).stream(VALUES)
    next(stream)
    stream.close()
    with pytest.raises(ZeroDivisionError):
        (PROMPT | RunnableLambda(lambda _: 1 // 0)).invoke(VALUES)
    assert ({}, {}) == (watched._runs, watched._loose)


def test_other_models_calls_are_not_looked_at(watched):
    """Another provider's long prompts are never hashed at its call."""
    llm = ChatRASD(model="org/one")
    FakeListChatModel(responses=["a"]).invoke("Hi")
    assert {} == watched._calls
    llm.invoke("Hi")
    assert [content_key([HumanMessage("Hi")])] == list(watched._calls)


def test_the_variables_that_made_a_prompt_come_first(watched):
    """Of several templates of one chain, also before newer ones."""
    owner, root = Owner(), uuid.uuid4()
    watched.watch_for(owner)
    watched.on_chain_start({}, {"x": 1}, run_id=root)
    prompts = []
    for values in (VALUES, {"context": "c", "question": "another"}):
        made = uuid.uuid4()
        watched.on_chain_start({}, values, run_id=made, parent_run_id=root, run_type="prompt")
        prompts.append(PROMPT.format_prompt(**values))
        watched.on_chain_end(prompts[-1], run_id=made)
    messages = prompts[0].to_messages()
    call = {
        "run_id": uuid.uuid4(),
        "parent_run_id": root,
        "invocation_params": {"_type": "rasd-chat"},
    }
    watched.on_chat_model_start({}, [messages], **call)
    assert watched.lookup(messages).templates[0] == VALUES
    watched.on_chain_end("", run_id=root)


def test_abandoned_runs_and_loose_prompts_are_bounded():
    """Runs that never end, and prompts outside chains, push the oldest out."""
    capture, owner = PromptCapture(), Owner()
    capture.watch_for(owner)
    ids = [uuid.uuid4() for _ in range(20_000)]
    for run_id in ids:
        capture.on_chain_start({}, {"question": "q"}, run_id=run_id)
    assert 16_384 == len(capture._runs)
    assert ids[-1] in capture._runs
    for place in range(200):
        run_id = uuid.uuid4()
        capture.on_chain_start({}, {"question": f"{place}"}, run_id=run_id, run_type="prompt")
        value = ChatPromptTemplate.from_template("{question}").format_prompt(question=f"{place}")
        capture.on_chain_end(value, run_id=run_id)
    assert 64 == len(capture._loose)
    assert ({"question": "199"},) == capture.lookup([HumanMessage("199")]).templates


def test_the_key_is_of_types_and_texts():
    """Who says what decides; ids and where one message ends and the next begins do not blur."""
    one = [HumanMessage("ab"), AIMessage("c")]
    assert content_key(one) == content_key([HumanMessage("ab", id="7"), AIMessage("c")])
    others = [[HumanMessage("a"), AIMessage("bc")], [AIMessage("ab"), HumanMessage("c")], "abc"]
    assert 4 == len({content_key(prompt) for prompt in [one, *others]})


def test_lone_surrogates_have_a_key():
    """Text that is not valid Unicode is data like any other."""
    assert content_key("\ud800") != content_key("\ud801")


def test_a_fault_in_the_capture_never_fails_an_answer(monkeypatch, caplog):
    """A handler's error is LangChain's to log; the model answers."""
    llm = ChatRASD(model="org/one")

    def broken(*args, **kwargs):
        msg = "capture is broken"
        raise RuntimeError(msg)

    monkeypatch.setattr(PromptCapture, "_open", broken)
    assert (PROMPT | llm).invoke(VALUES).content
    assert "capture is broken" in caplog.text
