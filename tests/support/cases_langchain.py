"""What the tests of LangChain pipelines share: facts, stores, and the ways to call a chain."""

from __future__ import annotations

import functools
import uuid
from typing import Any

from fakes_langchain import WordEmbeddings
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from tiny import tiny_llama, tiny_tokenizer

ADA = "Ada Lovelace wrote the first program in 1843."
BREAD = "Bread needs flour, water and salt.\n\nIt bakes for forty minutes."
PARIS = "Paris is the capital of France."
FACTS = (ADA, BREAD, PARIS, "The moon is far away.", "A triangle has three sides.")
ABOUT_ADA = "Who wrote the first program?"
ABOUT_PARIS = "What is the capital of France?"
HOWS = ("invoke", "stream", "ainvoke", "astream", "batch", "abatch")
PROMPT = ChatPromptTemplate.from_template(
    "Answer from the context.\n\n{context}\n\nQuestion: {question}"
)


@functools.cache
def parts():
    """Return a tiny random model with a long window, and its tokenizer."""
    return tiny_llama(max_position_embeddings=16_384), tiny_tokenizer()


def model(kind):
    """Return a model of ``kind`` round the tiny one."""
    return kind.from_model(*parts(), max_tokens=2)


def documents():
    return [Document(text, metadata={"source": f"{i}.txt"}) for i, text in enumerate(FACTS)]


def memory_store():
    store = InMemoryVectorStore(WordEmbeddings())
    store.add_documents(documents())
    return store


def chroma_store():
    import chromadb
    from langchain_chroma import Chroma

    client = chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False))
    name = f"facts-{uuid.uuid4().hex}"
    store = Chroma(name, WordEmbeddings(), client=client)
    store.add_documents(documents())
    return store


def faiss_store():
    from langchain_community.vectorstores import FAISS

    return FAISS.from_documents(documents(), WordEmbeddings())


STORES = {"memory": memory_store, "chroma": chroma_store, "faiss": faiss_store}


async def call(chain: Any, how: str, *inputs: Any) -> None:
    """Call ``chain`` with each input in the way that ``how`` names."""
    match how:
        case "invoke":
            for value in inputs:
                chain.invoke(value)
        case "stream":
            for value in inputs:
                list(chain.stream(value))
        case "ainvoke":
            for value in inputs:
                await chain.ainvoke(value)
        case "astream":
            for value in inputs:
                [_ async for _ in chain.astream(value)]
        case "batch":
            chain.batch(list(inputs))
        case "abatch":
            await chain.abatch(list(inputs))


def hints_by_question(llm):
    return {call.hints.question: call.hints for call in llm._rasd.calls}


def texts(hints):
    return [chunk.text for chunk in hints.chunks]


def joined(found):
    return "\n\n".join(document.page_content for document in found)
