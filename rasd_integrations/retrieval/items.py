"""Converts what stores return to chunks, by shape: no framework is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rasd_integrations.errors import ConfigurationError, RetrievalError
from rasd_integrations.types import Chunk


def is_a(obj: object, package: str, name: str) -> bool:
    """Return True if a base class of ``obj`` is ``package``'s ``name``, without importing the package."""
    return any(
        c.__name__ == name and c.__module__.split(".")[0] == package for c in type(obj).__mro__
    )


def to_chunk(item: Any, rank: int = 0) -> Any:
    """Convert a text, LangChain document or LlamaIndex node; return anything else as it is.

    The guard drops and reports what is no chunk.
    """
    if isinstance(item, Chunk):
        return replace(item, rank=rank)
    if isinstance(item, str):
        return Chunk(item, rank=rank)
    if isinstance(item, tuple) and len(item) == 2:  # (document, score): only the order is used
        return to_chunk(item[0], rank)
    if hasattr(item, "page_content"):
        return Chunk(item.page_content, getattr(item, "id", None), rank, dict(item.metadata or {}))
    node = getattr(item, "node", item)
    if hasattr(node, "node_id") and hasattr(node, "get_content"):
        return node_to_chunk(node, rank)
    return item


def node_to_chunk(node: Any, rank: int = 0) -> Chunk:
    """Convert a LlamaIndex node; its source and offset join the metadata."""
    metadata = dict(node.metadata or {})
    for key in ("ref_doc_id", "start_char_idx"):
        value = getattr(node, key, None)
        if value is not None:
            metadata.setdefault(key, value)
    # get_content() defaults to MetadataMode.NONE: the text as stored.
    return Chunk(node.get_content(), node.node_id, rank, metadata)


def ranked(items: Iterable[Any]) -> list[Chunk]:
    """Convert a search result, best first."""
    return [to_chunk(item, rank) for rank, item in enumerate(items)]


def digest(*texts: str) -> bytes:
    """Return 16 bytes of hash over ``texts`` and their lengths, in order."""
    state = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()


def metadata_predicate(filter: Any) -> Callable[[Chunk], bool]:
    """Return a metadata filter as a function of a chunk.

    Args:
        filter: A function of the metadata, a mapping of keys to a value or a list of values, or nothing.

    Raises:
        RetrievalError: The filter cannot be applied here; nothing may pass it then.
    """
    if not filter:
        return lambda _: True
    if callable(filter):
        return lambda chunk: bool(filter(chunk.metadata))
    if isinstance(filter, Mapping) and not any(
        str(key).startswith("$") or isinstance(value, Mapping) for key, value in filter.items()
    ):
        wanted = {k: v if isinstance(v, list) else [v] for k, v in filter.items()}
        return lambda chunk: all(chunk.metadata.get(k) in v for k, v in wanted.items())
    msg = (
        f"The filter {filter!r} cannot be applied to this store. Use a callable over metadata, or a "
        "mapping of keys to values."
    )
    raise RetrievalError(msg)


def items_of(source: Any) -> Iterable[Any]:
    """Return texts, chunks, documents or nodes, one or many, as an iterable.

    Raises:
        ConfigurationError: ``source`` is not iterable.
    """
    # Converted before it is iterated: LangChain's documents yield their fields.
    if not isinstance(source, tuple) and isinstance(to_chunk(source), Chunk):
        return [source]
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        msg = (
            f"A {type(source).__name__} is no list of texts. Give the texts themselves, or chunks, documents "
            f"or nodes."
        )
        raise ConfigurationError(msg)
    return source


def text_of(item: Any) -> str:
    """Return the text of an item.

    Raises:
        ConfigurationError: It has none.
    """
    chunk = to_chunk(item)
    if not isinstance(chunk, Chunk) or not isinstance(chunk.text, str):
        msg = f"{item!r:.80} has no text. A store is built of texts, chunks, documents or nodes."
        raise ConfigurationError(msg)
    return chunk.text
