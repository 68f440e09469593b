"""LangChain's vector stores and retrievers."""

from __future__ import annotations

import uuid

import chromadb
import faiss
import pytest
from fakes_stores import DIMENSION, TEXTS, WordEmbeddings, WordFunction, cut, documents
from langchain_chroma import Chroma
from langchain_classic.retrievers import (
    ContextualCompressionRetriever,
    EnsembleRetriever,
    MultiQueryRetriever,
    ParentDocumentRetriever,
)
from langchain_classic.retrievers.document_compressors import EmbeddingsFilter
from langchain_community.docstore.in_memory import InMemoryDocstore
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.language_models import FakeListLLM
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.stores import InMemoryStore
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_text_splitters import RecursiveCharacterTextSplitter

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval import GuardedSource, as_chunk_source, join_chunks
from rasd_integrations.types import Chunk

DOCUMENTS = documents()
IDS = [f"id{i}" for i in range(len(DOCUMENTS))]
QUESTION = "honey heather smoke"


def chroma(path=None, **options):
    client = chromadb.EphemeralClient() if path is None else chromadb.PersistentClient(path)
    options = {"embedding_function": WordEmbeddings()} | options
    return Chroma(f"c{uuid.uuid4().hex}", client=client, **options)


def empty_faiss(path=None):
    return FAISS(WordEmbeddings(), faiss.IndexFlatL2(DIMENSION), InMemoryDocstore(), {})


def in_memory(path=None):
    return InMemoryVectorStore(WordEmbeddings())


def persistent(path):
    return chroma(path)


def filled(store):
    store.add_documents(DOCUMENTS, ids=IDS)
    return store


@pytest.fixture(params=[chroma, persistent, empty_faiss, in_memory])
def store(request, tmp_path):
    return filled(request.param(tmp_path if request.param is persistent else None))


def filter_of(store, source):
    """The same filter as each store wants it."""
    if isinstance(store, InMemoryVectorStore):
        return lambda document: document.metadata["source"] == source
    return {"source": source}


class Refusing(BaseRetriever):
    """A retriever that must not be called."""

    vectorstore: VectorStore

    def _get_relevant_documents(self, query, *, run_manager):
        raise AssertionError


def test_a_store_is_searched_in_its_own_order(store):
    """Best first, with ids, metadata and ranks."""
    found = as_chunk_source(store).search(DOCUMENTS[3].page_content, 3)
    assert (found[0].text, found[0].id) == (DOCUMENTS[3].page_content, "id3")
    assert found[0].metadata == DOCUMENTS[3].metadata
    assert [c.rank for c in found] == [0, 1, 2]


def test_a_document_comes_whole_and_in_order(store):
    """The chunks of the source join to the text that was cut."""
    source = as_chunk_source(store)
    assert join_chunks(source.document(source.search(QUESTION, 1)[0])) == TEXTS["bees.txt"]


def test_a_chunk_that_lost_its_metadata_is_known_by_its_id(store):
    """A pipeline may hand on the id alone."""
    assert join_chunks(as_chunk_source(store).document(Chunk("x", id="id0"))) == TEXTS["tides.txt"]


def test_a_retriever_carries_its_filter(store):
    """The retriever's own filter restricts searches and whole documents."""
    retriever = store.as_retriever(search_kwargs={"k": 2, "filter": filter_of(store, "bees.txt")})
    source = as_chunk_source(retriever)
    found = source.search("the slate tide of Odal", 20)
    assert {c.metadata["source"] for c in found} == {"bees.txt"}
    assert source.document(Chunk("x", metadata={"source": "tides.txt"})) == []


def test_a_calls_filter_takes_the_place_of_the_retrievers(store):
    """What the pipeline searched with this time is what counts."""
    retriever = store.as_retriever(search_kwargs={"filter": filter_of(store, "bees.txt")})
    found = as_chunk_source(retriever).search("slate", 5, filter=filter_of(store, "tides.txt"))
    assert {c.metadata["source"] for c in found} == {"tides.txt"}


@pytest.mark.parametrize("search_type", ["mmr", "similarity_score_threshold"])
def test_a_retrievers_scores_and_counts_are_left_behind(search_type):
    """Thresholds compare scores that mean nothing; k is the caller's."""
    retriever = filled(chroma()).as_retriever(
        search_type=search_type, search_kwargs={"k": 1, "score_threshold": 0.99}
    )
    assert len(as_chunk_source(retriever).search(QUESTION, 5)) == 5


def test_a_new_document_is_found_whole(store):
    """Documents added after the first question are seen."""
    source = as_chunk_source(store)
    source.document(source.search(QUESTION, 1)[0])
    before = source.fingerprint()
    text = "A lighthouse of glass stands on no map. " * 6
    store.add_documents(cut("glass.txt", text))
    assert join_chunks(source.document(source.search("lighthouse glass map", 1)[0])) == text
    assert source.fingerprint() != before


def test_a_deleted_document_is_gone(store):
    """Neither a search nor a whole document brings back what was deleted."""
    source = as_chunk_source(store)
    chunk = source.search(QUESTION, 1)[0]
    source.document(chunk)
    before = source.fingerprint()
    store.delete(
        [i for i, d in zip(IDS, DOCUMENTS, strict=True) if d.metadata["source"] == "bees.txt"]
    )
    assert {c.metadata["source"] for c in source.search(QUESTION, 50)} == {"tides.txt"}
    assert source.document(chunk) == []
    assert source.fingerprint() != before


def test_a_replaced_text_is_read_anew(store):
    """A chunk replaced under its id shows its new text in the document."""
    source = as_chunk_source(store)
    first = next(d for d in DOCUMENTS if d.metadata["source"] == "bees.txt")
    source.document(source.search(QUESTION, 1)[0])
    replaced = Document("Bees were never here. ", metadata=first.metadata)
    name = IDS[DOCUMENTS.index(first)]
    store.delete([name])
    store.add_documents([replaced], ids=[name])
    assert (
        source.document(Chunk("x", metadata={"source": "bees.txt"}))[0].text
        == replaced.page_content
    )


def test_a_text_overwritten_in_place_is_read_anew():
    """Stores that overwrite an id in place leave no trace to watch for, and are read each time."""
    store = filled(in_memory())
    source = as_chunk_source(store)
    source.document(Chunk("x", id="id0"))
    store.add_documents([Document("changed", metadata=DOCUMENTS[0].metadata)], ids=["id0"])
    assert source.document(Chunk("x", metadata={"source": "tides.txt"}))[0].text == "changed"


def test_a_faiss_store_is_grouped_once(monkeypatch):
    """Whole documents of an unchanged FAISS store cost one pass over it, not one a question."""
    store = filled(empty_faiss())
    source = as_chunk_source(store)
    looked_up = []
    search = store.docstore.search
    monkeypatch.setattr(
        store.docstore, "search", lambda name: looked_up.append(name) or search(name)
    )
    for _ in range(5):
        assert source.document(Chunk("x", metadata={"source": "bees.txt"}))
    assert len(looked_up) == len(DOCUMENTS)


def test_a_faiss_filter_looks_beyond_the_nearest():
    """FAISS filters the 20 nearest by default; a rare document must still be found."""
    store = empty_faiss()
    store.add_texts([f"honey heather smoke {i}" for i in range(60)], [{"source": "many"}] * 60)
    store.add_texts(["a word on honey"], [{"source": "rare"}])
    found = as_chunk_source(store).search(QUESTION, 3, filter={"source": "rare"})
    assert [c.text for c in found] == ["a word on honey"]


def test_a_faiss_stores_own_operators_filter_documents():
    """$in and its like are read by the store itself."""
    source = as_chunk_source(filled(empty_faiss()))
    chunk = Chunk("x", metadata={"source": "bees.txt"})
    assert source.document(chunk, filter={"source": {"$in": ["bees.txt"]}})
    assert source.document(chunk, filter={"source": {"$in": ["tides.txt"]}}) == []


def test_a_chroma_that_was_reset_is_read_anew():
    """A reset exchanges the collection behind the store."""
    store = filled(chroma())
    source = as_chunk_source(store)
    store.reset_collection()
    assert source.search(QUESTION, 3) == []
    assert source.document(Chunk("x", metadata={"source": "bees.txt"})) == []


def test_a_chroma_without_embedding_is_not_searched_with_chromas_default():
    """Opened without its embedding, Chroma would take its own model: refused, for retrievers too."""
    client = chromadb.EphemeralClient()
    name = f"c{uuid.uuid4().hex}"
    filled(Chroma(name, WordEmbeddings(), client=client))
    bare = Chroma(name, client=client)
    for obj in (bare, bare.as_retriever()):
        with pytest.raises(RetrievalError, match="embedding"):
            as_chunk_source(obj)


def test_langchains_collection_can_be_given_bare():
    """The raw collection below a LangChain store, with the embedding beside it."""
    collection = filled(chroma())._collection
    source = as_chunk_source(collection, embed=WordEmbeddings())
    assert join_chunks(source.document(source.search(QUESTION, 1)[0])) == TEXTS["bees.txt"]


def test_wrapped_retrievers_are_opened_and_never_called():
    """Query rewriting calls the model, compression another one: their store is searched instead."""
    store = filled(chroma())
    inner = Refusing(vectorstore=store)
    llm = FakeListLLM(responses=[])
    splitter = RecursiveCharacterTextSplitter(chunk_size=100, chunk_overlap=0)
    wrapped = [
        inner,
        MultiQueryRetriever.from_llm(inner, llm),
        ContextualCompressionRetriever(
            base_retriever=inner, base_compressor=EmbeddingsFilter(embeddings=WordEmbeddings(), k=1)
        ),
        EnsembleRetriever(retrievers=[inner, RunnableLambda(lambda q: [])]),
        ParentDocumentRetriever(
            vectorstore=store, docstore=InMemoryStore(), child_splitter=splitter
        ),
        inner.with_config(tags=["t"]),
        MultiQueryRetriever.from_llm(inner, llm).with_config(tags=["t"]),
    ]
    expected = as_chunk_source(store).search(QUESTION, 4)
    assert [as_chunk_source(w).search(QUESTION, 4) for w in wrapped] == [expected] * len(wrapped)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: MultiQueryRetriever.from_llm(inner, FakeListLLM(responses=[])).with_config(
            tags=["t"]
        ),
        lambda inner: inner.vectorstore.as_retriever().bind(**inner.search_kwargs),
        lambda inner: inner.configurable_fields(search_kwargs=ConfigurableField("search")),
    ],
    ids=["below two wrappers", "bound", "configurable"],
)
def test_a_wrapped_retrievers_filter_is_carried(wrap):
    """Wherever it is set: on the inner retriever, by binding, or as the default of what a call may configure."""
    inner = filled(chroma()).as_retriever(search_kwargs={"filter": {"source": "bees.txt"}})
    found = as_chunk_source(wrap(inner)).search("slate tide", 9)
    assert {c.metadata["source"] for c in found} == {"bees.txt"}


def test_an_ensemble_of_two_stores_is_one_source():
    """Results in turn, each text once, documents from whichever store has them."""
    first, second = empty_faiss(), chroma()
    first.add_documents(cut("tides.txt", TEXTS["tides.txt"]))
    second.add_documents(DOCUMENTS)
    source = as_chunk_source(
        EnsembleRetriever(retrievers=[first.as_retriever(), second.as_retriever()])
    )
    found = source.search("bees honey slate", 20)
    assert len({c.text for c in found}) == len(found)
    assert {c.metadata["source"] for c in found[:2]} == {"tides.txt", "bees.txt"}
    assert (
        join_chunks(source.document(Chunk("x", metadata={"source": "bees.txt"})))
        == TEXTS["bees.txt"]
    )
    assert len(source.fingerprint().split("+")) == 2


def test_any_other_vector_store_is_searched_but_tells_no_documents():
    """A store that we do not know by name still gives chunks."""

    class Other(VectorStore):
        def similarity_search(self, query, k=4, **kwargs):
            return [Document(f"{query} {k} {kwargs}")]

        def add_texts(self, *args, **kwargs):
            raise NotImplementedError

        @classmethod
        def from_texts(cls, *args, **kwargs):
            raise NotImplementedError

    source = as_chunk_source(Other().as_retriever(search_kwargs={"k": 9, "namespace": "n"}))
    found = source.search("q", 2)
    assert [c.text for c in found] == ["q 2 {'namespace': 'n'}"]
    assert source.document(found[0]) == []
    assert source.fingerprint() == "Other"


def test_another_dimension_is_a_fault(store):
    """A store opened with another embedding model gives nothing and says so."""
    wrong = WordEmbeddings(8)
    for name in ("_embedding_function", "embedding_function", "embedding"):
        if hasattr(store, name):
            setattr(store, name, wrong)
    source = GuardedSource(as_chunk_source(store), 10)
    assert source.search("honey", 3) == []
    assert len(source.take_faults()) == 1


def test_a_faiss_store_out_of_step_is_a_fault():
    """A docstore that lost a document under FAISS costs the chunks, not the answer."""
    store = filled(empty_faiss())
    del store.docstore._dict["id3"]
    source = GuardedSource(as_chunk_source(store), 10)
    assert source.search(DOCUMENTS[3].page_content, 50) == []
    assert "Could not find document" in source.take_faults()[0]
    assert source.document(Chunk("x", metadata={"source": "bees.txt"}))


def test_a_chroma_function_is_no_langchain_embedding():
    """Chroma's embed_query takes a list; it is told from LangChain's."""
    source = as_chunk_source(filled(chroma())._collection, embed=WordFunction())
    assert source.search(DOCUMENTS[3].page_content, 1)[0].id == "id3"
