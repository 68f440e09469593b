"""Prepares JSON schemas for llguidance: closed objects, fixed white space, known formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from rasd_integrations.errors import ConfigurationError

# Formats that llguidance enforces; JSON Schema treats any other as an annotation.
_FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip
# The form models write most: it forces more tokens, and no model can write spaces for ever.
_WRITING = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
_SUBSCHEMAS = ("items", "additionalProperties", "contains", "unevaluatedProperties")
_LISTS = ("anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_COMBINED = ("allOf", "anyOf", "oneOf", "$ref")


def prepared(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    """Return ``schema`` for llguidance; every value it allows is valid for ``schema`` too.

    Objects with named properties get ``additionalProperties: false`` unless they say otherwise: a model
    that may invent properties does not stop.

    Raises:
        ConfigurationError: It is nested too deeply.
    """
    try:
        root = {} if schema is True else _closed(schema, schema)
    except RecursionError as err:
        msg = "The schema is nested too deeply. Nest its objects and lists less: 100 levels are followed."
        raise ConfigurationError(msg) from err
    return {"x-guidance": _WRITING, **root}


def without_unique_items(schema: Any) -> Any:
    """Return ``schema`` without ``uniqueItems``, for values that are read into sets."""
    if isinstance(schema, Mapping):
        kept = {k: v for k, v in schema.items() if not (k == "uniqueItems" and isinstance(v, bool))}
        return {key: without_unique_items(value) for key, value in kept.items()}
    return [without_unique_items(item) for item in schema] if isinstance(schema, list) else schema


def _closed(schema: Any, root: Any, *, may_close: bool = True) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = partial(_closed, root=root)
    out: dict[str, Any] = _with_named_keys(dict(schema), root)
    if isinstance(out.get("format"), str) and out["format"] not in _FORMATS:
        del out["format"]
    for key in _SUBSCHEMAS:
        if key in out:
            out[key] = closed(out[key])
    for key in _MAPS:
        if isinstance(out.get(key), Mapping):
            out[key] = {name: closed(inner) for name, inner in out[key].items()}
    alone = "properties" not in out
    for key in _LISTS:
        if isinstance(out.get(key), list):
            out[key] = [closed(inner, may_close=alone) for inner in out[key]]
    if isinstance(out.get("allOf"), list):
        # allOf parts must not forbid each other's properties; a single part may be closed.
        single = alone and len(out["allOf"]) == 1
        out["allOf"] = [closed(inner, may_close=single) for inner in out["allOf"]]
    if may_close and not alone and not any(key in out for key in _COMBINED):
        out.setdefault("additionalProperties", False)
    return out


def _with_named_keys(schema: dict[str, Any], root: Any) -> dict[str, Any]:
    """Rewrite ``propertyNames`` (an enum or a pattern) as properties, which llguidance knows."""
    names = schema.get("propertyNames")
    if not isinstance(names, Mapping) or "properties" in schema or "patternProperties" in schema:
        return schema
    names = resolved(names, root)
    values = schema.get("additionalProperties", True)
    rest = {k: v for k, v in schema.items() if k != "propertyNames"}
    listed, pattern = names.get("enum"), names.get("pattern")
    if isinstance(listed, list):
        own = dict.fromkeys((name for name in listed if isinstance(name, str)), values)
        return {**rest, "properties": own, "additionalProperties": False}
    if isinstance(pattern, str):
        return {**rest, "patternProperties": {pattern: values}, "additionalProperties": False}
    return schema


def mappings_in(*schemas: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every mapping in ``schemas``, the whole before its parts."""
    todo = list(schemas)
    while todo:
        part = todo.pop()
        if isinstance(part, Mapping):
            yield part
            todo += part.values()
        elif isinstance(part, list):
            todo += part


def resolved(schema: Mapping[str, Any], root: Any) -> Mapping[str, Any]:
    """Return the target of a ``$ref`` into the same document, or ``schema`` itself."""
    steps = str(schema.get("$ref", "")).removeprefix("#/").split("/")
    found: Any = root
    for step in steps:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else schema
