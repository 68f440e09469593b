"""LangChain over a model behind HTTP: what a chain retrieved arrives there, and errors are of LangChain's kinds."""

from __future__ import annotations

import pickle

import pytest
from fake_server import ANSWER, OTHER, RASD, Says, fake_server, piece
from langchain_core import exceptions as langchain
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from rasd_integrations import errors
from rasd_integrations.langchain import RASDLLM, ChatRASD

PROMPT = ChatPromptTemplate.from_template("Context:\n{context}\n\nQuestion: {question}")
QUOTED = {
    "start": 0,
    "end": 4,
    "text": "Four",
    "chunk_id": "a",
    "chunk_start": 0,
    "metadata": {"source": "s"},
}
STATS = {"mode": "lossless", "prompt_tokens": 7, "generated_tokens": 2, "quotes": [QUOTED]}
OWN = Says([piece(content="Four."), piece("stop", STATS)])


@pytest.fixture
def server():
    with fake_server(OWN) as found:
        yield found


def chain(llm, retriever):
    """Return the usual chain of retrieval."""
    found = {"context": retriever | _joined, "question": RunnablePassthrough()}
    return found | PROMPT | llm


def _joined(documents):
    return "\n\n".join(document.page_content for document in documents)


@pytest.mark.parametrize("way", ["sync", "async", "stream", "batch"])
async def test_what_a_chain_retrieved_arrives_at_the_server(server, retriever, way):
    """The chunks, in order, and the question, though the prompt has them in one text."""
    llm = ChatRASD(base_url=server.base_url)
    asked = "Which planet is the largest?"
    made = chain(llm, retriever) | StrOutputParser()
    if way == "sync":
        assert "Four." == made.invoke(asked)
    elif way == "async":
        assert "Four." == await made.ainvoke(asked)
    elif way == "stream":
        assert "Four." == "".join(made.stream(asked))
    else:
        assert ["Four."] == made.batch([asked])
    llm.close()

    expected = [document.page_content for document in retriever.invoke(asked)]
    (body,) = server.bodies
    assert expected == [chunk["text"] for chunk in body["rasd"]["chunks"]]
    assert (asked, 2) == (body["rasd"]["question"], len(expected))


def test_the_plain_text_model_sends_them_as_well(server, retriever):
    """By the endpoint for plain texts."""
    server.says = [Says([{"choices": [{"text": "Four.", "finish_reason": "stop", "rasd": STATS}]}])]
    with RASDLLM(base_url=server.base_url) as llm:
        assert "Four." == chain(llm, retriever).invoke("Which planet?")

    assert "/v1/completions" == server.paths[-1]
    assert 2 == len(server.bodies[0]["rasd"]["chunks"])


def test_quotes_come_back_as_citations(server):
    """The server finds them; the message shows them as ours do."""
    with ChatRASD(base_url=server.base_url) as llm:
        answer = llm.invoke("2 + 2?")

    (block,) = answer.content_blocks
    assert ("Four", "s") == (
        block["annotations"][0]["cited_text"],
        block["annotations"][0]["title"],
    )
    assert ("one", "lossless") == (
        answer.response_metadata["model_name"],
        answer.response_metadata["rasd"]["mode"],
    )


def test_the_profile_knows_the_window():
    """Of a server that tells it; of another the rest of the profile."""
    with fake_server(cards=[RASD]) as server:
        assert 2048 - 512 == ChatRASD(base_url=server.base_url).load().profile["max_input_tokens"]
    with fake_server(cards=[RASD | {"rasd": {"max_tokens": 100}}]) as server:
        profile = ChatRASD(base_url=server.base_url).load().profile
        assert (2048 - 100, 100) == (profile["max_input_tokens"], profile["max_output_tokens"])
        given = ChatRASD(base_url=server.base_url, profile={"max_output_tokens": 7})
        assert given.load().profile["max_output_tokens"] == 7
    with fake_server(cards=[OTHER]) as server:
        profile = ChatRASD(base_url=server.base_url).load().profile
    assert ("max_input_tokens" in profile, profile["max_output_tokens"]) == (False, 512)


def failing(status, code=None):
    """Return an answer with OpenAI's error object."""
    return Says(status=status, body={"error": {"message": "Not so.", "code": code}})


KINDS = {
    "busy": (failing(429, "busy"), langchain.ModelRateLimitError, True),
    "key": (failing(401), langchain.ModelAuthenticationError, False),
    "door": (failing(403), langchain.ModelPermissionDeniedError, False),
    "failed": (failing(500), langchain.ModelAPIError, True),
    "late": (failing(504), langchain.ModelTimeoutError, True),
    "silent": (Says([ANSWER[0], 5.0]), langchain.ModelTimeoutError, True),
    "cut": (Says(ANSWER[:1], whole=False), langchain.ModelConnectionError, True),
    "model": (failing(404, "model_not_found"), langchain.ModelNotFoundError, False),
    "option": (failing(400, "invalid_option"), langchain.ModelInvalidRequestError, False),
}  # fmt: skip


@pytest.mark.parametrize("fault", KINDS)
async def test_a_servers_fault_is_of_langchains_kind(fault):
    """Middlewares and ``with_retry`` see what can succeed next time; who catches ours catches it, too."""
    says, kind, again = KINDS[fault]
    with fake_server(says) as server:
        llm = ChatRASD(
            base_url=server.base_url, max_retries=0, timeout=0.1 if fault == "silent" else 5
        )
        with pytest.raises(kind) as caught:
            llm.invoke("2 + 2?")
        with pytest.raises(kind):
            _ = [chunk async for chunk in llm.astream("2 + 2?")]
        llm.close()

    assert isinstance(caught.value, errors.RASDError)
    assert again is caught.value.is_retryable
    assert str(caught.value) == str(pickle.loads(pickle.dumps(caught.value)))


def test_a_prompt_that_is_too_long_is_an_overflow_with_sizes():
    """Summarising middlewares shorten the conversation after it."""
    told = {"message": "Too long.", "code": "context_length_exceeded",
            "rasd": {"prompt_tokens": 5000, "max_tokens": 100, "window": 4096}}  # fmt: skip
    says = Says(status=400, body={"error": told})
    with fake_server(says) as server, pytest.raises(langchain.ContextOverflowError) as caught:
        ChatRASD(base_url=server.base_url).invoke("Who?")

    assert (5000, 100, 4096) == (
        caught.value.prompt_tokens,
        caught.value.max_tokens,
        caught.value.window,
    )


def test_with_retry_asks_again():
    """LangChain's own retries take the error of a busy server for what it is."""
    with fake_server(failing(429, "busy"), OWN) as server:
        llm = ChatRASD(base_url=server.base_url, max_retries=0)
        again = llm.with_retry(
            retry_if_exception_type=(langchain.ModelRateLimitError,), wait_exponential_jitter=False
        )
        assert "Four." == again.invoke("2 + 2?").content

    assert 2 == len(server.bodies)


def test_configurable_fields_ask_another_server(server):
    """A copy with another address has connections of its own."""
    from langchain_core.runnables import ConfigurableField

    with fake_server(OWN, cards=[{**RASD, "id": "two"}]) as other:
        llm = ChatRASD(base_url=server.base_url).configurable_fields(
            base_url=ConfigurableField("where")
        )
        names = [
            llm.invoke("2 + 2?", config=config).response_metadata["model_name"]
            for config in ({}, {"configurable": {"where": other.base_url}}, {})
        ]

    assert ["one", "two", "one"] == names
