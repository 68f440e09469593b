"""Schemas of any kind are followed, or refused before the answer begins and in our words."""

from __future__ import annotations

import json
import random

import pytest
from tiny import EOS, VOCAB, tiny_tokenizer

from rasd_integrations import ConfigurationError, Grammar
from rasd_integrations.text.grammar.compiler import GrammarCompiler

WORDS = ("a", "b", "x", "name", "$ref", "\u00e4", "")
PATTERNS = ("^a+$", "[A-Z]{2}", "(", "\\d+ (km|mi)", "(?=a)", "a{3}{4}", "\\p{L}+", "\\\\", "[")
ODD = (None, True, False, -1, 3, 1e400, "", "x", [], {}, [[]], {"type": "x"}, [1, {"a": []}])
KINDS = (
    "string",
    "integer",
    "number",
    "boolean",
    "null",
    "object",
    "array",
    "text",
    ["string", "null"],
)


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(tiny_tokenizer(), VOCAB, {EOS})


def odd_schema(rnd, depth=0):
    """Return a schema, or what somebody may take for one."""
    if depth > 3 or rnd.random() < 0.08:
        return rnd.choice(ODD)
    inner = lambda: odd_schema(rnd, depth + 1)  # noqa: E731
    some = lambda: [inner() for _ in range(rnd.randint(0, 3))]  # noqa: E731
    names = rnd.sample(WORDS, rnd.randint(0, 3))
    keywords = {
        "type": lambda: rnd.choice(KINDS), "properties": lambda: {name: inner() for name in names},
        "required": lambda: names, "items": inner, "minItems": lambda: rnd.choice((0, 2, 3, -1, "2")),
        "anyOf": some, "oneOf": some, "allOf": some, "enum": lambda: rnd.sample(ODD, 3),
        "const": lambda: rnd.choice(ODD), "pattern": lambda: rnd.choice(PATTERNS),
        "format": lambda: rnd.choice(("email", "duration", "odd", 3)), "$ref": lambda: rnd.choice(("#", "#/x", "y", 3)),
        "minLength": lambda: rnd.choice((0, 5, 1.5, 10**9)), "additionalProperties": inner,
        "propertyNames": lambda: {"enum": rnd.choice((["a", "b"], [1, [2]], "a"))}, "not": inner,
        "minimum": lambda: rnd.choice((0, 1e308, "a")), "prefixItems": some, "$defs": lambda: {"x": inner()},
        "patternProperties": lambda: {rnd.choice(PATTERNS): inner()}, "uniqueItems": lambda: True,
    }  # fmt: skip
    wanted = rnd.sample(sorted(keywords), rnd.randint(1, 4))
    return {name: keywords[name]() for name in wanted}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_odd_schemas_are_refused_or_followed(compiler, part):
    """Fault 31: 400 of them end in our error or in JSON that is whole."""
    rnd = random.Random(part)
    followed = 0
    for _ in range(100):
        schema = odd_schema(rnd)
        try:
            state = compiler.state(Grammar.json_schema(schema), room=60)
        except ConfigurationError:
            continue
        followed += 1
        text = compiler._vocabulary.decode_str(state._steps[0].completion)
        json.loads(text)
    assert followed > 10


BIG = {
    "optional properties": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}},
    "alternatives": {"anyOf": [{"const": f"word {n}"} for n in range(2000)]},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(BIG))
def test_large_schemas_are_followed(compiler, kind):
    """Fault 31: limits that an answer would meet in its middle are far off."""
    state = compiler.state(Grammar.json_schema(BIG[kind]), room=60)
    for token in compiler._vocabulary.tokenize_str('{"p1990": "' if "prop" in kind else '"word 19'):
        assert state.mask().any()
        assert state.push(token)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar("json_schema", "{"), "cannot be read"),
        (lambda: Grammar.json_schema([1, 2]), "must be an object, but this one is list"),
        (lambda: Grammar.json_schema(False), "allows no answer"),
        (lambda: Grammar.json_schema({"a": object()}), "plain JSON"),
        (lambda: Grammar.json_schema({"$ref": "#"}), "allows no answer at all"),
        (lambda: Grammar.json_schema({"type": "string", "pattern": "a" * 1_000_000}), "may have 262144"),
        (lambda: Grammar.json_schema({"type": "string", "minLength": 10**6}), "no whole answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_told_before_the_answer(compiler, make, message):
    """Fault 31: with the limit."""
    with pytest.raises(ConfigurationError, match=message):
        compiler.state(make(), room=60)
