"""Two stores over the same chunks: a persistent Chroma for LangChain, FAISS for LlamaIndex."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rasd_integrations.demo.corpus import Document, fingerprint

if TYPE_CHECKING:
    from langchain_chroma import Chroma
    from langchain_core.documents import Document as LangChainDocument
    from llama_index.core import VectorStoreIndex

    from rasd_integrations.demo.embeddings import MiniLM

CHUNK_CHARACTERS = 800
BATCH = 64


def cut(documents: Sequence[Document]) -> list[LangChainDocument]:
    """Cut the documents into chunks with their source and start index."""
    from langchain_core.documents import Document as LangChainDocument
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter = RecursiveCharacterTextSplitter(
        chunk_size=CHUNK_CHARACTERS, chunk_overlap=0, add_start_index=True
    )
    whole = [LangChainDocument(d.text, metadata={"source": d.name}) for d in documents]
    return splitter.split_documents(whole)


def open_chroma(
    documents: Sequence[Document],
    chunks: Sequence[LangChainDocument],
    embed: MiniLM,
    folder: Path,
) -> Chroma:
    """Open the Chroma collection of these documents below ``folder``, and fill it if needed.

    The collection's name has a fingerprint, so a store of other documents is never read.
    """
    from langchain_chroma import Chroma

    folder.mkdir(parents=True, exist_ok=True)
    name = f"demo-{fingerprint(documents, CHUNK_CHARACTERS)}"
    # MiniLM has the two methods of LangChain's Embeddings without inheriting from it.
    store = Chroma(name, embed, persist_directory=str(folder))  # type: ignore[arg-type]
    if len(store.get(include=[])["ids"]) != len(chunks):
        for start in range(0, len(chunks), BATCH):
            batch = list(chunks[start : start + BATCH])
            store.add_documents(batch, ids=[f"{start + i:06d}" for i in range(len(batch))])
    return store


def build_faiss(
    chunks: Sequence[LangChainDocument], store: Chroma, embed: MiniLM
) -> VectorStoreIndex:
    """Build a LlamaIndex index over FAISS from Chroma's vectors of the same chunks."""
    import faiss
    from llama_index.core import StorageContext, VectorStoreIndex
    from llama_index.core.schema import TextNode
    from llama_index.vector_stores.faiss import FaissVectorStore

    found = store.get(include=["embeddings"])
    by_id = dict(zip(found["ids"], found["embeddings"], strict=True))
    vectors = [by_id[i].tolist() for i in sorted(by_id)]
    nodes = [
        TextNode(
            text=chunk.page_content,
            metadata=dict(chunk.metadata),
            embedding=vector,
            excluded_llm_metadata_keys=list(chunk.metadata),
            excluded_embed_metadata_keys=list(chunk.metadata),
        )
        for chunk, vector in zip(chunks, vectors, strict=True)
    ]
    faiss_store = FaissVectorStore(faiss_index=faiss.IndexFlatIP(len(vectors[0])))
    return VectorStoreIndex(
        nodes,
        storage_context=StorageContext.from_defaults(vector_store=faiss_store),
        embed_model=embed.for_llama_index(),
    )
