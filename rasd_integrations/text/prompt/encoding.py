"""Text to token ids: as it stands, or with control tokens in data kept as text."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING

from rasd_integrations.text.control import ControlTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "\n"

# Fast tokenizers raise "Already borrowed" when two threads change their settings at once, and one
# tokenizer may serve several encoders.
_locks: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, threading.Lock] = (
    weakref.WeakKeyDictionary()
)
_locks_guard = threading.Lock()


class TextEncoder:
    """Encodes the texts of one tokenizer. Safe to use from many threads.

    Lone surrogates, which are no Unicode, are read as question marks.

    Attributes:
        control: The tokenizer's control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out how ``tokenizer`` begins a text."""
        self._tokenizer = tokenizer
        with _locks_guard:
            self._lock = _locks.setdefault(tokenizer, threading.Lock())
        self.control = ControlTokens(tokenizer)
        known = getattr(tokenizer, "added_tokens_decoder", {}).values()
        # Sought in normalised text, where characters of another width or case may add up to one.
        self._normalised = any(t.special and t.normalized for t in known)
        bos = tokenizer.bos_token_id
        starts_with_bos = bos is not None and self._ids("", special=True)[:1] == [bos]
        self._bos: list[int] = [bos] if starts_with_bos else []
        self._anchor = self._ids(_ANCHOR)
        # Sentencepiece writes a space before every text it is given, also before the rest of a cut one.
        self._adds_space = self._ids("a") != self._ids(f"{_ANCHOR}a")[len(self._anchor) :]

    def whole(self, text: str) -> list[int]:
        """Return the ids of a prompt, begin-of-sequence once where wanted; control tokens in it are such."""
        ids = self._ids(text)
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def data(self, text: str) -> list[int]:
        """Return the ids of a text whose control tokens stay text, without special tokens."""
        cut, seams = self.control.cut(text)
        return self.joined(seams.split(cut))

    def joined(self, parts: list[str]) -> list[int]:
        """Return the ids of a text that is cut wherever data holds part of a control token."""
        ids: list[int] = []
        for place, part in enumerate(parts):
            ids += self._part(part, first=place == 0)
        return ids

    def _part(self, text: str, *, first: bool) -> list[int]:
        """Return the ids of a text between cuts; the whole control tokens in it are the template's own."""
        if len(text) == 1 and text in self.control.texts:  # alone between cuts: data
            return self._following(text, first=first, literal=True)
        ids = self._following(text, first=first)
        if not self._normalised:
            return ids
        spans = [(a, b) for a, b in self.control.found(text) if text[a:b] in self.control.ids]
        own = [self.control.ids[text[a:b]] for a, b in spans]
        known = frozenset(self.control.ids.values())
        if not Counter(i for i in ids if i in known) - Counter(own):
            return ids
        # More than are written there: data became one when it was normalised.
        borders = [0, *itertools.chain.from_iterable(spans), len(text)]
        between = [text[a:b] for a, b in zip(borders[::2], borders[1::2], strict=True)]
        ids = self._following(between[0], first=first, literal=True)
        for token, part in zip(own, between[1:], strict=True):
            ids += [token, *self._following(part, first=False, literal=True)]
        return ids

    def _following(self, text: str, *, first: bool, literal: bool = False) -> list[int]:
        """Return the ids of a text, without the space of a beginning unless it comes ``first``."""
        if self._adds_space and not first:
            ids = self._ids(_ANCHOR + text, literal=literal)
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return self._ids(text, literal=literal)

    def _ids(self, text: str, *, special: bool = False, literal: bool = False) -> list[int]:
        """Return the ids of a text; ``literal``: control tokens in it are text."""
        text = text.encode("utf-8", "replace").decode()  # lone surrogates are no text: "?"
        with self._lock:
            return list(
                self._tokenizer.encode(
                    text, add_special_tokens=special, split_special_tokens=literal, verbose=False
                )
            )
