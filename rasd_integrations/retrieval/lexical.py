"""BM25 over a few texts (Robertson and Zaragoza 2009), for stores without an embedding."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

# Scripts written without spaces are split into characters, all others into words.
_TOKEN = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W_]+")
_K1 = 1.5  # BM25 k1: term-frequency saturation
_B = 0.75  # BM25 b: length normalisation


def words(text: str) -> list[str]:
    """Return the case-folded words of ``text``."""
    return _TOKEN.findall(text.casefold())


class LexicalIndex:
    """An inverted index from words to texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Index ``texts``."""
        counts = [Counter(words(text)) for text in texts]
        lengths = [sum(c.values()) for c in counts]
        mean = sum(lengths) / max(len(lengths), 1) or 1.0
        self._weights: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            for word, n in count.items():
                damped = n * (_K1 + 1) / (n + _K1 * (1 - _B + _B * length / mean))
                self._weights[word].append((i, damped))
        self._size = len(texts)

    def rank(self, query: str) -> list[int]:
        """Return the indices of the texts that share a word with ``query``, best first."""
        scores: defaultdict[int, float] = defaultdict(float)
        for word in set(words(query)):
            holders = self._weights.get(word, ())
            rarity = math.log(1 + (self._size - len(holders) + 0.5) / (len(holders) + 0.5))
            for i, weight in holders:
                scores[i] += rarity * weight
        return sorted(scores, key=lambda i: (-scores[i], i))
