"""Grammars over token ids for tests: a table of what may follow, in place of a compiled one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


class TableGrammar:
    """Allows after `path` what `follows(path)` says; finished where that is nothing."""

    is_closing = False
    closed_tokens = 0

    def __init__(self, follows: Callable[[tuple[int, ...]], Sequence[int]], vocab: int, path=()):
        self.follows, self.vocab, self.path = follows, vocab, list(path)

    def mask(self):
        bits = np.zeros(-(-self.vocab // 32), dtype=np.int32)
        for token in self.follows(tuple(self.path)):
            bits.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))
        return bits

    def forced(self):
        path, found = list(self.path), []
        while len(only := list(self.follows(tuple(path)))) == 1 and len(found) < 100:
            path.append(only[0])
            found.append(only[0])
        return found

    def push(self, token_id):
        if token_id not in self.follows(tuple(self.path)):
            return False
        self.path.append(token_id)
        return True

    def pop(self, count):
        if count:
            del self.path[-count:]

    def fork(self):
        return TableGrammar(self.follows, self.vocab, self.path)

    @property
    def finished(self):
        return not self.follows(tuple(self.path))


def banded(path):
    """Allow a third of the bytes, chosen by place and last token; every fifth place is forced."""
    if len(path) % 5 == 4:
        return [(7 * len(path) + path[-1]) % 256]
    start = (31 * len(path) + (path[-1] if path else 0)) % 256
    return [(start + i) % 256 for i in range(85)]
