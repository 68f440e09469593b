"""What both edges know of how a prompt was made: records of events, and hints given outright."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rasd_integrations.config import reject_unknown
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Chunk

_HINTS = ("question", "search_query", "chunks", "context", "filter")
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Bounded(OrderedDict[_Key, _Value]):
    """A dict that evicts its oldest entries."""

    def __init__(self, limit: int) -> None:
        """Keep at most ``limit`` entries."""
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: _Key, value: _Value) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._limit:
            self.popitem(last=False)


@dataclass(slots=True)
class RetrievalEvent:
    """One call of a retriever.

    Attributes:
        query: What was searched for; ``None`` if it may be another request's.
        chunks: What came back, best first; empty until the retriever has returned.
    """

    query: str | None
    chunks: tuple[Chunk, ...] = ()


def explicit_hints(given: Any, chunk: Callable[[Any, int], Chunk | None]) -> dict[str, Any]:
    """Return a call's own ``rasd={...}`` option under the names of ``PromptHints``.

    Args:
        given: The option; ``None`` is no hint.
        chunk: Converts one of the framework's documents and its rank; ``None``: it is none.

    Raises:
        ConfigurationError: Not a mapping, an unknown name, or a value of the wrong type.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        msg = f"rasd is {given!r} ({type(given).__name__}), but must be a dict of {', '.join(_HINTS)}."
        raise ConfigurationError(msg)
    reject_unknown(given, _HINTS, "rasd={...}")
    hints = {name: value for name, value in given.items() if value is not None}
    for name in ("question", "search_query", "context"):
        if not isinstance(hints.get(name, ""), str):
            msg = f"rasd[{name!r}] is {hints[name]!r} ({type(hints[name]).__name__}), but must be text."
            raise ConfigurationError(msg)
    if "question" in hints:
        hints["question_source"] = "explicit"
    if "chunks" in hints:
        given_chunks = hints["chunks"]
        items = given_chunks if isinstance(given_chunks, list | tuple) else [given_chunks]
        hints["chunks"] = tuple(_chunk(item, rank, chunk) for rank, item in enumerate(items))
        hints["chunk_source"] = "explicit"
    return hints


def _chunk(item: Any, rank: int, convert: Callable[[Any, int], Chunk | None]) -> Chunk:
    if isinstance(item, Chunk):
        return item
    if isinstance(item, str):
        return Chunk(item, rank=rank)
    if (found := convert(item, rank)) is not None:
        return found
    msg = f"rasd['chunks'][{rank}] is a {type(item).__name__}, but must be text, a document or a Chunk."
    raise ConfigurationError(msg)
