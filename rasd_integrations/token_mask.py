"""Sets of token ids as bit masks: ``[..., ceil(vocab / 32)]`` int32, bit ``i % 32`` of word ``i // 32``."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.int32]


def mask_of(tokens: Iterable[int], words: int) -> Mask:
    """Return the mask ``[words]`` of ``tokens``."""
    flags = np.zeros(32 * words, dtype=np.uint8)
    flags[list(tokens)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def flags_of(mask: Mask) -> NDArray[np.uint8]:
    """Return ``mask`` as one 0 or 1 per token, in the last dimension."""
    return np.unpackbits(mask.view(np.uint8), axis=-1, bitorder="little")


def tokens_of(mask: Mask) -> list[int]:
    """Return the tokens of a one-dimensional ``mask`` in ascending order."""
    tokens: list[int] = np.flatnonzero(flags_of(mask)).tolist()
    return tokens


def has_token(mask: Mask, token: int) -> bool:
    """Return True if ``token`` is in a one-dimensional ``mask``; negative tokens never are."""
    return token >= 0 and bool(int(mask[token // 32]) >> (token % 32) & 1)
