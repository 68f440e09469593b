"""Finds control tokens inside data and splits them, so that they stay text."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rasd_integrations.text.tool_formats import special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters, which no template trims; numbered pairs if a text contains all of them.
_SINGLE_MARKS = range(0xF8FF, 0xDFFF, -1)

# Converts a subclass (an enumeration, say) to the value that JSON writes.
_EXACT: dict[type, Callable[[Any], object]] = {str: str.__str__, int: int, float: float}


class ControlTokens:
    """A tokenizer's control tokens, which must not be parsed inside data.

    Attributes:
        texts: The tokens as strings.
        ids: Their ids, without the unknown token, which any rare character may become.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Collect the tokenizer's special tokens."""
        self.texts = special_texts(tokenizer)
        found: dict[str, Any] = {text: tokenizer.convert_tokens_to_ids(text) for text in self.texts}
        self.ids = {text: int(i) for text, i in found.items() if i != tokenizer.unk_token_id}
        self._lengths = sorted({len(t) for t in self.texts})
        first = "".join(sorted({re.escape(t[0]) for t in self.texts}))
        self._first = re.compile(f"[{first}]") if first else None
        parts = [(t[:n], t[n:]) for t in self.texts for n in range(1, len(t))]
        self._heads = frozenset(head for head, _ in parts)
        self._tails = frozenset(tail for _, tail in parts)

    def cut(self, value: Any) -> tuple[Any, re.Pattern[str]]:
        """Return ``value`` with a mark inside each control token, and a pattern of the mark.

        Covers keys and values at any depth. A string that begins or ends with part of a control token
        is marked there too, as the template's own text could complete it. The mark occurs nowhere else,
        so the rendered template can be split at it, also in JSON-escaped form.
        """
        texts = list(_strings(value))
        numbered = (f"\uf8f0{number}\uf8f1" for number in itertools.count())
        marks = itertools.chain(map(chr, _SINGLE_MARKS), numbered)
        mark = next(m for m in marks if not any(f in t for t in texts for f in _forms(m)))
        seams = re.compile("|".join(map(re.escape, _forms(mark))))
        return _map_strings(value, lambda text: self._cut_text(text, mark)), seams

    def found(self, text: str) -> list[tuple[int, int]]:
        """Return the ranges of the control tokens of a text, as a tokenizer splits them."""
        spans: list[tuple[int, int]] = []
        for start in self._starts(text):
            if not spans or start >= spans[-1][1]:
                spans.append((start, start + self._length_at(text, start)))
        return spans

    def _starts(self, text: str) -> Iterator[int]:
        starts = (match.start() for match in self._first.finditer(text)) if self._first else ()
        return (start for start in starts if self._length_at(text, start))

    def _length_at(self, text: str, start: int) -> int:
        """Return the length of the longest control token at ``start``, or 0."""
        # One set look-up per length: vocabularies have thousands of these, in a few lengths.
        lengths = (n for n in reversed(self._lengths) if text[start : start + n] in self.texts)
        return next(lengths, 0)

    def _cut_text(self, text: str, mark: str) -> str:
        cuts: set[int] = set()
        for start in self._starts(text):
            # A single character cannot be split: it becomes a piece of its own.
            cuts |= {start + 1, start} if text[start] in self.texts else {start + 1}
        longest = max(self._lengths, default=1)
        end = len(text.rstrip())
        if any(text[max(0, end - n) : end] in self._heads for n in range(1, longest)):
            cuts.add(end)
        begin = len(text) - len(text.lstrip())
        if any(text[begin : begin + n] in self._tails for n in range(1, longest)):
            cuts.add(begin)
        borders = [0, *sorted(cuts), len(text)]
        return mark.join(text[a:b] for a, b in itertools.pairwise(borders))


def plain_data(value: Any) -> Any:
    """Return ``value`` as plain JSON types, anything else as text.

    Templates fail on values that are not JSON.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind, exact in _EXACT.items():
        if isinstance(value, kind):
            return exact(value)
    if isinstance(value, Mapping):
        return {_key(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain_data(item) for item in value), key=repr)
    return str(value)


def _forms(mark: str) -> tuple[str, str]:
    """Return a mark verbatim and as JSON escapes it."""
    return mark, json.dumps(mark)[1:-1]


def _key(key: Any) -> str:
    # As JSON writes them: None is "null", True is "true".
    return key if isinstance(key, str) else str(json.dumps(plain_data(key)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in itertools.chain(value.keys(), value.values()):
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(key) if isinstance(key, str) else key: _map_strings(item, change)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
