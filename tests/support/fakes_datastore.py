"""Token stores of short texts, one id a character, and look-ups by reading all of them."""

from __future__ import annotations

import itertools
from collections import Counter

import torch

from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.datastores.tokens.encoding import SEPARATOR
from rasd_integrations.datastores.tokens.shard import MAX_MATCH, continuations

EVERY = 1 << 20
DEPTH = 4


def encode(text: str) -> list[int]:
    """Return one id a character."""
    return [ord(c) for c in text]


def store_of(texts, **options) -> TokenStore:
    return TokenStore.build(texts, encode, **options)


def ids_store(*rows: list[int], **options) -> TokenStore:
    """Return a store of token ids that came without a text."""
    store = TokenStore(encode, **options)
    store.add_ids(rows)
    return store


def random_ids(n: int, seed: int, vocab: int = 256) -> list[int]:
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def look_up(store, context, *, min_match=1, most_rows=EVERY, depth=DEPTH):
    """Return the match and the continuations with their counts, cut where their text ends."""
    length, rows = continuations(
        store.shards, encode(context), min_match=min_match, most_rows=most_rows, depth=depth
    )
    texts = (itertools.takewhile(lambda token: token != SEPARATOR, row) for row in rows)
    return length, Counter("".join(map(chr, text)) for text in texts)


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
