"""The interface of a vector store to the rest of the package; a function, and several sources, as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Protocol, runtime_checkable

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval.items import ranked
from rasd_integrations.types import Chunk


@runtime_checkable
class ChunkSource(Protocol):
    """A store that can be searched for chunks by a question.

    Callers use only the order, no scores. Implementations may raise and may be slow: the engine calls them
    through :class:`rasd_integrations.retrieval.GuardedSource`.
    """

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks, best first."""
        ...

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return all chunks of the document that ``chunk`` belongs to, in reading order.

        Empty if the store cannot tell.
        """
        ...

    def fingerprint(self) -> str:
        """Return a cheap, best-effort identity of the store's content, for cache keys."""
        ...


@runtime_checkable
class ReadableSource(Protocol):
    """A chunk source whose chunks can be listed, so that drafts may come from all of them."""

    def origin(self) -> Hashable:
        """Return what is equal for two sources of the same chunks, while one of them lives."""
        ...

    def keys(self, most: int, *, filter: Any = None) -> Sequence[Hashable]:
        """Return a key of each chunk that a search under ``filter`` may find, the newest last.

        Of more than ``most`` the newest. A key stands for one text if the store can tell that a text was replaced.
        """
        ...

    def read(self, keys: Sequence[Hashable], *, filter: Any = None) -> Mapping[Hashable, str]:
        """Return the texts of ``keys``, but of those that a search under ``filter`` finds no longer."""
        ...


class FunctionSource:
    """A function of ``(query, k)`` that returns texts, chunks, documents or nodes, best first."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Hold ``function``; the filter is passed if it has a ``filter`` argument."""
        self._function = function
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # some built-in callables publish no signature
            parameters = ()  # type: ignore[assignment]
        self._takes_filter = any(
            p.name == "filter" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters
        )

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return the function's result.

        Raises:
            RetrievalError: There is a filter and the function cannot take one.
        """
        if filter and not self._takes_filter:
            msg = (
                f"The pipeline searches under the filter {filter!r}, but the store is a function without "
                "a filter argument. Give it one: def search(query, k, filter=None)."
            )
            raise RetrievalError(msg)
        extra = {"filter": filter} if filter else {}
        found = self._function(query, k, **extra)
        # Non-lists pass through: the guard reports them.
        return ranked(found) if isinstance(found, list) else found

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return nothing: a function does not tell whole documents."""
        del chunk, filter
        return []

    def fingerprint(self) -> str:
        """Return the function's name."""
        named: Any = (
            self._function if hasattr(self._function, "__qualname__") else type(self._function)
        )
        return f"function-{named.__module__}.{named.__qualname__}"


class JoinedSource:
    """Several sources as one: their results in turn, without duplicates."""

    def __init__(self, sources: Sequence[ChunkSource]) -> None:
        """Hold ``sources``, the most trusted first."""
        self._sources = tuple(sources)

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return the first of each source, then the second of each, and so on."""
        results = [source.search(query, k, filter=filter) for source in self._sources]
        turns = [c for turn in zip_longest(*results) for c in turn if c is not None]
        unique = list({chunk.text: chunk for chunk in reversed(turns)}.values())[::-1]
        return ranked(unique[:k])

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return the document from the first source that knows it."""
        found = (source.document(chunk, filter=filter) for source in self._sources)
        return next((chunks for chunks in found if chunks), [])

    def origin(self) -> Hashable:
        """Return the origins of those sources that can be listed."""
        return tuple(s.origin() for s in self._sources if isinstance(s, ReadableSource))

    def keys(self, most: int, *, filter: Any = None) -> Sequence[Hashable]:
        """Return the keys of those sources that can be listed, each with its source's number."""
        found = [
            (number, key)
            for number, source in enumerate(self._sources)
            if isinstance(source, ReadableSource)
            for key in source.keys(most, filter=filter)
        ]
        return found[-most:]

    def read(self, keys: Sequence[Hashable], *, filter: Any = None) -> Mapping[Hashable, str]:
        """Return the texts of these sources' chunks."""
        own: dict[int, list[Hashable]] = {}
        for pair in keys:
            if isinstance(pair, tuple):  # as made above
                own.setdefault(pair[0], []).append(pair[1])
        found: dict[Hashable, str] = {}
        for number, part in own.items():
            source = self._sources[number]
            if isinstance(source, ReadableSource):
                texts = source.read(part, filter=filter)
                found |= {(number, key): text for key, text in texts.items()}
        return found

    def fingerprint(self) -> str:
        """Return the sources' fingerprints, joined."""
        return "+".join(source.fingerprint() for source in self._sources)
