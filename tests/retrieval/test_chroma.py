"""A raw chromadb collection."""

from __future__ import annotations

import uuid

import chromadb
import pytest
from chromadb.utils.embedding_functions import register_embedding_function
from fakes_stores import TEXTS, WordEmbeddings, WordFunction, documents, embed_text, embed_texts

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval import GuardedSource, as_chunk_source, join_chunks
from rasd_integrations.types import Chunk

DOCUMENTS = documents()
register_embedding_function(WordFunction)


@pytest.fixture
def client():
    return chromadb.EphemeralClient()


def fill(collection):
    texts = [d.page_content for d in DOCUMENTS]
    # Added from the last to the first: reading order must come from the places.
    collection.add(
        ids=[f"id{i}" for i in range(len(texts))][::-1],
        documents=texts[::-1],
        embeddings=embed_texts(texts)[::-1],
        metadatas=[d.metadata for d in DOCUMENTS][::-1],
    )
    return collection


def named(client, **options):
    return client.create_collection(f"c{uuid.uuid4().hex}", **options)


@pytest.fixture
def collection(client):
    return fill(named(client, embedding_function=WordFunction()))


def test_a_collection_is_searched_with_its_own_embedding(collection):
    """The function that the collection was made with embeds the question."""
    found = as_chunk_source(collection).search(DOCUMENTS[3].page_content, 2)
    assert (found[0].text, found[0].id, found[0].rank) == (DOCUMENTS[3].page_content, "id3", 0)
    assert len(found) == 2


@pytest.mark.parametrize("embed", [embed_texts, WordEmbeddings(), WordFunction()])
def test_a_collection_without_embedding_is_searched_with_the_given_one(client, embed):
    """Vectors that came from outside are searched with what they came from."""
    source = as_chunk_source(fill(named(client, embedding_function=None)), embed=embed)
    assert source.search(DOCUMENTS[3].page_content, 1)[0].text == DOCUMENTS[3].page_content


@pytest.mark.parametrize("space", ["l2", "cosine", "ip"])
def test_the_order_is_chromas_whatever_the_space(client, space):
    """Distances of three kinds, one order."""
    collection = fill(
        named(client, embedding_function=WordFunction(), configuration={"hnsw": {"space": space}})
    )
    assert as_chunk_source(collection).search(DOCUMENTS[7].page_content, 1)[0].id == "id7"


def test_a_reopened_collection_is_not_searched_with_chromas_default(tmp_path):
    """Chroma would use its own model without a word (and download it): refused, with the way out."""
    name = named(chromadb.PersistentClient(tmp_path), embedding_function=None).name
    reopened = chromadb.PersistentClient(tmp_path).get_collection(name)
    with pytest.raises(RetrievalError, match="embed="):
        as_chunk_source(reopened)
    assert as_chunk_source(fill(reopened), embed=embed_texts).search("honey", 1)


def test_a_reopened_collection_that_names_its_embedding_is_searched_with_that(tmp_path):
    """The configuration on disk names the function; it is found again by name."""
    name = fill(named(chromadb.PersistentClient(tmp_path), embedding_function=WordFunction())).name
    reopened = chromadb.PersistentClient(tmp_path).get_collection(name)
    source = as_chunk_source(reopened)
    assert source.search(DOCUMENTS[3].page_content, 1)[0].id == "id3"
    assert join_chunks(source.document(Chunk("", id="id3"))) == TEXTS["tides.txt"]


def test_a_document_comes_whole_and_in_order(collection):
    """All chunks of the source, ordered by their places, join to the text."""
    source = as_chunk_source(collection)
    chunk = source.search("honey heather smoke", 1)[0]
    assert join_chunks(source.document(chunk)) == TEXTS["bees.txt"]


def test_the_collection_is_never_scanned(collection, monkeypatch):
    """Documents are fetched with a where filter."""
    asked = []
    get = type(collection).get
    monkeypatch.setattr(
        type(collection), "get", lambda self, **how: asked.append(how) or get(self, **how)
    )
    source = as_chunk_source(collection)
    source.document(source.search("honey", 1)[0])
    assert [how["where"] for how in asked] == [{"source": "bees.txt"}]


def test_a_filter_restricts_searches_and_documents(collection):
    """Chroma's where goes with the search, and joins the document's own."""
    source = as_chunk_source(collection)
    found = source.search("slate tide", 3, filter={"source": "bees.txt"})
    assert {c.metadata["source"] for c in found} == {"bees.txt"}
    assert source.document(found[0], filter={"source": "tides.txt"}) == []
    late = {"start_index": {"$gt": 100}}
    assert all(c.metadata["start_index"] > 100 for c in source.document(found[0], filter=late))


def test_updates_and_deletions_are_seen_at_once(collection):
    """Nothing of the collection is kept between questions."""
    source = as_chunk_source(collection)
    before = source.fingerprint()
    collection.update(
        ids=["id0"], documents=["gone to sea"], embeddings=[embed_text("gone to sea")]
    )
    assert source.search("gone to sea", 1)[0].text == "gone to sea"
    collection.delete(ids=["id0"])
    assert "gone to sea" not in [c.text for c in source.search("gone to sea", 50)]
    assert source.fingerprint() != before


def test_rows_without_text_are_passed_over(client):
    """A collection may hold vectors without documents and without metadata."""
    collection = named(client, embedding_function=WordFunction())
    collection.add(ids=["a"], embeddings=[embed_text("honey")])
    collection.add(ids=["b"], embeddings=[embed_text("honey")], documents=["honey"])
    assert [c.text for c in as_chunk_source(collection).search("honey", 5)] == ["honey"]


@pytest.mark.parametrize("fault", ["dimension", "deleted"])
def test_a_broken_collection_is_a_fault_not_an_error(client, fault):
    """Another dimension, or a collection deleted under our hands, costs nothing but the chunks."""
    collection = fill(named(client, embedding_function=None))
    embed = embed_texts if fault == "deleted" else (lambda texts: [embed_text(t, 8) for t in texts])
    source = GuardedSource(as_chunk_source(collection, embed=embed), 10)
    if fault == "deleted":
        client.delete_collection(collection.name)
    assert source.search("honey", 3) == []
    assert (
        source.document(Chunk("x", metadata={"source": "bees.txt"})) == [] or fault == "dimension"
    )
    assert source.take_faults()
