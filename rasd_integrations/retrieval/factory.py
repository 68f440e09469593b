"""Wraps any supported store as a chunk source. Duck-typed: no store library is imported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval.base import ChunkSource, FunctionSource, JoinedSource
from rasd_integrations.retrieval.chroma_store import ChromaSource
from rasd_integrations.retrieval.faiss_store import FaissSource
from rasd_integrations.retrieval.items import is_a
from rasd_integrations.retrieval.langchain_store import LangChainSource
from rasd_integrations.retrieval.llama_index_store import LlamaIndexSource, from_index
from rasd_integrations.retrieval.memory import ListSource

_INNER = (
    "base_retriever",
    "retriever",
    "_retriever",
    "_vector_retriever",
    "_index",
    "query_engine",
    "_query_engine",
    "bound",
    "default",
)
"""Attributes in which retrievers, query engines and runnables keep what they wrap."""
_INNER_LISTS = ("retrievers", "_retrievers")
_MAX_DEPTH = 8  # nested wrappers; a cycle ends here


def as_chunk_source(
    obj: object, *, texts: Sequence[Any] | Mapping[int, Any] | None = None, embed: Any = None
) -> ChunkSource:
    """Wrap a store as a :class:`ChunkSource`.

    Supported are LangChain's vector stores and retrievers over them, LlamaIndex's vector indices, their
    retrievers and query engines, a chromadb collection, a faiss index (with ``texts`` and ``embed``), a list of
    texts (ranked by words, or by ``embed``), a function of ``(query, k)``, and a :class:`ChunkSource` itself. A
    retriever is never called: its store is searched, with the filter that it carries.

    Args:
        obj: The store.
        texts: The texts of a faiss index, in the order of its vectors.
        embed: The embedding that the store was filled with, if it does not bring its own: an embedding object
            of LangChain, LlamaIndex or Chroma, or a function from a list of texts to their vectors.

    Raises:
        RetrievalError: The object is none of these, or lacks what a search needs.
    """
    if texts is not None and not _is_faiss_index(obj):
        msg = f"texts belongs to a faiss index, but the store is a {type(obj).__name__}. Leave it out."
        raise RetrievalError(msg)
    source = _bare(obj, texts, embed)
    if source is not None:
        return source
    source = _complete(obj) or _unwrapped(obj, _MAX_DEPTH)
    if source is None:
        raise RetrievalError(_refusal(obj))
    if embed is not None:
        msg = (
            f"embed was given, but a {type(obj).__name__} brings its own embedding or needs none. "
            "Leave it out."
        )
        raise RetrievalError(msg)
    return source


def _bare(obj: Any, texts: Any, embed: Any) -> ChunkSource | None:
    """Wrap a store whose texts or embedding may be passed by the caller."""
    if _is_faiss_index(obj):
        return FaissSource(obj, texts, embed)
    if is_a(obj, "chromadb", "Collection"):
        return ChromaSource(obj, embed)
    if is_a(obj, "llama_index", "BasePydanticVectorStore"):
        return LlamaIndexSource(obj, embed)
    if isinstance(obj, list | tuple):
        return ListSource(obj, embed)
    return None


def _complete(obj: Any) -> ChunkSource | None:
    """Wrap a store that needs nothing else."""
    if isinstance(obj, type):
        return None
    if is_a(obj, "langchain_core", "VectorStore"):
        return LangChainSource(obj)
    if is_a(obj, "llama_index", "VectorStoreIndex") or is_a(
        obj, "llama_index", "VectorIndexRetriever"
    ):
        return from_index(obj)
    if isinstance(obj, ChunkSource):
        return obj
    if callable(obj) and not _is_of_a_framework(obj):
        return FunctionSource(obj)
    return None


def _unwrapped(obj: Any, depth: int) -> ChunkSource | None:
    """Wrap the store inside a retriever, query engine or runnable, which is not called itself."""
    if depth == 0 or isinstance(obj, type):
        return None
    store = getattr(obj, "vectorstore", None)
    if is_a(store, "langchain_core", "VectorStore"):
        carried = dict(getattr(obj, "search_kwargs", None) or {})
        if is_a(obj, "langchain_core", "RunnableBinding"):  # retriever.bind(filter=...)
            carried |= obj.kwargs
        return LangChainSource(store, carried)
    inner = [getattr(obj, name, None) for name in _INNER]
    for found in (_inner_source(i, depth) for i in inner):
        if found is not None:
            return found
    lists = (getattr(obj, name, None) for name in _INNER_LISTS)
    inner = [i for many in lists if isinstance(many, list | tuple) for i in many]
    sources = [s for s in (_inner_source(i, depth) for i in inner) if s is not None]
    if len(sources) < 2:
        return sources[0] if sources else None
    return JoinedSource(sources)


def _inner_source(inner: Any, depth: int) -> ChunkSource | None:
    """Wrap an inner object, unless it is a function, which is not ours to call."""
    if inner is None or inspect.isroutine(inner):
        return None
    return _complete(inner) or _unwrapped(inner, depth - 1)


def _is_of_a_framework(obj: object) -> bool:
    """Return True if calling ``obj`` may run a model: chains, retrievers, tools."""
    packages = {c.__module__.split(".")[0] for c in type(obj).__mro__}
    return any(p == "llama_index" or p.startswith("langchain") for p in packages)


def _is_faiss_index(obj: object) -> bool:
    ours = (c.__module__.split(".")[0] == "faiss" for c in type(obj).__mro__)
    return any(ours) and hasattr(obj, "ntotal")


def _refusal(obj: object) -> str:
    name = type(obj).__name__
    if isinstance(obj, type):
        return f"The store is the class {obj.__name__} itself. Give an object of it."
    if is_a(obj, "chromadb", "BaseAPI"):
        return f"A Chroma {name} holds many collections. Give one: client.get_collection(name)."
    if is_a(obj, "chromadb", "AsyncCollection"):
        return (
            "An asynchronous Chroma collection cannot be searched here. Give the synchronous one."
        )
    return (
        f"A {name} cannot be searched for chunks. Give a LangChain VectorStore or a retriever over one, "
        "a LlamaIndex VectorStoreIndex, a chromadb Collection, a faiss index with texts= and embed=, a "
        "list of texts, or a function of (query, k). Or leave the store out: drafts then come from the "
        "prompt itself."
    )
