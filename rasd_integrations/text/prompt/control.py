"""Control tokens written inside content: found, and cut in two so that they stay text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ControlTokens:
    """The special tokens of a tokenizer, as strings that must not be parsed inside content."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Collect the special tokens; those of one character cannot be cut and stay as they are."""
        known = getattr(tokenizer, "added_tokens_decoder", {}).values()
        texts = {str(t) for t in known if t.special} | set(tokenizer.all_special_tokens)
        self._texts = frozenset(t for t in texts if len(t) > 1)
        self._lengths = sorted({len(t) for t in self._texts})
        first = "".join(sorted({re.escape(t[0]) for t in self._texts}))
        self._first = re.compile(f"[{first}]") if first else None

    def cut(self, value: Any) -> tuple[Any, str]:
        """Return ``value`` with a mark inside every control token of its strings, and the mark.

        Strings are found in mappings and lists at any depth; roles and keys are left alone. The mark
        stands nowhere else in ``value``: what is joined round it may be split at it again.
        """
        texts = list(_strings(value))
        # Private-use characters: no template trims or escapes them.
        marks = (f"\uf8f0{number}\uf8f1" for number in itertools.count())
        mark = next(m for m in marks if not any(m in text for text in texts))
        return _map_strings(value, lambda text: self._cut_text(text, mark)), mark

    def _cut_text(self, text: str, mark: str) -> str:
        if self._first is None:
            return text
        pieces, done = [], 0
        for match in self._first.finditer(text):
            at = match.start()
            # A set look-up a length: vocabularies have thousands of these, in a few lengths.
            if any(text[at : at + length] in self._texts for length in self._lengths):
                pieces.append(text[done : at + 1])
                done = at + 1
        return mark.join([*pieces, text[done:]])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(_strings, value))


def _map_strings(value: Any, change: Callable[[str], str], key: object = None) -> Any:
    if isinstance(value, str):
        return value if key == "role" else change(value)
    if isinstance(value, Mapping):
        return {k: _map_strings(v, change, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(v, change) for v in value]
    return value
