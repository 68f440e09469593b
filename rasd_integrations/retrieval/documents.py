"""Finds the chunks of one document, orders them and joins them to its text. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rasd_integrations.types import Chunk

DOCUMENT_KEYS = (
    "source",
    "file_path",
    "url",
    "ref_doc_id",
    "document_id",
    "doc_id",
    "parent_id",
    "file_name",
    "filename",
)
"""Metadata keys that name a chunk's document, widest first: a file may be loaded as many pages, each with
an id of its own. Bare file names are last, since folders share them."""

MAX_DOCUMENT_CHUNKS = 20_000
"""A group with more chunks is a collection, not a document."""

_PAGE_KEYS = ("page", "page_number", "page_label")
_START_KEYS = ("start_index", "start_char_idx")
_ORDINAL_KEYS = ("chunk_index", "chunk_number", "chunk_id", "chunk", "seq_num")
_LEAST_OVERLAP = 12  # characters; shorter agreements ("the ", a rule of dashes) happen by chance
_MOST_OVERLAP = 4096  # characters looked back; keeps text of one repeated character cheap

Fetch = Callable[[str, Any], Sequence[Chunk]]
"""``fetch(key, value)``: the chunks whose metadata has that value, in the store's order."""
Find = Callable[[Chunk], Chunk | None]
"""The stored chunk for one that lost its metadata, if it is known."""


def document_of(chunk: Chunk, fetch: Fetch, find: Find = lambda _: None) -> list[Chunk]:
    """Return the chunks of ``chunk``'s document in reading order; empty if that cannot be known.

    A key whose chunks contradict each other (two texts at one place: many documents from one
    "source", or two versions of one) is narrowed by the keys after it.

    Args:
        chunk: Any chunk of the document.
        fetch: Lists chunks by metadata.
        find: Asked if the metadata name no document.
    """
    if not document_name(chunk):
        chunk = find(chunk) or chunk
    known: dict[str, Any] = {}
    for key in DOCUMENT_KEYS:
        value = chunk.metadata.get(key)
        if not _names_a_document(value):
            continue
        known[key] = value
        group = [c for c in fetch(key, value) if _agrees(c.metadata, known)]
        ordered = reading_order(group)
        if ordered and len(group) <= MAX_DOCUMENT_CHUNKS and not _contradicts(ordered):
            return ordered
    return []


def document_name(chunk: Chunk) -> str:
    """Return key and value of the widest metadata that name the chunk's document; empty: none do."""
    found = ((key, chunk.metadata.get(key)) for key in DOCUMENT_KEYS)
    return next((f"{key}={value}" for key, value in found if _names_a_document(value)), "")


def reading_order(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Order one document's chunks by page and offset, else as the store lists them; drop repeats."""
    unique = list({(c.text, _page(c), start_of(c)): c for c in chunks}.values())
    pages = [_number(_page(c)) for c in unique]
    if any(p is None for p in pages) and any(p is not None for p in pages):
        return unique  # Roman page numbers among Arabic ones: the store's order is the better guess
    places: list[tuple[float, float]] = []
    for chunk, page in zip(unique, pages, strict=True):
        own_page = 0.0 if page is None else page
        place = _place(chunk)
        if place is None:  # not found by its splitter: it stays after the previous chunk
            last_page, last = places[-1] if places else (own_page, 0.0)
            place = last if last_page == own_page else 0.0
        places.append((own_page, place))
    order = sorted(range(len(unique)), key=places.__getitem__)
    return [unique[i] for i in order]


def join_chunks(chunks: Sequence[Chunk]) -> str:
    """Join one document's chunks, in reading order, to its text without their overlaps.

    An overlap comes from the chunks' offsets if the texts agree, otherwise it is the longest exact match of a
    chunk's head with the tail before it (at least 12 characters). White space that a splitter stripped
    between two chunks becomes a space, or a blank line if more was cut.
    """
    parts: list[str] = []
    tail = ""  # end of the joined text: as much as the next chunk can overlap
    end: int | None = None  # offset in the page at which the joined text ends, if known
    page: object = None
    longest = max((len(c.text) for c in chunks), default=0)
    for chunk in chunks:
        start, text = start_of(chunk), chunk.text
        if _page(chunk) != page:
            end = None
        gap = None if start is None or end is None else start - end
        if parts:
            text = _continuation(tail, text, gap)
        parts.append(text)
        tail = (tail + text)[-longest:] if longest else ""
        page = _page(chunk)
        end = None if start is None else max(end or 0, start + len(chunk.text))
    return "".join(parts)


def start_of(chunk: Chunk) -> int | None:
    """Return the chunk's offset in its document or page in characters, if known."""
    for key in _START_KEYS:
        number = _number(chunk.metadata.get(key))
        if number is not None and number >= 0:
            return int(number)
    return None


def _continuation(tail: str, text: str, gap: int | None) -> str:
    """Return what ``text`` adds to ``tail``, including a separator."""
    if gap is not None and gap <= 0:
        if -gap >= len(text) and text in tail:
            return ""
        if tail.endswith(text[:-gap] if gap else ""):
            return text[-gap:]
    if gap is not None and gap > 0:
        return (" " if gap == 1 else "\n\n") + text
    overlap = _overlap(tail, text)
    return text[overlap:] if overlap else "\n\n" + text


def _overlap(tail: str, text: str) -> int:
    """Return the length of the longest suffix of ``tail`` that ``text`` starts with, 0 if too short to count."""
    tail = tail[-min(len(text), _MOST_OVERLAP) :]
    head = text[:_LEAST_OVERLAP]
    at = tail.find(head) if len(text) >= _LEAST_OVERLAP else -1
    while at >= 0 and not text.startswith(tail[at:]):
        at = tail.find(head, at + 1)
    return len(tail) - at if at >= 0 else 0


def _contradicts(ordered: Sequence[Chunk]) -> bool:
    seen: dict[tuple[object, int], str] = {}
    for chunk in ordered:
        start = start_of(chunk)
        if start is None:
            continue
        other = seen.setdefault((_page(chunk), start), chunk.text)
        if not (chunk.text.startswith(other) or other.startswith(chunk.text)):
            return True
    return False


def _names_a_document(value: object) -> bool:
    # LlamaIndex writes the string "None" where a node has no source document.
    return isinstance(value, str | int) and value not in ("", "None")


def _agrees(metadata: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    return all(metadata.get(key) == value for key, value in known.items())


def _page(chunk: Chunk) -> object:
    found = (chunk.metadata.get(key) for key in _PAGE_KEYS)
    return next((v for v in found if isinstance(v, str | int | float)), None)


def _place(chunk: Chunk) -> float | None:
    start = start_of(chunk)
    if start is not None:
        return float(start)
    numbers = (_number(chunk.metadata.get(key)) for key in _ORDINAL_KEYS)
    return next((n for n in numbers if n is not None), None)


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None  # tables read with pandas leave NaN behind
