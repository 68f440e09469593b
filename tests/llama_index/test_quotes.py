"""Quotes in LlamaIndex: in ``raw`` of every endpoint, and which nodes of a response are quoted."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import NODES, QUESTION, WAYS, history
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.llms import ChatResponse
from llama_index.core.schema import NodeWithScore
from scripted import scripted_model

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.llama_index import RASDLLM, quoted_nodes, response_quotes

SPAN = "The lighthouse at Cape Wrath was built by Robert Stevenson"
SAID = f"It is said: {SPAN}, I think."
START = SAID.index(SPAN)


@pytest.fixture(params=["auto", None], ids=["drafting", "plain"])
def llm(request):
    """Return an LLM that says one thing; its process saw no retrieval yet."""
    llm = RASDLLM.from_model(
        *scripted_model(lambda prompt: SAID), drafter=request.param, max_tokens=300
    )
    llm._trace._retrievals.clear()  # of the tests before
    return llm


def raws(llm, monkeypatch):
    """Return a list that fills with the ``raw`` of the answers."""
    from rasd_integrations.llama_index import responses

    found = []
    inner = responses.raw_response
    monkeypatch.setattr(
        responses, "raw_response", lambda *given: found.append(inner(*given)) or found[-1]
    )
    return found


async def response_of(engine, how):
    """Ask a query engine in one of four ways and return its response, read to the end."""
    if how in ("sync", "stream"):
        response = engine.query(QUESTION)
        return response.get_response() if how == "stream" else response
    response = await engine.aquery(QUESTION)
    return await response.get_response() if how == "astream" else response


@pytest.mark.parametrize("how", WAYS)
async def test_a_query_engine_says_which_nodes_it_quotes(any_index, llm, how, monkeypatch):
    """In every store and by every way to ask: ``raw`` has the span, the helper has the node."""
    found = raws(llm, monkeypatch)
    engine = any_index.as_query_engine(llm=llm, streaming="stream" in how)
    response = await response_of(engine, how)
    assert [n.node.node_id for n in response.source_nodes] == ["n0", "n1"]
    (quote,) = found[-1]["rasd"]["quotes"]
    assert (quote["start"], quote["text"], quote["chunk_id"]) == (START, SPAN, "n0")
    assert (
        quote["chunk_start"] == 0
    )  # of the node's text, not of the file name that prompts show before
    assert quote["metadata"]["file_name"] == "f0.txt"
    assert [n.node.node_id for n in quoted_nodes(response)] == ["n0"]
    (same,) = response_quotes(response)
    assert (same.start, same.text, same.chunk_id, same.chunk_start) == (START, SPAN, "n0", 0)


def sent():
    return f"{NODES[0].text}\n\n{NODES[1].text}\n\n{QUESTION}"


ENDPOINTS = ("complete", "stream_complete", "acomplete", "astream_complete", "chat", "stream_chat", "achat", "astream_chat")  # fmt: skip


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_every_endpoint_carries_them_on_its_last_response(llm, endpoint):
    """The nodes may also be given to the call itself."""
    given = sent() if "complete" in endpoint else [ChatMessage(role="user", content=sent())]
    out = getattr(llm, endpoint)(given, rasd={"chunks": NODES})
    if endpoint.startswith("a"):
        out = await out
    if endpoint.startswith("stream"):
        responses = list(out)
    elif endpoint.startswith("astream"):
        responses = [r async for r in out]
    else:
        responses = [out]
    assert not any(r.raw for r in responses[:-1])
    (quote,) = responses[-1].raw["rasd"]["quotes"]
    assert (quote["text"], quote["chunk_id"]) == (SPAN, "n0")


@pytest.mark.parametrize("streams", [False, True])
def test_a_chat_engine_says_which_nodes_it_quotes(index, llm, streams):
    """Its responses know their nodes as well; a stream when it has been read."""
    engine = ContextChatEngine.from_defaults(
        retriever=index.as_retriever(), llm=llm, memory=history()
    )
    response = engine.stream_chat(QUESTION) if streams else engine.chat(QUESTION)
    if streams:
        list(response.response_gen)
    assert [n.node.node_id for n in quoted_nodes(response)] == ["n0"]


def test_nodes_and_a_text_do_as_well():
    """For pipelines of one's own: what was retrieved, and what was said."""
    nodes = [NodeWithScore(node=node, score=1.0) for node in NODES]
    assert quoted_nodes(nodes, SAID) == nodes[:1]
    assert quoted_nodes(nodes, "Nothing of it at all, I fear.") == []
    assert [q.chunk_id for q in response_quotes(nodes, f"{SAID} {NODES[2].text}")] == ["n0", "n2"]


def test_a_stream_that_was_read_elsewhere_needs_its_text(index, llm):
    """Half an answer has other quotes, so it is refused; the text may be given."""
    response = index.as_query_engine(llm=llm, streaming=True).query(QUESTION)
    text = next(response.response_gen)
    with pytest.raises(ConfigurationError, match="give its text as answer="):
        quoted_nodes(response)
    text += "".join(response.response_gen)
    with pytest.raises(ConfigurationError, match="StreamingResponse"):
        quoted_nodes(response)
    assert [n.node.node_id for n in quoted_nodes(response, text)] == ["n0"]
    unread = index.as_query_engine(llm=llm, streaming=True).query(QUESTION)
    assert [n.node.node_id for n in quoted_nodes(unread)] == ["n0"]
    assert str(unread) == SAID


async def nothing():
    yield ""


@pytest.mark.parametrize(
    "given",
    [
        lambda: (AsyncStreamingResponse(nothing(), []), None),
        lambda: ([NodeWithScore(node=NODES[0])], None),
        lambda: (ChatResponse(message=ChatMessage(content=SAID)), SAID),
    ],
    ids=["unread", "no text", "no nodes"],
)
async def test_what_is_missing_is_named(given):
    """A response whose text or nodes are not known is refused, with what to do."""
    response, text = given()
    with pytest.raises(ConfigurationError, match=r"answer=|raw\['rasd'\]\['quotes'\]"):
        response_quotes(response, text)


def test_an_empty_response_quotes_nothing():
    """LlamaIndex says "None" or "Empty Response" where nothing was found."""
    assert quoted_nodes(Response(None, [NodeWithScore(node=NODES[0])])) == []
