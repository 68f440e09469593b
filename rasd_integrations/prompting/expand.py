"""The target's prompt with whole documents in place of their chunks (``context="documents"``).

The documents stand where the chunks stood, ahead of whatever else is there, in an order that no question
changes: the next question on the same documents finds their keys and values in the prefix cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rasd_integrations.prompting.chunks import Found, StoreSession
from rasd_integrations.prompting.compress import refill
from rasd_integrations.prompting.hints import Prompt, PromptHints
from rasd_integrations.prompting.locate import Haystack, Located, Needle, PromptIndex
from rasd_integrations.prompting.prompt_view import PromptView, Span, clean, hulls, without
from rasd_integrations.prompting.splitting import split
from rasd_integrations.prompting.token_counts import TokenCounter
from rasd_integrations.retrieval import join_chunks
from rasd_integrations.retrieval.documents import DOCUMENT_KEYS
from rasd_integrations.retrieval.items import digest
from rasd_integrations.types import Chunk

_JOINT = "\n\n"
_JOINT_TOKENS = 4
_ROUNDS = 3
_LEAST_CHARS = 24  # a shorter text without an id may stand in any document
_LONGEST_HEADER = 300
_LABEL = re.compile(r"\W{0,8}\w[\w .-]{0,40}['\"]?:")
# What `str` writes round the text of a list of Documents.
_REPR = re.compile(r"Document\(|(?:id|metadata|page_content)=|\{[^{}]{0,2000}\}|'[^']{0,64}'|None")


@dataclass(slots=True)
class _Document:
    """A document, where its chunks stand in the prompt, and where they stand in it."""

    text: str
    order: tuple[str, ...]
    ids: frozenset[str]
    spans: list[Span] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Expansion:
    """The target's prompt with documents in it; ``None`` where there are none, or no room for them."""

    target: Prompt | None = None
    omitted_tokens: int = 0
    faults: tuple[str, ...] = ()


def expand(
    view: PromptView,
    index: PromptIndex,
    hints: PromptHints,
    found: Found,
    store: StoreSession,
    tokens: TokenCounter,
    *,
    room: int,
    chunk_chars: int,
) -> Expansion:
    """Return the prompt with the documents of which a chunk stands in it, cut to ``room`` tokens.

    Over ``room``, small documents stay whole and the chunks' surroundings are kept of the others.
    """
    documents = _documents(found.located, store)
    if not documents:
        return Expansion()
    regions, placed = _places(view, index, documents)
    leftovers = [_leftovers(view, r, ds) for r, ds in zip(regions, placed, strict=True)]

    def fill(texts: dict[int, str]) -> tuple[Prompt, tuple[str, ...]]:
        contents = [
            _JOINT.join([*(texts[id(d)] for d in ds), *rest])
            for ds, rest in zip(placed, leftovers, strict=True)
        ]
        return refill(view, regions, contents, index, hints)

    def count(prompt: Prompt) -> int:
        return sum(map(tokens.exact, PromptView.of(prompt).texts))

    sizes = {id(d): tokens.exact(d.text) for d in documents}
    frame, _ = fill({id(d): "" for d in documents})
    left = room - count(frame) - _JOINT_TOKENS * len(documents)
    if sum(sizes.values()) <= left:
        target, faults = fill({id(d): d.text for d in documents})
        return Expansion(target, 0, faults)
    for _ in range(_ROUNDS):
        texts = _fitted(documents, sizes, left, chunk_chars)
        target, faults = fill(texts)
        excess = count(target) - room
        if excess <= 0:
            omitted = sum(sizes.values()) - sum(map(tokens.exact, texts.values()))
            return Expansion(target, max(omitted, 0), faults)
        left -= excess + _JOINT_TOKENS
    fault = (
        f"No room for documents beside the prompt: {room} tokens in all, the prompt stays as sent."
    )
    return Expansion(omitted_tokens=sum(sizes.values()), faults=(fault,))


def _documents(located: Sequence[Located], store: StoreSession) -> list[_Document]:
    """Return the documents of ``located``, each once, in an order of their own."""
    documents: dict[bytes, _Document] = {}
    for at in located:
        document = next((d for d in documents.values() if _holds(d, at.chunk)), None)
        if document is None:
            parts = store.document(at.chunk)
            text = join_chunks(parts).strip()
            if not text:
                continue
            ids = frozenset(part.id for part in parts if part.id is not None)
            document = documents.get(digest(text)) or _Document(text, _order(parts, text), ids)
        hay, needle = Haystack(document.text), Needle(at.chunk.text)
        place = hay.exact(needle) or hay.loose(needle) or hay.similar(needle)
        if place is None:
            continue  # another version of the document: the chunk stays where it is
        documents.setdefault(digest(document.text), document)
        document.spans.append(at.span)
        document.places.append(place)
    return sorted(documents.values(), key=lambda d: d.order)


def _holds(document: _Document, chunk: Chunk) -> bool:
    if chunk.id is not None:
        return chunk.id in document.ids
    return len(chunk.text) >= _LEAST_CHARS and chunk.text in document.text


def _order(parts: Sequence[Chunk], text: str) -> tuple[str, ...]:
    metadata = parts[0].metadata
    names = (str(metadata.get(key, "")) for key in DOCUMENT_KEYS)
    return (*names, digest(text).hex())


def _places(
    view: PromptView, index: PromptIndex, documents: Sequence[_Document]
) -> tuple[list[Span], list[list[_Document]]]:
    """Return the regions that documents go into, in order, and which go where: each once, at its first."""
    spans = [span for d in documents for span in d.spans]
    context = [index.context] if index.context is not None else []
    outside = [s for s in spans if not any(c.contains(s) for c in context)]
    regions, placed, seen = [], [], set[int]()
    for region in clean(view, [*context, *hulls(outside)]):
        here = [
            d
            for d in documents
            if id(d) not in seen and any(region.contains(span) for span in d.spans)
        ]
        if here:
            seen.update(map(id, here))
            regions.append(region)
            placed.append(here)
    return regions, placed


def _leftovers(view: PromptView, region: Span, documents: Sequence[_Document]) -> list[str]:
    """Return what else stands in the region: chunks of no known document, facts of other kinds."""
    gaps = without([region], [span for d in documents for span in d.spans])
    texts = [view.text(gap).strip() for gap in gaps]
    return [text for text in texts if not _is_scaffold(text)]


def _is_scaffold(text: str) -> bool:
    """Whether ``text`` only sets chunks apart: rules, "Source: ..." lines, what `repr` adds."""
    if "page_content=" in text or "metadata=" in text:
        text = _REPR.sub("", text)
    said = [line for line in text.split("\n") if any(c.isalnum() for c in line.replace("\\n", ""))]
    return not said or (len(text) <= _LONGEST_HEADER and all(map(_LABEL.match, said)))


def _fitted(
    documents: Sequence[_Document], sizes: dict[int, int], left: int, chunk_chars: int
) -> dict[int, str]:
    """Return each document's text, cut so that all take about ``left`` tokens: the short ones whole."""
    texts: dict[int, str] = {}
    for n, d in enumerate(sorted(documents, key=lambda d: sizes[id(d)])):
        size, share = sizes[id(d)], max(left, 0) // (len(documents) - n)
        if size <= share:
            texts[id(d)] = d.text
            left -= size
        else:
            texts[id(d)] = _surroundings(d, len(d.text) * share // size, chunk_chars)
            left -= share
    return texts


def _surroundings(document: _Document, chars: int, chunk_chars: int) -> str:
    """Return the chunks' pieces of a document, and as many of their neighbours as ``chars`` allows."""
    text = document.text
    pieces = split(text, 0, len(text), max(chunk_chars, 1))
    far = len(pieces)
    distance = [
        0 if any(low < end and start < high for low, high in document.places) else far
        for start, end in pieces
    ]
    for i in range(1, far):
        distance[i] = min(distance[i], distance[i - 1] + 1)
    for i in range(far - 2, -1, -1):
        distance[i] = min(distance[i], distance[i + 1] + 1)
    kept = []
    for i in sorted(range(far), key=lambda i: (distance[i], i)):
        chars -= pieces[i][1] - pieces[i][0]
        if distance[i] and chars < 0:
            break
        kept.append(i)
    parts: list[str] = []
    for n, i in enumerate(kept := sorted(kept)):
        if n and kept[n - 1] != i - 1:
            parts[-1] = parts[-1].rstrip()
            parts.append(_JOINT)
        parts.append(text[slice(*pieces[i])])
    return "".join(parts).strip()
