"""``context="documents"`` on unchanged pipelines: the target reads whole documents, prefilled once."""

from __future__ import annotations

from dataclasses import replace

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
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain import ChatRASD
from rasd_integrations.llama_index import RASDLLM
from rasd_integrations.prompting import PromptHints
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.types import Chunk

TOPICS = ("volcano", "violin", "harbour", "orchard")
TAILS = ("is old", "was measured twice", "has a keeper", "costs little", "is closed in winter")


def paper(topic: str) -> str:
    """Return a document of about 4 000 characters, in which every sentence names the topic."""
    return " ".join(
        f"Sentence {i} of the paper says that the {topic} {TAILS[i % 5]}." for i in range(70)
    )


PAPERS = {topic: paper(topic) for topic in TOPICS}
QUESTIONS = [f"What does the paper say about the volcano, item {i}?" for i in (1, 2, 3)]
OPTIONS = {"context": "documents", "max_tokens": 8}


def model():
    return tiny_llama(max_position_embeddings=16384), tiny_tokenizer()


def seen_by_target(llm, monkeypatch) -> list[str]:
    """Return a list that fills with the prompts that the target reads."""
    prompts: list[str] = []
    decoder = llm._rasd._engine.decoder()
    inner = decoder.generate

    def spy(prompt_ids, *args, **kwargs):
        prompts.append(tiny_tokenizer().decode(prompt_ids))
        return inner(prompt_ids, *args, **kwargs)

    monkeypatch.setattr(decoder, "generate", spy)
    return prompts


@pytest.fixture
def chroma():
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=400, chunk_overlap=60, add_start_index=True
    )
    chunks = splitter.split_documents(
        [Document(text, metadata={"source": topic}) for topic, text in PAPERS.items()]
    )
    store = Chroma("papers", WordEmbeddings(), client=chromadb.EphemeralClient())
    store.add_documents(chunks)
    yield store
    store.delete_collection()


def test_langchain_chain_over_chroma_reads_the_paper_once(chroma, monkeypatch):
    """An unchanged k = 4 chain: the right paper whole, the drafter the chain's prompt, one prefill."""
    llm = ChatRASD.from_model(*model(), store=chroma, drafter="self", **OPTIONS)
    prompts = seen_by_target(llm, monkeypatch)
    template = ChatPromptTemplate.from_template(
        "Answer from the context.\n\n{context}\n\nQuestion: {question}"
    )
    join = lambda docs: "\n\n".join(d.page_content for d in docs)  # noqa: E731
    retriever = chroma.as_retriever(search_kwargs={"k": 4})
    chain = {"context": retriever | join, "question": RunnablePassthrough()} | template | llm
    cached = []
    for question in QUESTIONS:
        rasd = chain.invoke(question).response_metadata["rasd"]
        cached.append(rasd["cached_prompt_tokens"])
        assert PAPERS["volcano"] in prompts[-1]
        assert not any(PAPERS[topic] in prompts[-1] for topic in TOPICS[1:])
        assert question in prompts[-1]
        assert 0 < rasd["drafter_prompt_tokens"] < 0.5 * rasd["prompt_tokens"]
        assert rasd["omitted_tokens"] == 0
    assert cached[0] == 0
    assert min(cached[1:]) > len(PAPERS["volcano"])


def test_llama_index_query_engine_over_faiss_reads_the_paper_once(monkeypatch):
    """The same through a query engine over FAISS."""
    vector_store = FaissVectorStore(faiss.IndexFlatL2(DIMENSION))
    index = VectorStoreIndex.from_documents(
        [LlamaDocument(text=text, doc_id=topic) for topic, text in PAPERS.items()],
        storage_context=StorageContext.from_defaults(vector_store=vector_store),
        embed_model=WordModel(),
        transformations=[SentenceSplitter(chunk_size=100, chunk_overlap=10, tokenizer=str.split)],
    )
    llm = RASDLLM.from_model(*model(), store=index, drafter="self", **OPTIONS)
    prompts = seen_by_target(llm, monkeypatch)
    engine = index.as_query_engine(llm=llm, similarity_top_k=2)
    cached = []
    for question in QUESTIONS:
        engine.query(question)
        cached.append(llm.stats.cached_prompt_tokens)
        assert PAPERS["volcano"] in prompts[-1]
        assert not any(PAPERS[topic] in prompts[-1] for topic in TOPICS[1:])
    assert cached[0] == 0
    assert cached[1] > len(PAPERS["volcano"])
    assert cached[2] > 2 * len(PAPERS["volcano"])


def test_a_request_says_what_is_read(chroma, monkeypatch):
    """One engine reads the prompt or the documents, call by call, and without its store what was sent."""
    llm = ChatRASD.from_model(*model(), store=chroma, drafter="self", max_tokens=8)
    prompts = seen_by_target(llm, monkeypatch)
    found = chroma.similarity_search(QUESTIONS[0], k=2)
    chunks = tuple(Chunk(d.page_content, metadata=d.metadata, id=d.id) for d in found)
    text = "\n\n".join(chunk.text for chunk in chunks)
    ask = Request(
        [{"role": "user", "content": f"{text}\n\nQuestion: {QUESTIONS[0]}"}],
        hints=PromptHints(question=QUESTIONS[0], chunks=chunks, chunk_source="explicit"),
    )
    for request, reads_all in (
        (ask, False),
        (replace(ask, context="documents"), True),
        (replace(ask, context="documents", searches=False), False),
    ):
        llm._rasd.generate(request)
        assert (PAPERS["volcano"] in prompts[-1]) is reads_all
    routed = ChatRASD.from_model(*model(), store=chroma, mode="route", max_tokens=8)
    with pytest.raises(ConfigurationError, match="context is 'documents' for this call"):
        routed._rasd.generate(replace(ask, context="documents"))
