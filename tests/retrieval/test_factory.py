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
        (chromadb.EphemeralClient(), "get_collection"),
        (object.__new__(AsyncCollection), "the synchronous one"),
        (Opaque(), "VectorStore"),
        (FakeListLLM(responses=["a"]), "VectorStore"),
        (StructuredTool.from_function(len, description="never called"), "VectorStore"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_a_next_step(obj, hint):
    """The error names the type and what to give instead."""
    with pytest.raises(RetrievalError, match=hint):
        as_chunk_source(obj)


@pytest.mark.parametrize(
    ("obj", "options", "hint"),
    [
        (["a"], {"texts": ["b"]}, "faiss index"),
        (InMemoryVectorStore(WordEmbeddings()), {"embed": WordEmbeddings()}, "its own embedding"),
        (["a"], {"embed": "all-MiniLM-L6-v2"}, "embed is a str"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(obj, options, hint):
    """Texts without a faiss index, an embedding that is not needed, and a model's name, which is none."""
    with pytest.raises(RetrievalError, match=hint):
        as_chunk_source(obj, **options)


def test_a_wrapper_round_itself_ends():
    """A cycle of wrappers is refused, not followed for ever."""

    class Loop(Opaque):
        retriever: object = None

    loop = Loop()
    loop.retriever = loop
    with pytest.raises(RetrievalError):
        as_chunk_source(loop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "code", "printed"),
    [
        (
            ("langchain_core", "llama_index", "chromadb", "faiss", "langchain_chroma"),
            (
                "print(as_chunk_source(['a stone', 'a river']).search('river', 1)[0].text)\n"
                "print(as_chunk_source(lambda q, k: ['found']).search('river', 1)[0].text)\n"
            ),
            "a river\nfound\n",
        ),
        (
            ("llama_index", "chromadb", "faiss"),
            (
                "from langchain_core.embeddings import DeterministicFakeEmbedding\n"
                "from langchain_core.vectorstores import InMemoryVectorStore\n"
                "store = InMemoryVectorStore.from_texts(['a'], DeterministicFakeEmbedding(size=8))\n"
                "print(as_chunk_source(store).search('a', 1)[0].text)\n"
            ),
            "a\n",
        ),
    ],
    ids=["lists and functions", "a LangChain store"],
)
def test_only_what_the_object_is_made_of_has_to_be_installed(missing, code, printed):
    """No framework and no store is imported for another one."""
    head = (
        f"import sys\nfor name in {missing}:\n    sys.modules[name] = None\n"
        "from rasd_integrations.retrieval import as_chunk_source\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + code],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == printed
