"""LlamaIndex's indices and retrievers over three vector stores."""

from __future__ import annotations

import uuid

import chromadb
import faiss
import pytest
from fakes_stores import DIMENSION, TEXTS, WordModel, documents
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.retrievers import (
    QueryFusionRetriever,
    TransformRetriever,
    VectorIndexRetriever,
)
from llama_index.core.schema import TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import QueryEngineTool
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters, SimpleVectorStore
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.faiss import FaissMapVectorStore, FaissVectorStore

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval import GuardedSource, as_chunk_source, join_chunks
from rasd_integrations.types import Chunk

QUESTION = "honey heather smoke"


def memory_store():
    return SimpleVectorStore()


def chroma_store():
    client = chromadb.EphemeralClient()
    return ChromaVectorStore(
        chroma_collection=client.create_collection(f"c{uuid.uuid4().hex}", embedding_function=None)
    )


def faiss_store():
    return FaissVectorStore(faiss_index=faiss.IndexFlatL2(DIMENSION))


def faiss_map_store():
    return FaissMapVectorStore(faiss_index=faiss.IndexIDMap2(faiss.IndexFlatIP(DIMENSION)))


STORES = [memory_store, chroma_store, faiss_store, faiss_map_store]


def build(vector_store, texts=TEXTS):
    return VectorStoreIndex.from_documents(
        [Document(text=text, id_=name, metadata={"topic": name}) for name, text in texts.items()],
        storage_context=StorageContext.from_defaults(vector_store=vector_store),
        transformations=[SentenceSplitter(chunk_size=60, chunk_overlap=20)],
        embed_model=WordModel(),
    )


@pytest.fixture(params=STORES)
def index(request):
    return build(request.param())


def only(topic):
    return MetadataFilters(filters=[MetadataFilter(key="topic", value=topic)])


def test_an_index_is_searched_in_its_stores_order(index):
    """FAISS calls distances similarities; the order is right all the same."""
    found = as_chunk_source(index).search(QUESTION, 3)
    assert "heather" in found[0].text
    assert [c.rank for c in found] == [0, 1, 2]
    assert found[0].id
    assert found[0].metadata["ref_doc_id"] == "bees.txt"


def test_the_chunks_are_those_of_the_users_retriever(index):
    """Searching the vector store finds what the pipeline finds, in its order."""
    expected = [n.node.node_id for n in index.as_retriever(similarity_top_k=4).retrieve(QUESTION)]
    assert [c.id for c in as_chunk_source(index).search(QUESTION, 4)] == expected


def test_a_document_comes_whole_and_in_order(index):
    """Nodes of one source document, ordered by their places, join to its text."""
    source = as_chunk_source(index)
    document = source.document(source.search(QUESTION, 1)[0])
    assert len(document) > 1
    assert join_chunks(document) == TEXTS["bees.txt"]


def test_a_node_that_lost_its_metadata_is_known_by_its_id(index):
    """A pipeline may hand on the id alone."""
    source = as_chunk_source(index)
    chunk = source.search(QUESTION, 1)[0]
    assert join_chunks(source.document(Chunk(chunk.text, chunk.id))) == TEXTS["bees.txt"]


def test_a_retriever_is_not_called(index, monkeypatch):
    """Only its index, embedding and filters are used."""
    monkeypatch.setattr(VectorIndexRetriever, "_retrieve", None)
    source = as_chunk_source(index.as_retriever(similarity_top_k=1))
    assert len(source.search(QUESTION, 3)) == 3


@pytest.mark.parametrize("make", [memory_store, chroma_store])
def test_a_retriever_carries_its_filters(make):
    """The retriever's filters restrict searches and whole documents."""
    source = as_chunk_source(build(make()).as_retriever(filters=only("bees.txt")))
    assert {c.metadata["topic"] for c in source.search("slate tide pilots", 9)} == {"bees.txt"}
    assert source.document(Chunk("x", metadata={"ref_doc_id": "tides.txt"})) == []
    assert source.document(Chunk("x", metadata={"ref_doc_id": "bees.txt"}))


@pytest.mark.parametrize("make", STORES)
def test_a_calls_filter_restricts_documents(make):
    """Also where the vector store itself knows no filters."""
    source = as_chunk_source(build(make()))
    chunk = source.search(QUESTION, 1)[0]
    assert source.document(chunk, filter=only("tides.txt")) == []
    assert join_chunks(source.document(chunk, filter=only("bees.txt"))) == TEXTS["bees.txt"]


def test_a_store_that_knows_no_filters_is_a_fault():
    """FAISS refuses a filter; nothing unfiltered comes instead."""
    source = GuardedSource(as_chunk_source(build(faiss_store())), 10)
    assert source.search(QUESTION, 3, filter=only("bees.txt")) == []
    assert "filters" in source.take_faults()[0]


def test_a_retrievers_list_of_documents_restricts_whole_documents():
    """What doc_ids shut out of the search is not read whole either."""
    index = build(memory_store())
    source = as_chunk_source(VectorIndexRetriever(index, doc_ids=["bees.txt"]))
    assert source.document(Chunk("x", metadata={"ref_doc_id": "tides.txt"})) == []


def test_the_pages_of_a_file_come_as_one_document(index):
    """Each page has an id of its own; the file path joins them, the label orders them."""
    pages = [
        Document(
            text=f"Ledger page {i} speaks of copper.",
            id_=f"p{i}",
            metadata={"file_path": "l.pdf", "page_label": str(i), "topic": "l"},
        )
        for i in (10, 2, 1)
    ]
    for page in pages:
        index.insert(page)
    source = as_chunk_source(index)
    chunk = source.search("ledger page copper", 1)[0]
    assert [c.metadata["page_label"] for c in source.document(chunk)] == ["1", "2", "10"]


def test_a_new_document_is_found_whole(index):
    """Documents added after the first question are seen."""
    source = as_chunk_source(index)
    source.document(source.search(QUESTION, 1)[0])
    before = source.fingerprint()
    text = "A lighthouse of glass stands on no map. It was lit once. Nobody saw the ship it saved."
    index.insert(Document(text=text, id_="glass.txt"))
    assert join_chunks(source.document(source.search("lighthouse glass map", 1)[0])) == text
    assert source.fingerprint() != before


@pytest.mark.parametrize("make", [memory_store, chroma_store])
def test_a_deleted_document_is_gone(make):
    """Neither a search nor a whole document brings back what was deleted."""
    index = build(make())
    source = as_chunk_source(index)
    chunk = source.search(QUESTION, 1)[0]
    source.document(chunk)
    before = source.fingerprint()
    index.delete_ref_doc("bees.txt")
    assert {c.metadata["topic"] for c in source.search(QUESTION, 50)} == {"tides.txt"}
    assert source.document(chunk) == []
    assert source.fingerprint() != before


@pytest.mark.parametrize("make", [memory_store, chroma_store])
def test_an_updated_document_is_read_anew(make):
    """A document updated in the index shows its new text, and only that."""
    index = build(make())
    source = as_chunk_source(index)
    source.document(source.search(QUESTION, 1)[0])
    index.update_ref_doc(
        Document(text="Bees were never here.", id_="bees.txt", metadata={"topic": "bees.txt"})
    )
    assert (
        join_chunks(source.document(Chunk("x", metadata={"ref_doc_id": "bees.txt"})))
        == "Bees were never here."
    )


def by_hand():
    nodes = [TextNode(text=d.page_content, metadata=dict(d.metadata)) for d in documents()]
    context = StorageContext.from_defaults(vector_store=faiss_store())
    return VectorStoreIndex(nodes, storage_context=context, embed_model=WordModel())


@pytest.fixture
def read_nodes(monkeypatch):
    """Count the nodes that the document store is asked for."""
    counts = []

    def get_nodes(self, node_ids, raise_error=True):
        counts.append(len(node_ids))
        return real(self, node_ids, raise_error)

    real = SimpleDocumentStore.get_nodes
    monkeypatch.setattr(SimpleDocumentStore, "get_nodes", get_nodes)
    return counts


def test_nodes_without_a_source_document_are_grouped_by_their_metadata():
    """Nodes made by hand have no source node, only what was written on them."""
    source = as_chunk_source(by_hand())
    assert join_chunks(source.document(source.search(QUESTION, 1)[0])) == TEXTS["bees.txt"]


def test_nodes_without_a_source_document_are_grouped_once(read_nodes):
    """Grouping an unchanged index costs one pass over it, not one a question."""
    source = as_chunk_source(by_hand())
    for _ in range(5):
        assert source.document(Chunk("x", metadata={"source": "bees.txt"}))
    assert sum(read_nodes) == len(documents())


def test_a_document_is_read_without_the_others(read_nodes):
    """The document store lists the nodes of each source document; only those are read."""
    source = as_chunk_source(build(faiss_store()))
    document = source.document(Chunk("x", metadata={"ref_doc_id": "bees.txt"}))
    assert sum(read_nodes) == len(document)


def test_a_node_lost_by_the_document_store_is_passed_over():
    """FAISS cannot delete, so its index may name nodes that are gone."""
    index = build(faiss_store())
    source = as_chunk_source(index)
    best = source.search(QUESTION, 1)[0]
    index.docstore.delete_document(best.id)
    assert best.id not in [c.id for c in source.search(QUESTION, 50)]
    assert best.id not in [c.id for c in source.document(best)]


def test_wrapped_retrievers_and_query_engines_are_opened():
    """Query fusion, HyDE, engines and tools over them call the model; their store is searched instead."""
    index = build(chroma_store())
    llm = MockLLM()
    retriever = index.as_retriever(similarity_top_k=4)
    wrapped = [
        QueryFusionRetriever([retriever], llm=llm),
        TransformRetriever(retriever, HyDEQueryTransform(llm=llm)),
        index.as_query_engine(llm=llm, similarity_top_k=4),
        QueryEngineTool.from_defaults(index.as_query_engine(llm=llm, similarity_top_k=4)),
    ]
    expected = as_chunk_source(index).search(QUESTION, 4)
    assert [as_chunk_source(w).search(QUESTION, 4) for w in wrapped] == [expected] * 4


def test_a_store_with_texts_is_searched_without_its_index():
    """A Chroma vector store holds the texts; only the embedding has to be given."""
    index = build(chroma_store())
    source = as_chunk_source(index.vector_store, embed=WordModel())
    assert join_chunks(source.document(source.search(QUESTION, 1)[0])) == TEXTS["bees.txt"]


@pytest.mark.parametrize(
    ("make", "embed", "hint"),
    [(chroma_store, None, "embed="), (faiss_store, WordModel(), "VectorStoreIndex")],
)
def test_a_store_that_lacks_a_part_is_refused(make, embed, hint):
    """The error says what to give."""
    with pytest.raises(RetrievalError, match=hint):
        as_chunk_source(make(), embed=embed)


def test_llama_indexs_collection_can_be_given_bare():
    """The raw collection knows the documents, places included, as LlamaIndex wrote them."""
    collection = build(chroma_store()).vector_store.client
    source = as_chunk_source(collection, embed=WordModel())
    chunk = source.search(QUESTION, 1)[0]
    assert not [key for key in chunk.metadata if key.startswith("_node")]
    assert TEXTS["bees.txt"].startswith(chunk.text, chunk.metadata["start_char_idx"])
    assert join_chunks(source.document(chunk)) == TEXTS["bees.txt"]


def test_another_dimension_is_a_fault():
    """An index opened with another embedding model gives nothing and says so."""

    class Narrow(WordModel):
        def _get_query_embedding(self, query):
            return [1.0] * 8

    for make in STORES:
        index = build(make())
        index._embed_model = Narrow()
        source = GuardedSource(as_chunk_source(index), 10)
        assert source.search(QUESTION, 3) == []
        assert len(source.take_faults()) == 1
