"""Bounds how much one token can add to the shortest completion of a JSON answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rasd_integrations.text.grammar.schema import mappings_in, resolved

_NUMBER, _FORMAT, _MARKS, _SPARE = 24, 48, 6, 16  # bytes
_PLAIN = {"string": 2, "integer": 1, "number": 1, "boolean": 5, "null": 4, "object": 2, "array": 2}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = re.compile(r"\{(\d+)")


def max_growth(*schemas: Any) -> int:
    """Return an upper bound in bytes, and so in tokens, over all parts of ``schemas``."""
    begun = len(schemas) == 1  # nothing is chosen before it, so the whole has begun already
    return max((_Sizes(schema).largest(begun=begun) for schema in schemas), default=0) + _SPARE


class _Sizes:
    """Least sizes of a schema's parts in bytes; of alternatives the largest counts."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[int, int] = {}

    def largest(self, *, begun: bool) -> int:
        parts = list(mappings_in(self._root))
        if begun and parts and "properties" in parts[0]:
            del parts[0]
        return max(map(self.of, parts), default=0)

    def of(self, schema: Any) -> int:
        if not isinstance(schema, Mapping):
            return _MARKS
        if id(schema) not in self._known:
            self._known[id(schema)] = 0  # for references to itself
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


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 30 else 0
