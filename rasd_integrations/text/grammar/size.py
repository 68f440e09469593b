"""How long the values of a schema are at least: what one token of an answer may add to its end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rasd_integrations.text.grammar.schema import resolved

_NUMBER, _FORMAT, _MARKS, _SPARE = 24, 48, 6, 16  # bytes
_PLAIN = {"string": 2, "integer": 1, "number": 1, "boolean": 5, "null": 4, "object": 2, "array": 2}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = re.compile(r"\{(\d+)")


def most_growth(*schemas: Any) -> int:
    """Return how many bytes, so no fewer tokens, one token may add to what an answer still needs."""
    alone = (
        len(schemas) == 1
    )  # where nothing is chosen before it, all know that the whole has begun
    largest = max((_Sizes(schema).largest(begun=alone) for schema in schemas), default=0)
    return largest + _SPARE


class _Sizes:
    """The least sizes of a schema's parts, each found once; of alternatives that of the largest."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[int, int] = {}

    def largest(self, *, begun: bool) -> int:
        parts = list(_parts(self._root))
        if begun and "properties" in parts[0]:
            del parts[0]
        return max(map(self.of, parts), default=0)

    def of(self, schema: Any) -> int:
        if not isinstance(schema, Mapping):
            return _MARKS
        if id(schema) not in self._known:
            self._known[id(schema)] = 0  # within itself
            self._known[id(schema)] = self._measured(schema)
        return self._known[id(schema)]

    def _measured(self, schema: Mapping[str, Any]) -> int:
        kinds = schema.get("type")
        named = kinds if isinstance(kinds, list) else [kinds]
        size = max((_PLAIN.get(kind, 0) for kind in named if isinstance(kind, str)), default=0)
        size += _NUMBER * any(bound in schema for bound in _BOUNDS)
        if "$ref" in schema and (target := resolved(schema, self._root)) is not schema:
            size += self.of(target)
        for name in ("const", "enum"):
            if name in schema:
                values = schema[name] if isinstance(schema[name], list) else [schema[name]]
                size += max((len(json.dumps(value)) for value in values), default=0)
        for name in ("anyOf", "oneOf"):
            size += max(map(self.of, _listed(schema.get(name))), default=0)
        size += sum(map(self.of, _listed(schema.get("allOf"))))
        return size + self._of_text(schema) + self._of_list(schema) + self._of_object(schema)

    def _of_text(self, schema: Mapping[str, Any]) -> int:
        pattern = schema.get("pattern")
        size = _whole(schema.get("minLength")) + _FORMAT * ("format" in schema)
        if isinstance(pattern, str):
            counts = [int(found) for found in _COUNTS.findall(pattern)]
            size += len(pattern) + sum(counts)
            if "){" in pattern:  # a repetition of repetitions
                for repeated in counts:
                    size = min(size * max(repeated, 1), 1 << 20)
        return size

    def _of_list(self, schema: Mapping[str, Any]) -> int:
        least = _whole(schema.get("minItems"))
        items = self.of(schema.get("items")) if least else 0
        return least * (items + 2) + sum(map(self.of, _listed(schema.get("prefixItems"))))

    def _of_object(self, schema: Mapping[str, Any]) -> int:
        properties = schema.get("properties")
        known = properties if isinstance(properties, Mapping) else {}
        names = [name for name in _listed(schema.get("required")) if isinstance(name, str)]
        size = sum(len(json.dumps(name)) + _MARKS + self.of(known.get(name)) for name in names)
        return size + _whole(schema.get("minProperties")) * (_MARKS + _NUMBER)


def _parts(schema: Any) -> Iterator[Any]:
    todo = [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, Mapping):
            yield part
            todo += part.values()
        elif isinstance(part, list):
            todo += part


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 30 else 0
