"""The way out of a JSON answer, so that it is whole before its room ends.

Small models may fill an unlimited string or list until ``max_tokens``, and half a JSON value is worth nothing. As
the room shrinks to what the closing takes, new parts may no longer be begun; then only the closing may follow. This
is part of the grammar's mask, a function of the tokens so far and of the room: drafting changes nothing in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

_MOST_STEPS = 400  # a way out that is longer is given up
_STRUCTURE = re.compile(r'["\[\]{},:\\]')
# Where the grammar leaves a choice, what ends comes first; inside a string a brace would be a letter.
_IN_TEXT = ('"}', '"]', '"', "a", " ", "0", "1")
_ELSEWHERE = ("}", "]", ",", ":", "null", "1", "0", "false", "true", '"', "[", "{", "-", ".")
_SPARE = 4  # a character of four bytes, or an escape, may have to be finished first
_LEAST_GROWTH = 16  # tokens


class Closer:
    """Knows how to end the JSON answers of one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: LLTokenizer,
        words: int,
        eos_ids: Sequence[int],
    ) -> None:
        """Read the vocabulary; ``words`` is the length of a mask."""
        self._in_text, self._elsewhere = (
            [tokens[0] for tokens in map(vocabulary.tokenize_str, texts) if len(tokens) == 1]
            for texts in (_IN_TEXT, _ELSEWHERE)
        )
        self._letter = vocabulary.tokenize_str("a")[-1]
        known = tokenizer.get_vocab().items()
        self._plain = _bits((n for token, n in known if not _STRUCTURE.search(token)), words)
        self._ends = _bits(eos_ids, words)

    def way_out(self, matcher: LLMatcher) -> list[int] | None:
        """Return tokens that end the answer from where ``matcher`` stands, which is left alone.

        ``None`` where none is found. Found greedily, so not always the shortest.
        """
        matcher = matcher.deep_copy()
        bits = np.zeros_like(self._plain)
        way: list[int] = []
        while len(way) < _MOST_STEPS and not matcher.is_accepting():
            step: list[int] = matcher.compute_ff_tokens()
            if not step:
                matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
                step = self._choice(bits)
            taken = matcher.try_consume_tokens(step)
            way += step[:taken]
            if not taken:
                break
        return way if matcher.is_accepting() and not matcher.is_error() else None

    def squeezed(
        self, bits: NDArray[np.int32], way: Sequence[int], room: int, most: int
    ) -> tuple[NDArray[np.int32], bool]:
        """Return the mask that keeps the way out open, and whether it leaves nothing else.

        Args:
            bits: What the grammar allows.
            way: The way out from here; empty where the answer may end.
            room: Tokens that the answer may still hold.
            most: Tokens of the longest part that one token may begin.
        """
        left = room - len(way) - _SPARE
        if left > most:
            return bits, False
        on = _bits(way[:1], len(bits)) if way else bits & self._ends
        return (on | (bits & self._plain), False) if way and left > 0 else (on, True)

    def _choice(self, bits: NDArray[np.int32]) -> list[int]:
        first, second = self._elsewhere, self._in_text
        if _holds(bits, self._letter):
            first, second = second, first
        listed = next((token for token in (*first, *second) if _holds(bits, token)), None)
        if listed is not None:
            return [listed]
        rest = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        return [int(rest[0])] if len(rest) else []


def growth(shortest: int) -> int:
    """Return how much longer one token may make the way out: a part is about as long as the whole at most."""
    return max(shortest, _LEAST_GROWTH)


def _holds(bits: NDArray[np.int32], token: int) -> bool:
    return bool(int(bits[token // 32]) >> (token % 32) & 1)


def _bits(tokens: Iterable[int], words: int) -> NDArray[np.int32]:
    flags = np.zeros(32 * words, dtype=np.uint8)
    flags[list(tokens)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
