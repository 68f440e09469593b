"""The interface of a vector store to the rest of the package."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

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
