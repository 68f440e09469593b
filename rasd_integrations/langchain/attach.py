"""Finds the vector stores inside a runnable, an agent or a tool. Reads attributes, calls nothing of theirs."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from inspect import getclosurevars, isfunction, ismethod
from typing import Any

from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.vectorstores import VectorStore, VectorStoreRetriever

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.retrieval import JoinedSource, as_chunk_source

_MOST_OBJECTS = 20_000  # a compiled graph of a large agent has some thousands


def find_source(chain: object) -> object:
    """Return the store in ``chain``, or ``chain`` itself.

    A :class:`VectorStoreRetriever` is kept whole, because it carries the metadata filter. Anything
    that is neither a runnable nor a tool (a collection, a list, a function of query and k, ...) is
    the source itself.

    Raises:
        ConfigurationError: There is no vector store in ``chain``.
    """
    if isinstance(chain, VectorStore | VectorStoreRetriever):
        return chain
    if not isinstance(chain, Runnable | BaseTool):
        return chain
    stores = list(_stores(chain))
    if not stores:
        msg = (
            f"This {type(chain).__name__} searches no vector store. Give the texts that it searches as a list, "
            f"store=[...], or a function of (query, k); or leave the store out: drafts then come from the prompt."
            if isinstance(chain, BaseRetriever)
            else f"No vector store was found in this {type(chain).__name__}. Pass the store or its retriever: "
            f"attach(retriever), or store=vectorstore."
        )
        raise ConfigurationError(msg)
    return stores[0] if len(stores) == 1 else JoinedSource([as_chunk_source(s) for s in stores])


def _stores(chain: object) -> Iterable[VectorStore | VectorStoreRetriever]:
    """Yield each store once, a retriever before the bare store it searches."""
    found = [o for o in _reachable(chain) if isinstance(o, VectorStore | VectorStoreRetriever)]
    retrieved = {id(o.vectorstore) for o in found if isinstance(o, VectorStoreRetriever)}
    for store in found:
        if id(store) not in retrieved:
            yield store


def _reachable(start: object) -> Iterable[object]:
    seen: dict[int, object] = {}  # holds the objects too: an id is only theirs while they live
    queue = deque([start])
    while queue and len(seen) < _MOST_OBJECTS:
        current = queue.popleft()
        if id(current) in seen:
            continue
        seen[id(current)] = current
        yield current
        queue.extend(_parts(current))


def _parts(value: object) -> Iterable[object]:
    """Return what a runnable, tool, container or function holds; other objects are not searched."""
    parts: Iterable[object] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        parts = value
    elif isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
    elif ismethod(value):
        parts = (value.__self__, value.__func__)
    elif isfunction(value):
        parts = _used_by(value)
    elif isinstance(value, Runnable | BaseTool) or _is_graph_part(value):
        parts = _attributes(value)
    return parts


def _is_graph_part(value: object) -> bool:
    # Nodes and branches of a compiled graph hold their runnables, but are none themselves.
    return type(value).__module__.startswith(("langgraph.", "langchain."))


def _attributes(value: object) -> Iterable[object]:
    names = [n for c in type(value).__mro__ for n in getattr(c, "__slots__", ())]
    slots = [
        getattr(value, name) for name in names if isinstance(name, str) and hasattr(value, name)
    ]
    return (*getattr(value, "__dict__", {}).values(), *slots)


def _used_by(function: Callable[..., Any]) -> Iterable[object]:
    """Return the variables that a function closes over or names in its module."""
    try:
        used = getclosurevars(function)
    except ValueError:  # a variable of the closure has no value yet
        return ()
    return (*used.nonlocals.values(), *used.globals.values())
