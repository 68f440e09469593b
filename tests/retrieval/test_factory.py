"""What is taken as a store, what is refused, and that nothing is imported for it."""

from __future__ import annotations

import subprocess
import sys

import chromadb
import pytest
from chromadb.api.models.AsyncCollection import AsyncCollection
from fakes_stores import WordEmbeddings
from langchain_core.language_models import FakeListLLM
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import StructuredTool
from langchain_core.vectorstores import InMemoryVectorStore

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval import as_chunk_source


class Source:
    """A chunk source of a user's own, which is also callable."""

    def __call__(self, query, k):
        raise AssertionError

    def search(self, query, k, *, filter=None):
        return []

    def document(self, chunk, *, filter=None):
        return []

    def fingerprint(self):
        return ""


class Opaque(BaseRetriever):
    """A retriever that wraps nothing we could search."""

    def _get_relevant_documents(self, query, *, run_manager):
        raise AssertionError


def test_a_chunk_source_is_taken_as_it_is():
    """A user's own source needs no adapter."""
    source = Source()
    assert as_chunk_source(source) is source


@pytest.mark.parametrize(
    ("obj", "hint"),
    [
        (None, "leave the store out"),
        (7, "leave the store out"),
        ("text", "leave the store out"),
        ({"a": "b"}, "leave the store out"),
        (InMemoryVectorStore, "an object of it"),
        (Opaque(), "VectorStore"),
        (FakeListLLM(responses=["a"]), "VectorStore"),
        (StructuredTool.from_function(len, description="never called"), "VectorStore"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_a_next_step(obj, hint):
    """The error names the type and what to give instead."""
    with pytest.raises(RetrievalError, match=hint):
        as_chunk_source(obj)


def test_a_chroma_client_is_told_from_a_collection():
    """The client holds many collections."""
    with pytest.raises(RetrievalError, match="get_collection"):
        as_chunk_source(chromadb.EphemeralClient())


def test_an_asynchronous_collection_is_told_from_the_synchronous_one():
    """Its methods return coroutines, which a search in a worker thread cannot use."""
    with pytest.raises(RetrievalError, match="synchronous"):
        as_chunk_source(object.__new__(AsyncCollection))


def test_texts_without_a_faiss_index_are_refused():
    """An option that would do nothing is an error."""
    with pytest.raises(RetrievalError, match="faiss index"):
        as_chunk_source(["a"], texts=["b"])


def test_an_embedding_for_a_store_that_has_one_is_refused():
    """An option that would do nothing is an error."""
    store = InMemoryVectorStore(WordEmbeddings())
    with pytest.raises(RetrievalError, match="its own embedding"):
        as_chunk_source(store, embed=WordEmbeddings())


def test_what_is_no_embedding_is_refused():
    """A model's name is not an embedding."""
    with pytest.raises(RetrievalError, match="embed is a str"):
        as_chunk_source(["a"], embed="all-MiniLM-L6-v2")


def test_a_wrapper_round_itself_ends():
    """A cycle of wrappers is refused, not followed for ever."""

    class Loop(Opaque):
        retriever: object = None

    loop = Loop()
    loop.retriever = loop
    with pytest.raises(RetrievalError):
        as_chunk_source(loop)


def test_retrieval_imports_no_framework_and_no_store():
    """Lists and functions work where none of them is installed."""
    code = (
        "import sys\n"
        "for name in ('langchain_core', 'llama_index', 'chromadb', 'faiss', 'langchain_chroma'):\n"
        "    sys.modules[name] = None\n"
        "from rasd_integrations.retrieval import as_chunk_source\n"
        "print(as_chunk_source(['a stone', 'a river']).search('river', 1)[0].text)\n"
        "print(as_chunk_source(lambda q, k: ['found']).search('river', 1)[0].text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "a river\nfound\n"


def test_a_langchain_store_needs_neither_chroma_nor_faiss():
    """Only what the object itself is made of has to be there."""
    code = (
        "import sys\n"
        "for name in ('llama_index', 'chromadb', 'faiss'):\n"
        "    sys.modules[name] = None\n"
        "from langchain_core.embeddings import DeterministicFakeEmbedding\n"
        "from langchain_core.vectorstores import InMemoryVectorStore\n"
        "from rasd_integrations.retrieval import as_chunk_source\n"
        "store = InMemoryVectorStore.from_texts(['a'], DeterministicFakeEmbedding(size=8))\n"
        "print(as_chunk_source(store).search('a', 1)[0].text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "a\n"
