"""Nodes, stores and checks that the LlamaIndex pipeline tests share."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from fakes_llama_index import ANSWER, WordEmbedding
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import MetadataMode, TextNode

TEXT = "".join(ANSWER)
QUESTION = "Who built the lighthouse at Cape Wrath?"
FOLLOW_UP = "And when?"
USER = [ChatMessage(role="user", content="Who built it?")]
CONDENSED = TEXT  # the scripted engine answers every call so, the condensing one too
HISTORY = [
    ChatMessage(role="user", content="Tell me of the {lighthouse} at Cape Wrath."),
    ChatMessage(role="assistant", content="It was built by Robert Stevenson."),
]
NODES = [
    TextNode(
        id_=f"n{number}",
        text=text,
        metadata={"file_name": f"f{number}.txt"},
        excluded_llm_metadata_keys=[],
    )
    for number, text in enumerate(
        [
            "The lighthouse at Cape Wrath was built by Robert Stevenson.\nIt was lit in 1828.",
            'The lighthouse at Cape Wrath had a keeper, "Old Tom"; he didn\'t like the cold wind of the north.',
            "Sourdough needs flour, water, salt and patience.",
            "The printing press spread through Europe in fifty years.",
        ]
    )
]


def make_index(store: str, tmp_path, nodes=NODES) -> VectorStoreIndex:
    """Return nodes in one of the stores."""
    context = StorageContext.from_defaults()
    if store == "chroma":
        chromadb = pytest.importorskip("chromadb")
        module = pytest.importorskip("llama_index.vector_stores.chroma")
        client = chromadb.PersistentClient(path=str(tmp_path / "chroma"))
        collection = client.create_collection("texts", metadata={"hnsw:space": "cosine"})
        context = StorageContext.from_defaults(
            vector_store=module.ChromaVectorStore(chroma_collection=collection)
        )
    elif store == "faiss":
        faiss = pytest.importorskip("faiss")
        module = pytest.importorskip("llama_index.vector_stores.faiss")
        context = StorageContext.from_defaults(
            vector_store=module.FaissVectorStore(faiss_index=faiss.IndexFlatL2(512))
        )
    return VectorStoreIndex(nodes, storage_context=context, embed_model=WordEmbedding())


def history(*messages: ChatMessage) -> ChatMemoryBuffer:
    """Return a memory without the database that the default one leaves open."""
    return ChatMemoryBuffer.from_defaults(list(messages or HISTORY), token_limit=4000)


def shown(node: TextNode) -> str:
    """Return a node's text as prompts show it."""
    return node.get_content(metadata_mode=MetadataMode.LLM)


def flat(prompt) -> str:
    """Return all text of a prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def assert_hints_are_exact(call, *, question=QUESTION, context=None):
    """The hints name the question and the context, and fill the same template with another one."""
    hints = call.hints
    assert (question, "template") == (hints.question, hints.question_source)
    assert context is None or context == hints.context
    assert hints.context in call.text
    assert call.prompt == hints.rerender(hints.context)
    assert call.text.replace(hints.context, "SHORT") == flat(hints.rerender("SHORT"))


def assert_chunks(call, numbers=(0, 1)):
    """The chunks are the retriever's nodes, best first, as prompts show them."""
    expected = [(f"n{n}", rank, shown(NODES[n])) for rank, n in enumerate(numbers)]
    assert expected == [(c.id, c.rank, c.text) for c in call.hints.chunks]
    assert call.hints.chunk_source == "retriever"
    assert call.hints.chunks[0].metadata["file_name"] == f"f{numbers[0]}.txt"


def call_of(llm):
    """Return the one call that reached the engine."""
    (call,) = llm._rasd.calls
    return call


METHODS = {"sync": "generate", "async": "agenerate", "stream": "stream", "astream": "astream"}
WAYS = list(METHODS)
