"""Token stores of short texts, one id a character, and look-ups by reading all of them."""

from __future__ import annotations

from collections import Counter

from rasd_integrations.datastore import TokenStore
from rasd_integrations.datastore.encoding import SEPARATOR
from rasd_integrations.datastore.segment import MAX_MATCH, continuations

EVERY = 1 << 20
DEPTH = 4


def encode(text: str) -> list[int]:
    """Return one id a character."""
    return [ord(c) for c in text]


def store_of(texts, **options) -> TokenStore:
    return TokenStore.build(texts, encode, **options)


def look_up(store, context, *, min_match=1, most_rows=EVERY, depth=DEPTH):
    """Return the match and the continuations with their counts, cut where their text ends."""
    length, rows = continuations(
        store.segments, encode(context), min_match=min_match, most_rows=most_rows, depth=depth
    )
    texts = ("".join(map(chr, row)).partition(chr(0))[0] for row in ends_marked(rows))
    return length, Counter(texts)


def ends_marked(rows):
    return [[0 if t == SEPARATOR else t for t in row] for row in rows]


def scan(texts, context, depth=DEPTH):
    """Return the longest match that something follows, and every continuation, by reading all texts."""
    for length in range(min(len(context), MAX_MATCH), 0, -1):
        needle = context[-length:]
        found = [
            text[end : end + depth]
            for text in dict.fromkeys(texts)
            for end in range(length, len(text))
            if text[end - length : end] == needle
        ]
        if found:
            return length, Counter(found)
    return 0, Counter()
