"""The models of both frameworks name what each request reads, in a header."""

from __future__ import annotations

import pytest
from fake_server import Says, fake_server

from rasd_integrations.types import Chunk

PIECES = [{"choices": [{"text": "Four.", "delta": {"content": "Four."}, "finish_reason": "stop"}]}]
WAYS = pytest.mark.parametrize("way", ["sync", "async", "stream", "astream"])
TWO = [Chunk("one", metadata={"source": "a"}), Chunk("two", metadata={"source": "b"})]


def calls_of(kind):
    """Return a framework's model, and its calls by their ways."""
    if kind.startswith("langchain"):
        pytest.importorskip("langchain_core")
        from rasd_integrations.langchain import RASDLLM, ChatRASD

        names = {"sync": "invoke", "async": "ainvoke", "stream": "stream", "astream": "astream"}
        return (ChatRASD if kind.endswith("chat") else RASDLLM), names
    pytest.importorskip("llama_index.core")
    from rasd_integrations.llama_index import RASDLLM

    names = {"sync": "complete", "async": "acomplete", "stream": "stream_complete", "astream": "astream_complete"}  # fmt: skip
    return RASDLLM, names


async def ask(llm, name, way, text, chunks):
    """Ask to the end."""
    given = getattr(llm, name)(text, rasd={"chunks": chunks})
    if way == "async" or (way == "astream" and not hasattr(given, "__aiter__")):
        given = await given
    if way == "stream":
        list(given)
    if way == "astream":
        assert [piece async for piece in given]


@WAYS
@pytest.mark.parametrize("kind", ["langchain chat", "langchain text", "llama_index"])
async def test_questions_on_the_same_documents_have_one_name(kind, way):
    """Whatever is asked and in whatever order they were found; a question on others has another."""
    cls, names = calls_of(kind)
    with fake_server(Says(PIECES)) as server:
        llm = cls(base_url=server.base_url)
        for text, chunks in (("Who?", TWO), ("Where?", TWO[::-1]), ("Who?", TWO[:1])):
            await ask(llm, names[way], way, text, chunks)
        llm.close()

    asked = zip(server.headers, server.paths, strict=True)
    first, again, other = (h["x-session-id"] for h, path in asked if "completions" in path)
    assert first == again != other
    assert first == "200baac4ad2f3974"
