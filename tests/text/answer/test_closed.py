"""Which fields of an answer were closed."""

from __future__ import annotations

import pytest

from rasd_integrations.text.answer.closed import closed_fields


@pytest.mark.parametrize(
    ("kept", "rest", "fields"),
    [
        ('{"a": 1, "b": "x', '", "date": "1111-11-11", "items": []}', ("b", "date", "items")),
        ('{"a": {"b": "x', 'y", "c": null}, "d": [1, 2]}', ("a.b", "a.c", "d.0", "d.1")),
        ('{"items": [{"n": "A"}, {"n": "', '"}], "say: \\"{": true}', ("items.1.n", 'say: \\"{')),
        ('<tool_call>\n{"name": "f", "arguments": {"q": "cats', '"}}\n</tool_call>', ("q",)),
        ('{"a": 1}', "", ()),
        ('{"a": "x"', ', "b": 2}', ("b",)),
    ],
)  # fmt: skip
def test_closed_fields(kept, rest, fields):
    """Fault 8: values that end behind what the model wrote, innermost ones."""
    assert closed_fields(kept + rest, len(kept)) == fields
