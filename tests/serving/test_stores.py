"""Stores that a server opens by address or folder."""

from __future__ import annotations

import os
import pickle

import chromadb
import faiss
import pytest
from fakes_stores import DIMENSION, WordEmbeddings, WordModel
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.vector_stores.faiss import FaissVectorStore

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval import as_chunk_source
from rasd_integrations.serving.server.stores import open_store

TEXTS = ["The harbour freezes in winter.", "The orchard was planted in 1912.", "The violin is old."]
PAGES = [{"page": n} for n in range(3)]


def chroma(folder):
    client = chromadb.PersistentClient(str(folder))
    docs = client.create_collection("docs", embedding_function=None)
    docs.add(ids=["0", "1", "2"], documents=TEXTS, metadatas=PAGES, embeddings=WordEmbeddings().embed_documents(TEXTS))  # fmt: skip


def langchain_faiss(folder):
    documents = [Document(t, metadata=m) for t, m in zip(TEXTS, PAGES, strict=True)]
    FAISS.from_documents(documents, WordEmbeddings(), ids=["0", "1", "2"]).save_local(str(folder))


def llama_index_faiss(folder):
    context = StorageContext.from_defaults(
        vector_store=FaissVectorStore(faiss_index=faiss.IndexFlatIP(DIMENSION))
    )
    nodes = [TextNode(text=t, metadata=m, id_=str(m["page"])) for t, m in zip(TEXTS, PAGES, strict=True)]  # fmt: skip
    VectorStoreIndex(nodes, storage_context=context, embed_model=WordModel())
    context.persist(str(folder))


@pytest.mark.parametrize("make", [langchain_faiss, llama_index_faiss])
def test_a_folder_of_faiss_is_searched_by_words(make, tmp_path):
    """Its texts, ids and metadata are those that were saved, and the right one is found."""
    make(tmp_path)
    store = open_store(str(tmp_path))
    assert sorted((c.text, c.id, c.metadata["page"]) for c in store) == sorted(
        zip(TEXTS, "012", range(3), strict=True)
    )
    (best,) = as_chunk_source(store).search("When was the orchard planted?", 1)
    assert best.text == TEXTS[1]


def test_a_folder_of_chroma_is_opened(tmp_path):
    """The one collection is taken; of two, one must be named."""
    chroma(tmp_path)
    assert open_store(str(tmp_path)).name == "docs"
    assert open_store(f"{tmp_path}#docs").count() == 3
    chromadb.PersistentClient(str(tmp_path)).create_collection("more")
    with pytest.raises(RetrievalError, match=r"2 collections\. Name one behind a #: docs, more"):
        open_store(str(tmp_path))
    with pytest.raises(RetrievalError, match="no collection 'none'"):
        open_store(f"{tmp_path}#none")


def test_what_is_no_store_is_refused(tmp_path):
    """An empty folder, a damaged file, an empty index, and a server that does not answer are named."""
    with pytest.raises(RetrievalError, match="is no folder of Chroma"):
        open_store(str(tmp_path))
    with pytest.raises(RetrievalError, match="No Chroma server answers"):
        open_store("http://127.0.0.1:9#docs")
    (tmp_path / "docstore.json").write_text('{"docstore/data": {}}')
    with pytest.raises(RetrievalError, match="holds no texts"):
        open_store(str(tmp_path))
    for text in ('{"docstore/data": {"a": 3}}', '{"docstore/data": {"a": {"__data__": {"text": 3}}}}', "{", "[]"):  # fmt: skip
        (tmp_path / "docstore.json").write_text(text)
        with pytest.raises(RetrievalError, match="cannot be read"):
            open_store(str(tmp_path))


class Evil:
    """Runs a command where a pickle is loaded."""

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("damage", [b"", b"\x80\x04", b"not a pickle", None])
def test_a_pickle_runs_nothing(tmp_path, damage):
    """LangChain's folder is a pickle; one that asks for more than texts is refused before it does anything."""
    evil, mark = Evil(), tmp_path / "mark"
    evil.path = str(mark)
    (tmp_path / "index.pkl").write_bytes(pickle.dumps((evil, {})) if damage is None else damage)
    with pytest.raises(RetrievalError, match="cannot be read"):
        open_store(str(tmp_path))
    assert not mark.exists()
