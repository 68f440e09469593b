"""Prepared schemas allow the same values or fewer, never more."""

from __future__ import annotations

import pytest

from rasd_integrations.text.grammar.schema import prepared, without_unique_items

CLOSED = {"additionalProperties": False}


def bare(schema):
    """Return a prepared schema without the compiler's own key."""
    return {key: value for key, value in prepared(schema).items() if key != "x-guidance"}


def obj(**properties):
    return {"type": "object", "properties": properties}


TEXT = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (True, {}),
        ({"type": "object"}, {"type": "object"}),
        (obj(a=TEXT), obj(a=TEXT) | CLOSED),
        (
            obj(a=TEXT) | {"additionalProperties": True},
            obj(a=TEXT) | {"additionalProperties": True},
        ),
        (obj(a=obj(b=TEXT)), obj(a=obj(b=TEXT) | CLOSED) | CLOSED),
        ({"type": "array", "items": obj(a=TEXT)}, {"type": "array", "items": obj(a=TEXT) | CLOSED}),
        ({"anyOf": [obj(a=TEXT), TEXT]}, {"anyOf": [obj(a=TEXT) | CLOSED, TEXT]}),
        # The parts of a sum, and the base beside alternatives, must leave room for one another.
        ({"allOf": [obj(a=TEXT), obj(b=TEXT)]}, {"allOf": [obj(a=TEXT), obj(b=TEXT)]}),
        ({"allOf": [obj(a=TEXT)]}, {"allOf": [obj(a=TEXT) | CLOSED]}),
        (obj(a=TEXT) | {"anyOf": [obj(b=TEXT)]}, obj(a=TEXT) | {"anyOf": [obj(b=TEXT)]}),
        ({"$defs": {"A": obj(a=TEXT)}}, {"$defs": {"A": obj(a=TEXT) | CLOSED}}),
        # By JSON Schema's rule a format that is not known is a remark.
        ({"type": "string", "format": "binary"}, {"type": "string"}),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        (obj(format=TEXT), obj(format=TEXT) | CLOSED),
        # dict[Literal, X], dict[Enum, X] and dict[constr, X] of pydantic.
        (
            {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": TEXT},
            obj(a=TEXT, b=TEXT) | CLOSED,
        ),
        (
            {"propertyNames": {"$ref": "#/$defs/E"}, "$defs": {"E": {"enum": ["a"]}}},
            {"properties": {"a": True}, "$defs": {"E": {"enum": ["a"]}}} | CLOSED,
        ),
        (
            {"propertyNames": {"pattern": "^x"}, "additionalProperties": TEXT},
            {"patternProperties": {"^x": TEXT}} | CLOSED,
        ),
        ({"propertyNames": {"maxLength": 3}}, {"propertyNames": {"maxLength": 3}}),
    ],
)
def test_objects_are_closed_where_that_only_narrows(schema, expected):
    """Named properties without a word on others get no others."""
    assert bare(schema) == expected


def test_sets_lose_the_keyword_that_no_grammar_knows():
    """At every depth; a property of that name stays."""
    inner = {"type": "array", "uniqueItems": True, "items": TEXT}
    schema = obj(a=inner, uniqueItems=TEXT) | {"anyOf": [inner]}
    stripped = {"type": "array", "items": TEXT}
    assert without_unique_items(schema) == obj(a=stripped, uniqueItems=TEXT) | {"anyOf": [stripped]}


def test_the_schema_given_is_not_changed():
    """The caller may share them."""
    schema = obj(a=obj(b=TEXT))
    before = repr(schema)
    prepared(schema)
    assert repr(schema) == before
