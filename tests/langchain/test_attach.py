"""`llm.attach(...)`: the stores inside a runnable are found without calling anything of it."""

from __future__ import annotations

import warnings
from operator import itemgetter

import pytest
from fakes_langchain import WordEmbeddings
from langchain.agents import create_agent
from langchain_classic.chains import RetrievalQA, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import (
    ContextualCompressionRetriever,
    EnsembleRetriever,
    MultiQueryRetriever,
)
from langchain_classic.retrievers.document_compressors import EmbeddingsFilter
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.tools import create_retriever_tool, tool
from langchain_core.vectorstores import InMemoryVectorStore

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain import ChatRASD

pytestmark = pytest.mark.usefixtures("fake_engine")


LLM = "org/one"
STORE = InMemoryVectorStore(WordEmbeddings())
RETRIEVER = STORE.as_retriever(search_kwargs={"filter": lambda document: True})
PROMPT = ChatPromptTemplate.from_template("{context}\n{question}")


def prompt_chain():
    return {"context": RETRIEVER | str, "question": RunnablePassthrough()} | PROMPT


def qa(llm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RetrievalQA.from_chain_type(llm=llm, retriever=RETRIEVER)


def stuff(llm):
    prompt = ChatPromptTemplate.from_template("{context}\n{input}")
    return create_retrieval_chain(RETRIEVER, create_stuff_documents_chain(llm, prompt))


def own_tool(llm):
    @tool
    def look_up(query: str) -> str:
        """Look up."""
        return str(STORE.similarity_search(query))

    return create_agent(llm, [look_up])


CHAINS = {
    "retriever": (lambda llm: RETRIEVER, RETRIEVER),
    "store": (lambda llm: STORE, STORE),
    "lcel": (lambda llm: prompt_chain() | llm, RETRIEVER),
    "config": (lambda llm: (prompt_chain() | llm).with_config(tags=["x"]).with_retry(), RETRIEVER),
    "fallback": (
        lambda llm: RunnableLambda(str).with_fallbacks([RunnableParallel(a=RETRIEVER)]),
        RETRIEVER,
    ),
    "assign": (
        lambda llm: RunnablePassthrough.assign(context=itemgetter("question") | RETRIEVER) | PROMPT,
        RETRIEVER,
    ),
    "lambda": (lambda llm: RunnableLambda(lambda q: RETRIEVER.invoke(q)[:1]) | llm, RETRIEVER),
    "create_retrieval_chain": (stuff, RETRIEVER),
    "multi_query": (
        lambda llm: MultiQueryRetriever.from_llm(retriever=RETRIEVER, llm=llm),
        RETRIEVER,
    ),
    "compression": (
        lambda llm: ContextualCompressionRetriever(
            base_retriever=RETRIEVER,
            base_compressor=EmbeddingsFilter(embeddings=WordEmbeddings(), k=3),
        ),
        RETRIEVER,
    ),
    "retriever_tool": (lambda llm: create_retriever_tool(RETRIEVER, "s", "Search."), RETRIEVER),
    "agent": (
        lambda llm: create_agent(llm, [create_retriever_tool(RETRIEVER, "s", "Search.")]),
        RETRIEVER,
    ),
    "agent_own_tool": (own_tool, STORE),
}


@pytest.mark.parametrize("shape", CHAINS)
def test_the_store_inside_is_found(shape):
    """The retriever itself where there is one, because it carries the filter; else the store."""
    make, expected = CHAINS[shape]
    llm = ChatRASD(model=LLM)
    assert llm.attach(make(llm)) is llm
    assert [True] == [source is expected for source in llm._rasd.attached]


def test_the_store_of_a_classic_chain_is_found():
    """The same for RetrievalQA."""
    llm = ChatRASD(model=LLM)
    llm.attach(qa(llm))
    assert [True] == [source is RETRIEVER for source in llm._rasd.attached]


def test_a_chain_without_a_store_is_refused():
    """Attaching nothing would be a silent no-op."""
    llm = ChatRASD(model=LLM)
    with pytest.raises(ConfigurationError, match=r"No vector store.*attach\(retriever\)"):
        llm.attach(PROMPT | llm)


class NoStore(BaseRetriever):
    """A retriever that asks a service."""

    def _get_relevant_documents(self, query, *, run_manager):
        return []


def test_a_retriever_without_a_store_is_refused():
    """The error names the retriever and what may be given in its place; the model is left as it was."""
    llm = ChatRASD(model=LLM)
    with pytest.raises(
        ConfigurationError, match=r"This NoStore searches no vector store.*store=\[\.\.\.\]"
    ):
        llm.attach(NoStore())
    assert (None, []) == (llm.store, llm._rasd.attached)


def search_function(query, k):
    """Return what the store finds."""
    return STORE.similarity_search(query, k=k)


@pytest.mark.parametrize("source", [["one", "two"], search_function])
def test_what_is_no_runnable_goes_to_the_engine_as_it_is(source):
    """Lists, collections, indexes and functions are the engine's to judge."""
    llm = ChatRASD(model=LLM)
    llm.attach(source)
    assert llm._rasd.attached == [source]


def test_an_attached_store_survives_a_rebuild_of_the_model():
    """LangChain copies a model through its fields; the copy drafts from the same store."""
    llm = ChatRASD(model=LLM).attach(RETRIEVER)
    fields = {name: getattr(llm, name) for name in type(llm).model_fields}
    assert type(llm)(**fields)._rasd is llm._rasd
    assert type(llm)(**{**fields, "namespace": "b"})._rasd.options["store"] is RETRIEVER


def test_an_ensembles_stores_are_joined():
    """Two different stores inside one chain are both drafted from."""
    other = InMemoryVectorStore(WordEmbeddings())
    other.add_texts(["from the other store"])
    ensemble = EnsembleRetriever(retrievers=[RETRIEVER, other.as_retriever()], weights=[0.5, 0.5])
    llm = ChatRASD(model=LLM).attach(ensemble)
    (source,) = llm._rasd.attached
    assert ["from the other store"] == [c.text for c in source.search("store", 3)]
