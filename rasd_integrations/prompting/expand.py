"""The target's prompt with whole documents in place of their chunks (``context="documents"``).

Documents come before anything else in their region, in an order that does not depend on the question,
so that the next question on the same documents finds their KV in the prefix cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rasd_integrations.prompting.chunks import FoundChunks, StoreSession
from rasd_integrations.prompting.hints import Prompt, PromptPlan
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
_MIN_CHARS = 24  # a shorter text without an id may occur in any document
_LONGEST_HEADER = 300
_LABEL = re.compile(r"\W{0,8}\w[\w .-]{0,40}['\"]?:")
# What `str` writes around the texts of a list of Documents.
_REPR = re.compile(r"Document\(|(?:id|metadata|page_content)=|\{[^{}]{0,2000}\}|'[^']{0,64}'|None")


@dataclass(slots=True, eq=False)
class _Document:
    """A document with its chunks' spans in the prompt and their ranges in its own text."""

    text: str
    order: tuple[str, ...]
    parts: tuple[Chunk, ...]
    ids: frozenset[str]
    spans: list[Span] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)


def expand(
    plan: PromptPlan,
    index: PromptIndex,
    found: FoundChunks,
    store: StoreSession,
    tokens: TokenCounter,
    *,
    room: int,
) -> PromptPlan:
    """Return ``plan`` with a target prompt that holds the chunks' documents, cut to ``room`` tokens.

    Over ``room``, small documents stay whole and the chunks' surroundings are kept of the others.
    Without documents, or room for them, the target prompt stays the same object.
    """
    documents = _documents(found.located, store)
    if not documents:
        return plan
    parts = tuple(part for document in documents for part in document.parts)
    regions, placed = _regions(index, documents)
    others = [_other_text(index.view, r, ds) for r, ds in zip(regions, placed, strict=True)]

    def fill(texts: dict[_Document, str]) -> tuple[Prompt, tuple[str, ...]]:
        filled = zip(placed, others, strict=True)
        return index.refill(
            regions, [_JOINT.join([*(texts[d] for d in ds), *rest]) for ds, rest in filled]
        )

    def count(prompt: Prompt) -> int:
        return sum(map(tokens.exact, PromptView.of(prompt).texts))

    sizes = {d: tokens.exact(d.text) for d in documents}
    total = sum(sizes.values())
    frame, _ = fill(dict.fromkeys(documents, ""))
    left = room - count(frame) - _JOINT_TOKENS * len(documents)
    if total <= left:
        target, faults = fill({d: d.text for d in documents})
        return replace(plan, target=target, documents=parts, faults=faults)
    for _ in range(_ROUNDS):
        texts = _fitted(sizes, left, index.chunk_chars)
        target, faults = fill(texts)
        excess = count(target) - room
        if excess <= 0:
            omitted = max(total - sum(map(tokens.exact, texts.values())), 0)
            return replace(
                plan, target=target, documents=parts, faults=faults, omitted_tokens=omitted
            )
        left -= excess + _JOINT_TOKENS
    fault = (
        f"No room for documents beside the prompt: {room} tokens in all, the prompt stays as sent."
    )
    return replace(plan, omitted_tokens=total, faults=(fault,))


def _documents(located: Sequence[Located], store: StoreSession) -> list[_Document]:
    """Return the documents of ``located``, each once, sorted independently of the question."""
    documents: dict[bytes, _Document] = {}
    for at in located:
        document = next((d for d in documents.values() if _contains(d, at.chunk)), None)
        if document is None:
            parts = store.document(at.chunk)
            text = join_chunks(parts).strip()
            if not text:
                continue
            ids = frozenset(part.id for part in parts if part.id is not None)
            document = documents.get(digest(text)) or _Document(
                text, _order(parts, text), tuple(parts), ids
            )
        place = Haystack(document.text).find(Needle(at.chunk.text))
        if place is None:
            continue  # another version of the document: the chunk stays as it is
        documents.setdefault(digest(document.text), document)
        document.spans.append(at.span)
        document.places.append(place)
    return sorted(documents.values(), key=lambda d: d.order)


def _contains(document: _Document, chunk: Chunk) -> bool:
    if chunk.id is not None:
        return chunk.id in document.ids
    return len(chunk.text) >= _MIN_CHARS and chunk.text in document.text


def _order(parts: Sequence[Chunk], text: str) -> tuple[str, ...]:
    metadata = parts[0].metadata
    names = (str(metadata.get(key, "")) for key in DOCUMENT_KEYS)
    return (*names, digest(text).hex())


def _regions(
    index: PromptIndex, documents: Sequence[_Document]
) -> tuple[list[Span], list[list[_Document]]]:
    """Return the regions to fill, in order, and the documents of each; a document goes to its first."""
    context = [index.context] if index.context is not None else []
    spans = [span for d in documents for span in d.spans]
    outside = [s for s in spans if not any(c.contains(s) for c in context)]
    regions, placed = [], []
    unplaced = list(documents)
    for region in clean(index.view, [*context, *hulls(outside)]):
        here = [d for d in unplaced if any(map(region.contains, d.spans))]
        if here:
            unplaced = [d for d in unplaced if d not in here]
            regions.append(region)
            placed.append(here)
    return regions, placed


def _other_text(view: PromptView, region: Span, documents: Sequence[_Document]) -> list[str]:
    """Return the region's other text: chunks of unknown documents, facts of other kinds."""
    gaps = without([region], [span for d in documents for span in d.spans])
    texts = [view.text(gap).strip() for gap in gaps]
    return [text for text in texts if not _is_separator(text)]


def _is_separator(text: str) -> bool:
    """True for text that only separates chunks: rules, "Source: ..." lines, `repr`'s markup."""
    if "page_content=" in text or "metadata=" in text:
        text = _REPR.sub("", text)
    lines = [line for line in text.split("\n") if any(map(str.isalnum, line.replace("\\n", "")))]
    return not lines or (len(text) <= _LONGEST_HEADER and all(map(_LABEL.match, lines)))


def _fitted(sizes: dict[_Document, int], left: int, chunk_chars: int) -> dict[_Document, str]:
    """Return each document's text, the short ones whole, cut to about ``left`` tokens in all."""
    texts: dict[_Document, str] = {}
    for n, (document, size) in enumerate(sorted(sizes.items(), key=lambda item: item[1])):
        share = max(left, 0) // (len(sizes) - n)
        if size <= share:
            texts[document] = document.text
            left -= size
        else:
            chars = len(document.text) * share // size
            texts[document] = _surroundings(document, chars, chunk_chars)
            left -= share
    return texts


def _surroundings(document: _Document, chars: int, chunk_chars: int) -> str:
    """Return the chunks' pieces of a document and their nearest neighbours, up to ``chars``."""
    text = document.text
    pieces = split(text, 0, len(text), max(chunk_chars, 1))
    far = len(pieces)
    distance = [
        0 if any(low < end and start < high for low, high in document.places) else far
        for start, end in pieces
    ]
    for order in (range(1, far), range(far - 2, -1, -1)):
        for i in order:
            distance[i] = min(distance[i], distance[i - order.step] + 1)
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
