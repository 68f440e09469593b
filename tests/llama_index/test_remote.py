"""LlamaIndex over a model behind HTTP: what a pipeline retrieved arrives there, and contexts are packed."""

from __future__ import annotations

import pytest
from fake_server import OTHER, RASD, Says, fake_server, piece

pytest.importorskip("llama_index.core")

from contract_setup import FACT, FACTS, QUESTION, index_of
from llama_index.core.schema import TextNode

from rasd_integrations.errors import ConfigurationError, ServerError
from rasd_integrations.llama_index import RASDLLM

STATS = {"mode": "lossless", "prompt_tokens": 7, "generated_tokens": 2}
OWN = Says([piece(content="Four."), piece("stop", STATS)])


def tokens(body):
    """Return an answer of the server that counts: one token a letter."""
    return Says(body={"count": len(body), "tokens": [0] * len(body)})


@pytest.fixture
def server():
    with fake_server(OWN) as found:
        found.says = [OWN]
        found.next = lambda: OWN if "tokenize" not in found.paths[-1] else tokens("a word")
        yield found


@pytest.fixture
def index():
    return index_of(*(TextNode(text=text, id_=str(n)) for n, text in enumerate(FACTS)))


@pytest.mark.parametrize("way", ["sync", "async", "stream"])
async def test_what_an_engine_retrieved_arrives_at_the_server(server, index, way):
    """The nodes, in order, and the question; the index is not searched again."""
    llm = RASDLLM(base_url=server.base_url)
    engine = index.as_query_engine(llm=llm, similarity_top_k=2, streaming=way == "stream")
    said = await engine.aquery(QUESTION) if way == "async" else engine.query(QUESTION)
    assert "Four." == ("".join(said.response_gen) if way == "stream" else str(said))
    llm.close()

    (body,) = [body for body in server.bodies if "stream" in body]
    expected = [
        node.node.text for node in index.as_retriever(similarity_top_k=2).retrieve(QUESTION)
    ]
    assert expected == [chunk["text"] for chunk in body["rasd"]["chunks"]]
    assert (QUESTION, FACT) == (body["rasd"]["question"], expected[0])


def test_the_servers_window_and_name(server):
    """Or LlamaIndex's own default, where the server tells none."""
    known = RASDLLM(base_url=server.base_url).metadata
    assert (2048, 512, "one", True) == (
        known.context_window, known.num_output, known.model_name, known.is_function_calling_model
    )  # fmt: skip
    with fake_server(cards=[OTHER]) as other:
        assert 3900 == RASDLLM(base_url=other.base_url).metadata.context_window


def test_a_server_that_does_not_count_is_packed_for_by_the_framework(index):
    """LlamaIndex's counter goes on in its pipelines; asked for counts, the LLM says that it has none."""
    with fake_server(Says([piece(content="Four."), piece("stop")]), cards=[OTHER]) as server:
        llm = RASDLLM(base_url=server.base_url)
        assert "Four." == str(index.as_query_engine(llm=llm).query(QUESTION))
        with pytest.raises(ConfigurationError, match="counts tokens"):
            llm.encode("word")
        llm.close()

    assert set(server.paths) == {"/v1/models", "/v1/chat/completions"}


def test_a_failing_server_fails_the_pipeline(index):
    """It is no empty response."""
    with fake_server(
        Says(status=500, body={"error": {"message": "Not so."}}), cards=[OTHER]
    ) as server:
        llm = RASDLLM(base_url=server.base_url, max_retries=0)
        with pytest.raises(ServerError, match="Not so"):
            index.as_query_engine(llm=llm).query(QUESTION)
        llm.close()


def test_a_formatted_text_goes_to_the_endpoint_for_texts():
    """``formatted=True`` is read as it is, there too."""
    text = Says([{"choices": [{"text": "Four.", "finish_reason": "stop", "rasd": STATS}]}])
    with fake_server(text, cards=[RASD]) as server, RASDLLM(base_url=server.base_url) as llm:
        assert "Four." == llm.complete("2 + 2 =", formatted=True).text

    assert ("/v1/completions", "2 + 2 =") == (server.paths[-1], server.bodies[0]["prompt"])
