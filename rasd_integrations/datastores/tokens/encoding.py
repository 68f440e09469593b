"""Encodes texts to token ids, and hashes texts and tokenizers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.retrieval.items import items_of, text_of

Ids = NDArray[np.uint32]
_T = TypeVar("_T")
SEPARATOR = 0xFFFF_FFFF  # between texts; no token has this id

# Scripts, numbers, white space, code and punctuation that tokenizers split differently.
_PROBE = (
    "The quick brown fox didn't jump over 1,234.50 lazy dogs (see Fig. 2b), or did it?\n\n"
    "\tdef f(x): return {'a': x**2}  # naïve café — “Straße”…\r\n"
    "Быстрая лиса. 快速的棕色狐狸跳过懒狗。素早い茶色の狐 빠른 갈색 여우 الثعلب السريع त्वरित 🦊👩‍💻 ﬁ½"
)


class Encoder:
    """Encodes texts without special tokens; control tokens in a text are encoded as text."""

    def __init__(self, encode: Any) -> None:
        """Use a tokenizer of transformers, or a function from a text to its ids.

        Raises:
            ConfigurationError: ``encode`` is neither.
        """
        if not callable(encode):
            msg = (
                f"encode is {encode!r}, but must be a tokenizer or a function from a text to its token ids, "
                f"such as RASD.encode."
            )
            raise ConfigurationError(msg)
        self._encode: Any = encode
        plain = {"add_special_tokens": False, "verbose": False} if _is_tokenizer(encode) else {}
        ids = encode(_PROBE, **plain)
        self.fingerprint = _fingerprint(as_ids(ids["input_ids"] if plain else ids))

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text; lone surrogates become question marks."""
        plain = [text.encode("utf-8", "replace").decode() for text in texts]
        if not plain or not _is_tokenizer(self._encode):
            return [as_ids(self._encode(text)) for text in plain]
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [as_ids(ids) for ids in self._own_tokenizer(plain, **options)["input_ids"]]

    @cached_property
    def _own_tokenizer(self) -> Any:
        """A copy: a fast tokenizer keeps the settings of a call, which would affect other threads."""
        return copy.deepcopy(self._encode)


def tokenizer_fingerprint(encode: Any) -> str:
    """Return a hash of what a tokenizer, or a function from a text to its ids, makes of a text of many scripts."""
    return Encoder(encode).fingerprint


def chunk_key(text: str) -> int:
    """Return a text's key in a store: a 64-bit hash."""
    return _hash64(text.encode("utf-8", "surrogatepass"))


def ids_key(ids: Ids) -> int:
    """Return the key of token ids added without a text."""
    return _hash64(b"\0ids" + ids.tobytes())


def as_ids(ids: Iterable[int]) -> Ids:
    """Return token ids as an array; raise unless they are integers from 0 to 2**32 - 2."""
    wide = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if wide.size == 0:
        return np.empty(0, np.uint32)
    if wide.ndim != 1 or wide.dtype.kind not in "iu":
        msg = f"Token ids must be a flat sequence of whole numbers, but are {str(ids)[:80]}."
        raise ConfigurationError(msg)
    if not 0 <= int(wide.min()) <= int(wide.max()) < SEPARATOR:
        msg = f"A token id is outside 0..{SEPARATOR - 1}: {int(wide.min())} to {int(wide.max())}."
        raise ConfigurationError(msg)
    return wide.astype(np.uint32)


def texts_of(source: Any) -> Iterator[str]:
    """Yield the texts of texts, chunks, documents or nodes, one or many."""
    return (text_of(item) for item in items_of(source))


def portions(
    items: Iterable[_T], limit: int, size: Callable[[_T], int] = lambda _: 1
) -> Iterator[list[_T]]:
    """Yield ``items`` in lists of at most ``limit`` in total ``size``, or of one larger item."""
    part: list[_T] = []
    total = 0
    for item in items:
        if part and total + size(item) > limit:
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    if part:
        yield part


def keys_of(items: Any) -> NDArray[np.uint64]:
    """Return the keys of texts, chunks or keys, one or many."""
    given = [items] if isinstance(items, int) else items_of(items)
    keys = [item if isinstance(item, int) else chunk_key(text_of(item)) for item in given]
    return np.array(keys, np.uint64)


def _is_tokenizer(encode: Callable[..., Any]) -> bool:
    return hasattr(encode, "convert_ids_to_tokens")


def _fingerprint(ids: Ids) -> str:
    return hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest()


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
