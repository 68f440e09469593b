"""Short example strings for patterns and formats, whose end no search by character finds."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rasd_integrations.text.grammar.schema import mappings_in

if sys.version_info >= (3, 11):
    from re import _parser as sre_parse  # type: ignore[attr-defined] # no public parser of patterns
else:
    import sre_parse

_OF_FORMATS = {
    "date-time": "2000-01-01T00:00:00Z", "time": "00:00:00Z", "date": "2000-01-01", "duration": "P1D",
    "email": "a@b.co", "hostname": "a", "ipv4": "1.1.1.1", "ipv6": "::1", "uri": "a:b",
    "uuid": "00000000-0000-0000-0000-000000000000",
}  # fmt: skip
_MAX_EXAMPLES = 64
_LONGEST = 2048  # characters
_TRIED = "a0A -_.,:/@" + "".join(map(chr, range(33, 127)))
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdigit, "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}  # fmt: skip


def examples(*schemas: Any) -> list[str]:
    """Return short strings that the patterns and formats of ``schemas`` allow."""
    found: dict[str, None] = {}
    for part in mappings_in(*schemas):
        pattern = part.get("pattern")
        text = shortest_text(pattern) if isinstance(pattern, str) else None
        form = part.get("format")
        named = _OF_FORMATS.get(form) if isinstance(form, str) else None
        found |= dict.fromkeys(t for t in (text, named) if t)
    return list(found)[:_MAX_EXAMPLES]


def shortest_text(pattern: str) -> str | None:
    """Return a short match of ``pattern``; ``None`` if it cannot be parsed, or is long."""
    try:
        text = _of(sre_parse.parse(pattern))
    except (re.error, ValueError, OverflowError, RecursionError, MemoryError):
        return None
    return text if len(text) <= _LONGEST else None


def _of(items: Iterable[Any]) -> str:
    return "".join(_piece(str(op), value) for op, value in items)


def _piece(op: str, value: Any) -> str:
    if op == "LITERAL":
        return chr(value)
    if op == "BRANCH":
        texts: list[str] = [_of(branch) for branch in value[1]]
        return min(texts, key=len)
    if op == "SUBPATTERN":
        inner: Iterable[Any] = value[-1]
        return _of(inner)
    if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        piece = _of(value[2]) if value[0] else ""
        if value[0] * len(piece) > _LONGEST:
            raise ValueError(op)
        times: int = value[0]
        return piece * times
    if op in ("ANY", "NOT_LITERAL", "IN"):
        wanted = [(op, value)] if op != "IN" else value
        return next((char for char in _firsts(wanted) if _is_in(char, wanted)), "")
    if op == "AT":
        return ""
    raise ValueError(op)  # look-around and back-references, which grammars refuse


def _firsts(wanted: Any) -> Iterator[str]:
    yield from _TRIED
    for op, value in wanted:
        if str(op) in ("LITERAL", "RANGE"):
            yield chr(value if isinstance(value, int) else value[0])


def _is_in(char: str, wanted: Any) -> bool:
    negated, inside = False, False
    for op, value in wanted:
        kind = str(op)
        negated |= kind == "NEGATE"
        inside |= (
            kind == "ANY"
            or (kind == "LITERAL" and ord(char) == value)
            or (kind == "NOT_LITERAL" and ord(char) != value)
            or (kind == "RANGE" and value[0] <= ord(char) <= value[1])
            or (kind == "CATEGORY" and _is_of(char, str(value)))
        )
    return inside != negated


def _is_of(char: str, category: str) -> bool:
    without = category.replace("_NOT_", "_")
    return bool(_CATEGORIES[without](char)) != (without != category)
