"""JSON answers are whole before their room ends, and what was drafted has no say in it."""

from __future__ import annotations

import json

import pytest
from fakes import ScriptedDrafter, random_tokens
from scripted import scripted_model
from tiny import EOS, VOCAB, tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, Grammar, SamplingParams, ToolUse
from rasd_integrations.text.grammar.compiler import GrammarCompiler

ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["name", "count"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "items": {"type": "array", "items": ITEM},
        "mood": {"enum": ["happy", "sad"]},
        "note": {"type": ["string", "null"]},
        "day": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"},
    },
    "required": ["title", "items", "mood", "note", "day"],
}
LEAST = '{"title": "", "items": [], "mood": "happy", "note": "", "day": "1111-11"}'
ASKED = [{"role": "user", "content": "Fill in the form."}]
ENDLESS = {
    "string": '{"title": "' + "the cat and " * 80,
    "list": '{"title": "x", "items": [' + '{"name": "a", "count": 1}, ' * 40,
    "number": '{"title": "x", "items": [{"name": "a", "count": ' + "7" * 600,
    "escapes": '{"title": "' + "\\n" * 400,
    "emoji": '{"title": "' + "😀" * 200,
}


def fill(answer, room, **options):
    rasd = RASD.from_model(*scripted_model(lambda prompt: answer), **options)
    params = SamplingParams(max_tokens=room, grammar=Grammar.json_schema(SCHEMA))
    return rasd.generate(ASKED, params)


@pytest.mark.parametrize("room", [100, 150, 151, 152, 153, 300])
@pytest.mark.parametrize("kind", sorted(ENDLESS))
def test_an_endless_answer_is_closed_in_time(kind, room):
    """Whatever the model would go on with, the object is whole, and the reason is the room."""
    got = fill(ENDLESS[kind], room)
    value = json.loads(got.text)
    assert list(value) == SCHEMA["required"]
    assert value["mood"] in {"happy", "sad"}
    assert len(got.token_ids) <= room
    if kind == "string":  # others end where a part may no longer be begun
        assert got.finish_reason == "length"


def test_an_answer_that_fits_is_left_alone():
    """With room to spare the model's own words stand, and the reason is its own."""
    answer = '{"title": "x", "items": [{"name": "a", "count": 12}], "mood": "sad", "note": null, "day": "2026-11"}'
    got = fill(answer, 400)
    assert got.text == answer
    assert got.finish_reason == "stop"


def test_a_room_too_small_for_any_answer_is_cut():
    """Nothing can be done; the reason says so."""
    got = fill(ENDLESS["string"], len(LEAST) - 20)
    assert got.finish_reason == "length"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated|delimiter"):
        json.loads(got.text)


@pytest.mark.parametrize("room", [110, 170])
def test_a_forced_call_is_closed_in_time(room):
    """Arguments are whole, and so is the markup behind them."""
    tool = {
        "name": "find",
        "parameters": {
            "type": "object",
            "properties": {"q": {"type": "string"}},
            "required": ["q"],
        },
    }
    said = '<tool_call>\n{"name": "find", "arguments": {"q": "' + "cats and " * 80
    rasd = RASD.from_model(*scripted_model(lambda prompt: said))
    got = rasd.generate(ASKED, SamplingParams(max_tokens=room), tools=ToolUse.of([tool], "find"))
    (call,) = got.tool_calls
    assert json.loads(call.arguments)["q"].startswith("cats")
    assert got.finish_reason == "length"


@pytest.mark.parametrize("room", [90, 120, 200])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_nothing_in_the_closing(room, temperature):
    """Random weights: the ids with drafts of any kind are those without."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    params = {"max_tokens": room, "grammar": Grammar.json_schema(SCHEMA), "temperature": temperature, "seed": 3}  # fmt: skip
    plain = RASD.from_model(model, tokenizer, drafter=None).generate(
        ASKED, SamplingParams(**params)
    )
    for drafter in ("auto", ScriptedDrafter(random_tokens(VOCAB))):
        drafted = RASD.from_model(model, tokenizer, drafter=drafter)
        assert drafted.generate(ASKED, SamplingParams(**params)).token_ids == plain.token_ids
    assert list(json.loads(RASD.from_model(model, tokenizer).generate(ASKED, SamplingParams(**params)).text)) == SCHEMA["required"]  # fmt: skip


def test_the_way_out_leaves_the_state_where_it_was():
    """It is looked for on the answer's own state, which must not move."""
    tokenizer = tiny_tokenizer()
    compiler = GrammarCompiler(tokenizer, VOCAB, {EOS})
    state = compiler.state(Grammar.json_schema(SCHEMA), room=90)
    before = state.mask().tobytes()
    way = compiler._closer.way_out(state._matcher)
    assert tokenizer.decode(way) == LEAST
    assert state.mask().tobytes() == before


def test_a_schema_without_an_end_is_left_to_itself():
    """Where every object needs another, there is no way out to keep open."""
    endless = {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"]}}}  # fmt: skip
    compiler = GrammarCompiler(tiny_tokenizer(), VOCAB, {EOS})
    state = compiler.state(Grammar.json_schema(endless), room=50)
    assert state.mask().any()
    assert not state.squeezed
