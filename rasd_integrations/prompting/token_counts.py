"""Caches token counts and other facts about texts by the text's hash."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from rasd_integrations.prompting.prompt_view import PromptView
from rasd_integrations.retrieval.items import digest

_EXACT_CHARS = 8192  # longer texts are counted by sample: planning must not tokenise 200 KB
_SAMPLES = 4
_T = TypeVar("_T")


class ContentCache(Generic[_T]):
    """A thread-safe LRU cache of values computed from texts."""

    def __init__(self, size: int) -> None:
        """Keep at most ``size`` values."""
        self._size = size
        self._lock = threading.Lock()
        self._values: OrderedDict[bytes, _T] = OrderedDict()

    def get(self, texts: Iterable[str], make: Callable[[], _T]) -> _T:
        """Return the value for ``texts``, made now if it is not cached."""
        key = digest(*texts)
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value


class TokenCounter:
    """Counts tokens and caches the counts."""

    def __init__(self, count_tokens: Callable[[str], int]) -> None:
        """Count with ``count_tokens``."""
        self._count_tokens = count_tokens
        self._counts: ContentCache[int] = ContentCache(1024)

    def exact(self, text: str) -> int:
        """Return the number of tokens of ``text``."""
        return self._counts.get((text,), lambda: self._count(text)) if text else 0

    def estimate(self, text: str) -> int:
        """Return about that number; long texts are counted by four samples."""
        if len(text) <= _EXACT_CHARS:
            return self.exact(text)
        return self._counts.get(("estimate", text), lambda: self._sampled(text))

    def estimate_prompt(self, view: PromptView) -> int:
        """Return about the number of tokens of all messages."""
        return sum(map(self.estimate, view.texts))

    def _sampled(self, text: str) -> int:
        width = _EXACT_CHARS // _SAMPLES
        stride = (len(text) - width) // (_SAMPLES - 1)
        samples = (text[i * stride : i * stride + width] for i in range(_SAMPLES))
        return round(sum(map(self._count, samples)) * len(text) / _EXACT_CHARS)

    def _count(self, text: str) -> int:
        # Tokenizers refuse lone surrogates; for a count a question mark does as well.
        return self._count_tokens(text.encode("utf-8", "replace").decode("utf-8"))
