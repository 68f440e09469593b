"""What LangChain's retries, fallbacks, parsers and middlewares do with the errors of a call."""

from __future__ import annotations

import pickle
import warnings

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRetryMiddleware
from langchain_classic.memory import ConversationTokenBufferMemory
from langchain_classic.output_parsers import OutputFixingParser
from langchain_core import exceptions as langchain
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, trim_messages
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from scripted import WINDOW, scripted_model

from rasd_integrations import errors
from rasd_integrations.langchain import RASDLLM, ChatRASD


@pytest.fixture(scope="module")
def parts():
    """Return a model that always says the same, and its tokenizer."""
    return scripted_model(lambda _: "Paris.")


@pytest.fixture
def llm(parts):
    return ChatRASD.from_model(*parts, drafter=None, max_tokens=8)


CASES = [
    ({"max_tokens": WINDOW}, errors.PromptTooLongError, langchain.ContextOverflowError),
    ({"top_p": 5}, errors.ConfigurationError, langchain.ModelInvalidRequestError),
]


@pytest.mark.parametrize(("options", "ours", "theirs"), CASES)
async def test_an_error_is_ours_a_value_error_and_langchains_kind(llm, options, ours, theirs):
    """Fault 1: whoever catches by one of the three catches it, whole or streamed, sync or async."""
    for kind in (ours, theirs, ValueError):
        with pytest.raises(kind):
            llm.invoke("Hi", **options)
        with pytest.raises(kind):
            list(llm.stream("Hi", **options))
        with pytest.raises(kind):
            await llm.ainvoke("Hi", **options)
        with pytest.raises(kind) as caught:
            _ = [chunk async for chunk in llm.astream("Hi", **options)]
    assert str(caught.value) == str(pickle.loads(pickle.dumps(caught.value)))


@pytest.mark.parametrize(("options", "ours", "theirs"), CASES)
def test_the_plain_text_model_raises_the_same(parts, options, ours, theirs):
    """Both classes share the types."""
    llm = RASDLLM.from_model(*parts, drafter=None, max_tokens=8)
    for kind in (ours, theirs):
        with pytest.raises(kind):
            llm.invoke("Hi", **options)
        with pytest.raises(kind):
            list(llm.stream("Hi", **options))


def test_an_empty_prompt_is_an_invalid_request(llm):
    """A prompt that cannot be decoded from is of LangChain's kind too."""
    with pytest.raises(langchain.ModelInvalidRequestError, match="empty") as caught:
        llm.invoke(" ")
    assert isinstance(caught.value, errors.PromptError)


def test_a_missing_model_is_not_found(tmp_path):
    """A model that is not there is of LangChain's kind too."""
    with pytest.raises(langchain.ModelNotFoundError) as caught:
        ChatRASD(model=str(tmp_path / "none.gguf")).invoke("Hi")
    assert isinstance(caught.value, errors.ModelLoadError)


def test_a_retry_middleware_does_not_repeat_what_cannot_help(llm, monkeypatch):
    """An error of unknown kind would be tried again; these say that it would not help."""
    asked = []
    original = type(llm)._request
    monkeypatch.setattr(type(llm), "_request", lambda *a: asked.append(1) or original(*a))
    retry = ModelRetryMiddleware(max_retries=3, initial_delay=0.0, on_failure="error")
    agent = create_agent(llm.model_copy(update={"top_p": 5.0}), middleware=[retry])
    with pytest.raises(errors.ConfigurationError, match="top_p"):
        agent.invoke({"messages": [HumanMessage("Hi")]})
    assert [1] == asked


def test_fallbacks_retries_and_parsers(llm):
    """A fallback answers in its place, a retry raises it in the end, and no parser takes it for an answer."""
    broken = llm.bind(max_tokens=WINDOW)
    spare = FakeListChatModel(responses=["from the spare"])
    narrow = broken.with_fallbacks([spare], exceptions_to_handle=(errors.ContextOverflowError,))
    fixing = OutputFixingParser.from_llm(llm=spare, parser=JsonOutputParser())

    assert (narrow | StrOutputParser()).invoke("Hi") == "from the spare"
    with pytest.raises(errors.ContextOverflowError):
        broken.with_retry(stop_after_attempt=2, wait_exponential_jitter=False).invoke("Hi")
    with pytest.raises(errors.ContextOverflowError):
        (broken | fixing).invoke("Hi")


@pytest.mark.parametrize("strategy", ["first", "last"])
def test_trimming_counts_with_the_model(llm, strategy):
    """Fault 4: parts that begin with the assistant, empty answers and nothing at all are counted."""
    history = [
        HumanMessage("Hello"),
        AIMessage("Hi, what is it?"),
        HumanMessage("Where is Paris?"),
        AIMessage(""),
        HumanMessage("In France?"),
    ]
    kept = trim_messages(history, max_tokens=60, strategy=strategy, token_counter=llm)

    assert 0 < len(kept) < len(history)
    assert 0 == llm.get_num_tokens_from_messages([])
    assert llm.get_num_tokens_from_messages(history[1:2]) > 0


def test_a_token_buffer_memory_forgets(llm):
    """Fault 4: classic memories count what they hold, also nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # memories are deprecated there
        memory = ConversationTokenBufferMemory(llm=llm, max_token_limit=10, return_messages=True)
    memory.save_context({"input": "Hello there"}, {"output": "Hi, what is it?"})

    assert [] == memory.load_memory_variables({})["history"]
