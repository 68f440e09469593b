"""The one interface that the rest of the package knows of a vector store."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from rasd_integrations.types import Chunk


@runtime_checkable
class ChunkSource(Protocol):
    """Something that can be searched for chunks by a question.

    Rank order is all that callers use; scores stay inside. Implementations may raise and may be slow:
    :class:`rasd_integrations.retrieval.GuardedSource` is what the engine calls.
    """

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        """Return at most ``k`` chunks, best first."""
        ...

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        """Return all chunks of the document that ``chunk`` belongs to, in reading order.

        An empty list says that the store cannot tell.
        """
        ...

    def fingerprint(self) -> str:
        """Return a cheap identity of the store's content, best effort, for cache keys."""
        ...
