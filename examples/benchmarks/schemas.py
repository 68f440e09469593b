"""JSON schemas as pydantic, TypedDict and OpenAI's tools make them, with values that fit and values that do not.

The values of a case are written with the keys in the schema's order; grammars hold to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A schema, values that are valid for it, and values that are not."""

    schema: Schema
    valid: tuple[Any, ...]
    invalid: tuple[Any, ...] = ()


def closed(properties: Mapping[str, Schema], *required: str, **more: Any) -> dict[str, Any]:
    """Return an object schema without further properties; all are required unless some are named."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required or properties),
        "additionalProperties": False,
        **more,
    }


def of(schema: Schema, valid: list[Any], invalid: list[Any]) -> Case:
    """Return the case of an object whose one property ``x`` follows ``schema``."""
    return Case(
        closed({"x": schema}),
        tuple({"x": value} for value in valid),
        tuple({"x": value} for value in invalid),
    )


def text(**limits: Any) -> dict[str, Any]:
    """Return a schema of strings."""
    return {"type": "string", **limits}


STRING, INTEGER, NUMBER, NULL = text(), {"type": "integer"}, {"type": "number"}, {"type": "null"}
SIMPLE = closed({"name": STRING, "age": INTEGER, "email": STRING})
_CITY = closed({"city": STRING, "zip": text(pattern="^[0-9]{5}$")}, title="Address")
NESTED: Schema = {
    "$defs": {
        "Address": _CITY,
        "Level": {"enum": ["low", "mid", "high"], "type": "string"},
        "Line": closed({"sku": STRING, "count": INTEGER, "price": {"anyOf": [NUMBER, text()]}}),
    },
    **closed(
        {
            "id": INTEGER,
            "title": STRING,
            "level": {"$ref": "#/$defs/Level"},
            "tags": {"type": "array", "items": STRING},
            "address": {"$ref": "#/$defs/Address"},
            "second": {"anyOf": [{"$ref": "#/$defs/Address"}, NULL], "default": None},
            "lines": {"type": "array", "items": {"$ref": "#/$defs/Line"}},
            "note": {"anyOf": [STRING, NULL], "default": None},
            "score": {"anyOf": [NUMBER, NULL], "default": None},
            "active": {"type": "boolean", "default": True},
            "kind": {"const": "order"},
            "labels": {"type": "object", "additionalProperties": STRING},
        }
    ),
}
NESTED_VALUE = {
    "id": 4711,
    "title": "Replacement parts for the north-western pumping station, second delivery",
    "level": "high",
    "tags": ["pump", "urgent", "warranty"],
    "address": {"city": "Wilhelmshaven", "zip": "26382"},
    "second": None,
    "lines": [
        {"sku": "PX-100-A", "count": 4, "price": 129.95},
        {"sku": "PX-220-C", "count": 1, "price": "on request"},
    ],
    "note": "Please deliver before noon, the gate is closed afterwards. Call the plant on arrival.",
    "score": 0.875,
    "active": True,
    "kind": "order",
    "labels": {"region": "north-west", "carrier": "rail"},
}
RECURSIVE: Schema = {
    "$defs": {
        "Node": closed(
            {
                "value": STRING,
                "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
            }
        )
    },
    "$ref": "#/$defs/Node",
}
RECURSIVE_VALUE = {
    "value": "root of it all",
    "children": [
        {"value": "left", "children": [{"value": "leaf", "children": []}]},
        {"value": "right", "children": []},
    ],
}
LIMITS = closed(
    {
        "code": text(pattern="^[A-Z]{2}-[0-9]{6}$"),
        "when": text(format="date-time"),
        "id": text(format="uuid"),
        "summary": text(minLength=10, maxLength=2000),
        "station": {
            "enum": [f"Station {i:03d} {'north' if i % 2 else 'south'}" for i in range(300)]
        },
        "readings": {
            "type": "array",
            "items": {**NUMBER, "minimum": -90, "maximum": 90},
            "minItems": 2,
            "maxItems": 50,
        },
    }
)
LIMITS_VALUE = {
    "code": "QX-204871",
    "when": "2024-02-29T12:30:00Z",
    "id": "123e4567-e89b-12d3-a456-426614174000",
    "summary": "The gauge froze over night and was thawed by hand; readings before six are to be discarded.",
    "station": "Station 217 north",
    "readings": [-12.5, -11.75, -3, 0.5],
}
_LIST = {
    "$defs": {"N": closed({"v": INTEGER, "next": {"anyOf": [{"$ref": "#/$defs/N"}, NULL]}})},
    "$ref": "#/$defs/N",
}
_CAT = closed({"kind": {"const": "cat", "type": "string"}, "lives": INTEGER})
_DOG = closed({"kind": {"const": "dog", "type": "string"}, "name": STRING})
_PETS = {"$defs": {"Cat": _CAT, "Dog": _DOG}}
_REFS = [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]
_TELLER = {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}}
_UUID = "123e4567-e89b-12d3-a456-426614174000"

CASES: dict[str, Case] = {
    "string": of(STRING, ["", "ä\"\n'"], [1, None]),
    "integer": of(INTEGER, [0, -7, 123456], [1.5, "1", True]),
    "number": of(NUMBER, [0, -1.5, 1e-7], ["1", None]),
    "boolean": of({"type": "boolean"}, [True, False], ["true", 0]),
    "null": of(NULL, [None], ["null", 0]),
    "several types": of({"type": ["string", "integer"]}, ["a", 1], [None, 1.5]),
    "enum of strings": of(
        {"enum": ["a", "ab", "ö"], "type": "string"}, ["a", "ab", "ö"], ["b", ""]
    ),
    "enum of mixed values": of({"enum": ["a", 1, None, 2.5]}, ["a", 1, None], ["b", 2]),
    "enum of integers": of({"enum": [1, 2, 30], "type": "integer"}, [1, 30], [3, "1"]),
    "const": of({"const": "v1"}, ["v1"], ["v2", 1]),
    "const object": of({"const": {"a": [1]}}, [{"a": [1]}], [{"a": [2]}, {}]),
    "optional (anyOf null)": of({"anyOf": [STRING, NULL], "default": None}, ["a", None], [1]),
    "nullable (OpenAPI)": of({"type": "string", "nullable": True}, ["a"], [1]),
    "optional property": Case(
        closed({"a": STRING, "b": INTEGER}, "a"), ({"a": "x"}, {"a": "x", "b": 1}), ({"b": 1}, {})
    ),
    "optional first, required last": Case(
        closed({"a": STRING, "b": STRING, "c": INTEGER}, "c"),
        ({"c": 1}, {"a": "x", "c": 1}, {"b": "y", "c": 1}),
        ({"a": "x"}, {"a": "x", "b": "y"}),
    ),
    "no required property": Case(
        {**closed({"a": STRING, "b": STRING}), "required": []}, ({}, {"b": "x"}), ({"c": "x"},)
    ),
    "no properties": Case(closed({}), ({},), ({"a": 1}, [])),
    "open object": Case(
        {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
        ({"a": 1},),
        ({"a": "x"}, {}),
    ),
    "any object": Case({"type": "object"}, ({}, {"a": [1, {"b": None}]}), ([], 1)),
    "anything": Case({}, ({}, [1], "a", None, 2.5)),
    "dict[str, int]": of(
        {"type": "object", "additionalProperties": INTEGER},
        [{}, {"a": 1, "b": 2}],
        [{"a": "x"}, []],
    ),
    "dict[str, Model]": of(
        {"type": "object", "additionalProperties": _CITY},
        [{"home": {"city": "X", "zip": "12345"}}],
        [{"home": {"city": "X"}}, {"home": 1}],
    ),
    "dict with size": of(
        {"type": "object", "additionalProperties": INTEGER, "minProperties": 1, "maxProperties": 2},
        [{"a": 1}, {"a": 1, "b": 2}],
        [{}, {"a": 1, "b": 2, "c": 3}],
    ),
    "pattern properties": of(
        {
            "type": "object",
            "patternProperties": {"^s_[a-z]+$": STRING},
            "additionalProperties": False,
        },
        [{"s_a": "x"}],
        [{"t_a": "x"}, {"s_a": 1}],
    ),
    "property names": of(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[a-z]{2}$"},
            "additionalProperties": INTEGER,
        },
        [{"ab": 1}],
        [{"abc": 1}, {"AB": 1}],
    ),
    "array": of({"type": "array", "items": INTEGER}, [[], [1, 2]], [["a"], {}]),
    "array of anything": of({"type": "array"}, [[], [1, "a", None]], [{}, "a"]),
    "array with size": of(
        {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 3},
        [[1, 2], [1, 2, 3]],
        [[1], [1, 2, 3, 4], []],
    ),
    "array of enums": of(
        {"type": "array", "items": {"enum": ["a", "b"]}}, [["a", "b", "a"]], [["c"], ["a", 1]]
    ),
    "set (uniqueItems)": of(
        {"type": "array", "items": INTEGER, "uniqueItems": True}, [[], [1, 2]], [[1, 1], ["a"]]
    ),
    "tuple (prefixItems)": of(
        {"type": "array", "prefixItems": [INTEGER, STRING], "minItems": 2, "maxItems": 2},
        [[1, "a"]],
        [["a", 1], [1], [1, "a", 2]],
    ),
    "tuple (draft 7 items list)": of(
        {"type": "array", "items": [INTEGER, STRING], "minItems": 2, "maxItems": 2},
        [[1, "a"]],
        [["a", 1], [1]],
    ),
    "tuple with rest": of(
        {"type": "array", "prefixItems": [INTEGER], "items": STRING},
        [[1], [1, "a", "b"]],
        [["a"], [1, 2]],
    ),
    "contains": of(
        {"type": "array", "items": INTEGER, "contains": {"const": 3}}, [[1, 3]], [[1, 2]]
    ),
    "nested arrays": of(
        {"type": "array", "items": {"type": "array", "items": NUMBER}},
        [[[1.5], []]],
        [[1.5], [["a"]]],
    ),
    "nested objects": Case(
        closed({"a": closed({"b": closed({"c": INTEGER})})}),
        ({"a": {"b": {"c": 1}}},),
        ({"a": {"b": {}}},),
    ),
    "minLength, maxLength": of(
        text(minLength=2, maxLength=4), ["ab", "äöü", "🙂🙂"], ["a", "abcde"]
    ),
    "maxLength 2000": of(text(maxLength=2000), ["", "a" * 2000], ["a" * 2001]),
    "pattern": of(text(pattern="^[A-Z]{2}-\\d{3}$"), ["AB-123"], ["ab-123", "AB-1234", ""]),
    "pattern, unanchored": of(text(pattern="ab+c"), ["abbc", "xabcx"], ["acb", ""]),
    "pattern with lookahead": of(text(pattern="^(?=.*\\d)[a-z\\d]+$"), ["a1"], ["a"]),
    "pattern and length": of(text(pattern="^[a-z]+$", maxLength=3), ["abc"], ["abcd", "A"]),
    "date-time": of(
        text(format="date-time"),
        ["2024-02-29T12:30:00Z", "2024-01-01T00:00:00.5+02:00"],
        ["yesterday", "2024-13-01T00:00:00Z"],
    ),
    "date": of(text(format="date"), ["2024-12-31"], ["31.12.2024", "2024-1-1"]),
    "time": of(text(format="time"), ["12:30:00Z"], ["noon", "25:00:00Z"]),
    "duration": of(text(format="duration"), ["P1DT2H", "PT5M"], ["5 minutes", "P"]),
    "uuid": of(text(format="uuid"), [_UUID], [_UUID[:-1], "id"]),
    "email": of(text(format="email"), ["a.b@example.org"], ["a.b", "@x"]),
    "uri": of(text(format="uri", minLength=1), ["https://example.org/a?b=c"], ["not a uri"]),
    "ipv4": of(text(format="ipv4"), ["127.0.0.1"], ["256.1.1.1", "1.2.3"]),
    "binary (bytes)": of(text(format="binary"), ["abc", ""], [1]),
    "password (SecretStr)": of(text(format="password", writeOnly=True), ["abc"], [1]),
    "path": of(text(format="path"), ["a/b"], [1]),
    "decimal (pydantic)": of(
        {"anyOf": [NUMBER, text(pattern="^(?!^[-+.]*$)[+-]?0*\\d*\\.?\\d*$")]},
        [1.5, "1.50"],
        ["x", None],
    ),
    "base64 (contentEncoding)": of(text(contentEncoding="base64"), ["YWJj"], [1]),
    "integer bounds": of(
        {**INTEGER, "minimum": -5, "maximum": 120}, [-5, 0, 99, 120], [-6, 121, 1000]
    ),
    "exclusive bounds": of(
        {**INTEGER, "exclusiveMinimum": -1000, "exclusiveMaximum": 1000}, [-999, 3], [1000, -1000]
    ),
    "exclusive bounds (draft 4)": of(
        {**INTEGER, "minimum": 0, "exclusiveMinimum": True}, [1, 20], [-1, "a"]
    ),
    "number bounds": of({**NUMBER, "minimum": 0, "maximum": 1}, [0, 0.25, 1], [-0.5, 1.5, 2]),
    "number lower bound": of({**NUMBER, "exclusiveMinimum": 0}, [0.001, 12.5, 300], [0, -1]),
    "multipleOf": of({**INTEGER, "multipleOf": 5}, [0, 5, 125], [3, 12]),
    "multipleOf 0.01": of({**NUMBER, "multipleOf": 0.01}, [0.25, 3], [0.255]),
    "union": of(
        {"anyOf": [STRING, INTEGER, {"type": "array", "items": STRING}]},
        ["a", 1, ["a"]],
        [None, [1]],
    ),
    "union of models": of(
        {"anyOf": [_CAT, _DOG]},
        [{"kind": "cat", "lives": 7}, {"kind": "dog", "name": "x"}],
        [{"kind": "cat", "name": "x"}],
    ),
    "discriminated (oneOf)": Case(
        {**_PETS, **closed({"pet": {"oneOf": _REFS, "discriminator": _TELLER}})},
        ({"pet": {"kind": "cat", "lives": 7}}, {"pet": {"kind": "dog", "name": "x"}}),
        ({"pet": {"kind": "cow"}}, {"pet": {"kind": "dog", "lives": 7}}),
    ),
    "oneOf that overlaps": of(
        {"oneOf": [{**INTEGER, "minimum": 0}, {**INTEGER, "maximum": 10}]}, [-5, 20], ["a"]
    ),
    "list of discriminated": Case(
        {**_PETS, **closed({"pets": {"type": "array", "items": {"oneOf": _REFS}}})},
        ({"pets": [{"kind": "cat", "lives": 7}, {"kind": "dog", "name": "x"}]},),
        ({"pets": [{"kind": "cat"}]},),
    ),
    "allOf of one $ref (pydantic 1)": Case(
        {
            "definitions": {"A": _CITY},
            **closed({"a": {"title": "A", "allOf": [{"$ref": "#/definitions/A"}]}}),
        },
        ({"a": {"city": "X", "zip": "12345"}},),
        ({"a": {"city": "X"}},),
    ),
    "allOf of two objects": Case(
        {
            "allOf": [
                {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
                {"type": "object", "properties": {"b": STRING}, "required": ["b"]},
            ]
        },
        ({"a": 1, "b": "x"},),
        ({"a": 1}, {"a": "x", "b": "x"}),
    ),
    "$ref with siblings": Case(
        {
            "$defs": {"A": _CITY},
            **closed({"a": {"$ref": "#/$defs/A", "description": "home", "default": None}}),
        },
        ({"a": {"city": "X", "zip": "12345"}},),
        ({"a": None},),
    ),
    "$ref to a property": Case(
        closed({"a": {"enum": ["p", "q"]}, "b": {"$ref": "#/properties/a"}}),
        ({"a": "p", "b": "q"},),
        ({"a": "p", "b": "r"},),
    ),
    "recursive tree": Case(RECURSIVE, (RECURSIVE_VALUE,), ({"value": "a", "children": [1]},)),
    "recursive list": Case(
        _LIST, ({"v": 1, "next": {"v": 2, "next": None}},), ({"v": 1, "next": {"v": 2}},)
    ),
    "recursive JSON value (pydantic)": Case(
        {
            "$defs": {
                "J": {
                    "anyOf": [
                        STRING,
                        NUMBER,
                        NULL,
                        {"type": "array", "items": {"$ref": "#/$defs/J"}},
                        {"type": "object", "additionalProperties": {"$ref": "#/$defs/J"}},
                    ]
                }
            },
            **closed({"x": {"$ref": "#/$defs/J"}}),
        },
        ({"x": {"a": [1, None, {"b": "c"}]}},),
        ({"x": True},),
    ),
    "not": of({"type": "string", "not": {"const": "a"}}, ["b"], ["a"]),
    "if/then": Case(
        closed(
            {"a": STRING, "b": INTEGER},
            "a",
            **{"if": {"properties": {"a": {"const": "x"}}}, "then": {"required": ["b"]}},
        ),
        ({"a": "x", "b": 1}, {"a": "y"}),
        ({"a": "x"},),
    ),
    "dependentRequired": Case(
        closed({"a": STRING, "b": INTEGER}, "a", dependentRequired={"a": ["b"]}),
        ({"a": "x", "b": 1},),
        ({"a": "x"},),
    ),
    "twelve fields (nested model)": Case(
        NESTED, (NESTED_VALUE,), ({**NESTED_VALUE, "level": "top"}, {**NESTED_VALUE, "kind": "x"})
    ),
    "array at the root": Case(
        {"type": "array", "items": SIMPLE}, ([], [{"name": "a", "age": 1, "email": "b"}]), ({},)
    ),
    "string at the root": Case(text(enum=["yes", "no"]), ("yes", "no"), ("maybe", 1)),
}
