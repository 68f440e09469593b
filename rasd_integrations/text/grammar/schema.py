"""JSON schemas as a grammar reads them: closed objects, one way to write white space, known formats only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from rasd_integrations.errors import ConfigurationError

# What llguidance enforces. By JSON Schema's own rule any other format is a remark, not a limit.
_FORMATS = frozenset(
    {
        "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
    }
)  # fmt: skip
# One form only, the one models write most: it forces more tokens, and no model can write spaces for ever.
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
    """Return ``schema`` ready for the grammar: every value it allows is valid for ``schema`` too.

    An object with named properties that says nothing of others gets no others: a model that may invent
    properties does not stop.

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
    """Return ``schema`` without ``uniqueItems``: for values that are read into sets, which drop duplicates."""
    if isinstance(schema, Mapping):
        kept = {k: v for k, v in schema.items() if not (k == "uniqueItems" and isinstance(v, bool))}
        return {key: without_unique_items(value) for key, value in kept.items()}
    return [without_unique_items(item) for item in schema] if isinstance(schema, list) else schema


def _closed(schema: Any, root: Any, *, may_close: bool = True) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = partial(_closed, root=root)
    out: dict[str, Any] = _with_named_keys(dict(schema), root)
    if out.get("format") not in _FORMATS and isinstance(out.get("format"), str):
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
        # The parts of a sum must leave room for one another; a single part stands for itself.
        single = alone and len(out["allOf"]) == 1
        out["allOf"] = [closed(inner, may_close=single) for inner in out["allOf"]]
    if may_close and not alone and not any(key in out for key in _COMBINED):
        out.setdefault("additionalProperties", False)
    return out


def _with_named_keys(schema: dict[str, Any], root: Any) -> dict[str, Any]:
    """Return a schema whose ``propertyNames`` are told as properties, where they are a list or a pattern."""
    names = schema.get("propertyNames")
    if not isinstance(names, Mapping) or "properties" in schema or "patternProperties" in schema:
        return schema
    names = resolved(names, root)
    values = schema.get("additionalProperties", True)
    rest = {k: v for k, v in schema.items() if k != "propertyNames"}
    if isinstance(names.get("enum"), list):
        return {
            **rest,
            "properties": dict.fromkeys((n for n in names["enum"] if isinstance(n, str)), values),
            "additionalProperties": False,
        }
    if isinstance(names.get("pattern"), str):
        return {
            **rest,
            "patternProperties": {names["pattern"]: values},
            "additionalProperties": False,
        }
    return schema


def resolved(schema: Mapping[str, Any], root: Any) -> Mapping[str, Any]:
    """Return what a reference into the same document points at, or ``schema`` itself."""
    steps = str(schema.get("$ref", "")).removeprefix("#/").split("/")
    found: Any = root
    for step in steps:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else schema
