"""Encodes text to token ids; control tokens inside data stay text."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rasd_integrations.text.control import ControlTokens
from rasd_integrations.text.tool_formats import added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "\n"

# Fast tokenizers raise "Already borrowed" if two threads change their settings at once; several encoders
# may share a tokenizer.
_locks: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, threading.Lock] = (
    weakref.WeakKeyDictionary()
)
_locks_guard = threading.Lock()


class Continuation:
    """Encodes text that continues other text.

    Sentencepiece puts a space before every text it is given, also before the rest of a split one.
    """

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        """Find out if ``encode`` adds a space."""
        self._anchor = encode(_ANCHOR)
        self._adds_space = encode("a") != encode(f"{_ANCHOR}a")[len(self._anchor) :]

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Return the ids of ``text`` by ``encode``, without a space at its beginning."""
        if self._adds_space:
            ids = encode(_ANCHOR + text)
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return encode(text)


class TextEncoder:
    """Encodes texts with one tokenizer. Thread-safe.

    Lone surrogates, which are not Unicode, are read as question marks.

    Attributes:
        control: The tokenizer's control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out how ``tokenizer`` begins a text."""
        self._tokenizer = tokenizer
        with _locks_guard:
            self._lock = _locks.setdefault(tokenizer, threading.Lock())
        self.control = ControlTokens(tokenizer)
        # Matched in normalised text, where characters of another width or case may form a token.
        added = added_tokens(tokenizer).values()
        self._normalised = any(token.special and token.normalized for token in added)
        bos = tokenizer.bos_token_id
        starts_with_bos = bos is not None and self._ids("", special=True)[:1] == [bos]
        self._bos: list[int] = [bos] if starts_with_bos else []
        self._continuation = Continuation(self._ids)

    def whole(self, text: str) -> list[int]:
        """Return the ids of a prompt with begin-of-sequence if the model has it; parses control tokens."""
        ids = self._ids(text)
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def data(self, text: str) -> list[int]:
        """Return the ids of data: no special tokens, and control tokens in it stay text."""
        cut, seams = self.control.cut(text)
        return self.joined(seams.split(cut))

    def joined(self, parts: list[str]) -> list[int]:
        """Return the ids of a text that is split wherever data has part of a control token."""
        ids: list[int] = []
        for i, part in enumerate(parts):
            ids += self._part(part, first=i == 0)
        return ids

    def _part(self, text: str, *, first: bool) -> list[int]:
        """Return the ids of a text between splits; whole control tokens in it are the template's."""
        if len(text) == 1 and text in self.control.texts:  # alone between splits: data
            return self._following(text, first=first, literal=True)
        ids = self._following(text, first=first)
        if not self._normalised:
            return ids
        spans = [(a, b) for a, b in self.control.found(text) if text[a:b] in self.control.ids]
        own = [self.control.ids[text[a:b]] for a, b in spans]
        known = frozenset(self.control.ids.values())
        if not Counter(i for i in ids if i in known) - Counter(own):
            return ids
        # More than the template wrote: normalising turned data into one.
        borders = [0, *itertools.chain.from_iterable(spans), len(text)]
        between = [text[a:b] for a, b in zip(borders[::2], borders[1::2], strict=True)]
        ids = self._following(between[0], first=first, literal=True)
        for token, part in zip(own, between[1:], strict=True):
            ids += [token, *self._following(part, first=False, literal=True)]
        return ids

    def _following(self, text: str, *, first: bool, literal: bool = False) -> list[int]:
        """Return the ids of a text, without a space at its beginning unless it comes ``first``."""
        encode = partial(self._ids, literal=literal)
        return encode(text) if first else self._continuation.encode(text, encode)

    def _ids(self, text: str, *, special: bool = False, literal: bool = False) -> list[int]:
        """Return the ids of a text; with ``literal``, control tokens in it are text."""
        text = text.encode("utf-8", "replace").decode()  # lone surrogates become "?"
        with self._lock:
            return list(
                self._tokenizer.encode(
                    text, add_special_tokens=special, split_special_tokens=literal, verbose=False
                )
            )
