"""JSON answers are complete within max_tokens, whatever is drafted."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from fakes import ScriptedDrafter, random_tokens
from scripted import scripted_model
from tiny import EOS, VOCAB, tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, ConfigurationError, Grammar, SamplingParams, ToolUse
from rasd_integrations.text.grammar.closing import CompletionSearch
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
LEAST = '{"title": "", "items": [], "mood": "sad", "note": "", "day": "1111-11"}'
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


@pytest.mark.slow
@pytest.mark.parametrize("room", [100, 151, 152, 300])
@pytest.mark.parametrize("kind", sorted(ENDLESS))
def test_an_endless_answer_is_closed_in_time(kind, room):
    """The object is complete and within max_tokens, whatever the model would write."""
    got = fill(ENDLESS[kind], room)
    value = json.loads(got.text)
    assert list(value) == SCHEMA["required"]
    assert value["mood"] in {"happy", "sad"}
    assert len(got.token_ids) <= room
    if kind == "string":  # others end when no further part would fit
        assert got.finish_reason == "length"


def test_an_answer_that_fits_is_left_alone():
    """An answer that fits is not changed, and neither is its finish reason."""
    answer = '{"title": "x", "items": [{"name": "a", "count": 12}], "mood": "sad", "note": null, "day": "2026-11"}'
    got = fill(answer, 400)
    assert got.text == answer
    assert got.finish_reason == "stop"


def test_a_room_too_small_for_any_answer_is_refused():
    """Fault 7: before the answer begins, with both numbers."""
    with pytest.raises(
        ConfigurationError, match=rf"max_tokens is 50, .* needs {len(LEAST)} tokens"
    ):
        fill(ENDLESS["string"], 50)
    assert json.loads(fill(ENDLESS["string"], len(LEAST)).text)["title"] == ""


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


@pytest.mark.slow
@pytest.mark.parametrize(("room", "temperature"), [(90, 0.0), (90, 1.0), (120, 0.0)])
def test_drafts_change_nothing_in_the_closing(room, temperature):
    """With random weights, drafted ids equal plain ones."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    params = {"max_tokens": room, "grammar": Grammar.json_schema(SCHEMA), "temperature": temperature, "seed": 3}  # fmt: skip
    drafters = (None, "auto", ScriptedDrafter(random_tokens(VOCAB)))
    plain, *drafted = (
        RASD.from_model(model, tokenizer, drafter=d).generate(ASKED, SamplingParams(**params))
        for d in drafters
    )
    assert [answer.token_ids for answer in drafted] == [plain.token_ids] * 2
    assert list(json.loads(plain.text)) == SCHEMA["required"]


def test_the_search_leaves_the_state_where_it_was():
    """It runs on the answer's own state, which must not change."""
    tokenizer = tiny_tokenizer()
    compiler = GrammarCompiler(tokenizer, VOCAB, {EOS})
    state = compiler.state(Grammar.json_schema(SCHEMA), room=90)
    before = state.mask().tobytes()
    way = compiler._search.shortest_completion(state._matcher)
    assert len(way) == len(LEAST)
    assert list(json.loads(tokenizer.decode(way))) == SCHEMA["required"]
    assert state.mask().tobytes() == before


@pytest.mark.slow
def test_a_schema_without_an_end_is_refused():
    """Fault 31: if every object needs another, no answer is complete."""
    endless = {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"]}}}  # fmt: skip
    compiler = GrammarCompiler(tiny_tokenizer(), VOCAB, {EOS})
    with pytest.raises(ConfigurationError, match=r"no whole answer|no answer at all"):
        compiler.state(Grammar.json_schema(endless), room=50)


def one(**schema):
    return {"type": "object", "properties": {"x": schema}, "required": ["x"]}


NODE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}},
    "required": ["name", "next"],
}  # fmt: skip
SHORTEST = {
    "kilometres": (one(type="string", pattern=r"^\d+ (km|mi)$"), 4),
    "no anchors": (one(type="string", pattern=r"\d{3}-[A-Z]{2}|kilo"), 4),
    "late end": (one(type="string", pattern="^[a-zA-Z]+Q$"), 2),
    "repeated": (one(type="string", pattern="^(.*a){20}$"), 20),
    "umlauts": (one(type="string", pattern="^[äöü]{2}$"), 4),
    "least length": (one(type="string", minLength=30), 30),
    "email": (one(type="string", format="email"), 3),
    "duration": (one(type="string", format="duration"), 3),
    "uri": (one(type="string", format="uri"), 2),
    "date-time": (one(type="string", format="date-time"), 20),
    "uuid": (one(type="string", format="uuid"), 36),
    "words": (one(enum=["happy", "sad", "serene"]), 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(SHORTEST))
def test_the_shortest_answer_is_found(kind):
    """Fault 7: one token (here a byte) less is refused, with the number."""
    schema, size = SHORTEST[kind]
    least = len('{"x": ""}') + size
    tokenizer = tiny_tokenizer()
    compiler = GrammarCompiler(tokenizer, VOCAB, {EOS})
    state = compiler.state(Grammar.json_schema(schema), room=least)
    assert len(state._steps[0].completion) == least
    with pytest.raises(ConfigurationError, match=f"needs {least} tokens"):
        compiler.state(Grammar.json_schema(schema), room=least - 1)


DEEP = {
    "bill": one(type="array", items=one(type="string", pattern=r"^\d+ (km|mi)$"), minItems=1),
    "recursive": {"$defs": {"N": NODE}, "$ref": "#/$defs/N"},
    "traps": one(anyOf=[{"type": "array", "items": {"$ref": "#/properties/x"}, "minItems": 1}, {"type": "integer", "minimum": 100}]),
    "large parts": {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {
                "type": "object",
                "properties": {f"property_{n}": {"type": "string", "minLength": 3} for n in range(6)},
                "required": [f"property_{n}" for n in range(6)],
            }},
        },
        "required": ["items"],
    },
    "formats": {
        "type": "object",
        "properties": {f: {"type": "string", "format": f} for f in ("email", "duration", "uri", "date-time")},
        "required": ["email", "duration", "uri", "date-time"],
    },
    "alternatives": one(type="string", pattern="^(a|b[0-9]{40}|c[a-z]*(km|kilometres))$"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(DEEP))
def test_whatever_is_written_is_closed_in_time(kind):
    """Fault 7: random allowed tokens end in complete JSON, from the least max_tokens on."""
    tokenizer = tiny_tokenizer()
    compiler = GrammarCompiler(tokenizer, VOCAB, {EOS})
    grammar = Grammar.json_schema(DEEP[kind])
    least = len(compiler.state(grammar, room=4000)._steps[0].completion)
    for extra in (0, 7, 60):
        rnd = random.Random(extra)
        state, written = compiler.state(grammar, room=least + extra), []
        while not state.finished:
            may = np.flatnonzero(np.unpackbits(state.mask().view(np.uint8), bitorder="little"))
            token = int(rnd.choice(may))
            if token == EOS:
                break
            assert state.push(token)
            written.append(token)
            assert len(written) <= least + extra
        json.loads(tokenizer.decode(written), strict=False)


def walked(state, seed, most):
    """Return the masks along a random way of at most so many tokens."""
    rnd, seen = random.Random(seed), []
    while not state.finished and len(seen) < most:
        seen.append(state.mask().tobytes())
        may = np.flatnonzero(np.unpackbits(state.mask().view(np.uint8), bitorder="little"))
        if (token := int(rnd.choice(may))) == EOS:
            break
        assert state.push(token)
    return seen


@pytest.mark.parametrize("kind", sorted(DEEP))
def test_an_earlier_completion_saves_searches_and_changes_no_mask(kind, monkeypatch):
    """Masks are those of a search at every token whose room may be short."""
    compiler = GrammarCompiler(tiny_tokenizer(), VOCAB, {EOS})
    search, searches = CompletionSearch.shortest_completion, []
    monkeypatch.setattr(
        CompletionSearch, "shortest_completion", lambda *args: searches.append(1) or search(*args)
    )
    grammar = Grammar.json_schema(DEEP[kind])
    least = len(compiler.state(grammar, room=4000)._steps[0].completion)
    masks, counts = [], []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(CompletionSearch, "rest_of", lambda *_: None)
        searches.clear()
        masks.append(walked(compiler.state(grammar, room=least + 150), 5, least + 60))
        counts.append(len(searches))
    assert masks[0] == masks[1]
    assert counts[0] < counts[1] or counts[1] <= 1


def completion_alone(search, matcher, token, completion, room):
    return [*completion] if search._ends_by(matcher, [token], completion) else None


@pytest.mark.parametrize("kind", sorted(DEEP))
def test_an_end_of_the_completion_changes_no_mask(kind, monkeypatch):
    """Masks are those of a search behind every token that needs more than the completion."""
    compiler = GrammarCompiler(tiny_tokenizer(), VOCAB, {EOS})
    search, searches = CompletionSearch._completion_behind, []
    monkeypatch.setattr(
        CompletionSearch, "_completion_behind", lambda *args: searches.append(1) or search(*args)
    )
    grammar = Grammar.json_schema(DEEP[kind])
    least = len(compiler.state(grammar, room=4000)._steps[0].completion)
    masks, counts = [], []
    for saves in (True, False):
        if not saves:
            monkeypatch.setattr(CompletionSearch, "_same_end", completion_alone)
        searches.clear()
        masks.append(walked(compiler.state(grammar, room=least + 30), 7, least + 30))
        counts.append(len(searches))
    assert masks[0] == masks[1]
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("written", ['{"title": "abc', '{"title": "abc\\\\n'])
def test_quotes_and_escapes_in_a_string_need_no_search(written, monkeypatch):
    """What is known to end the answer ends it behind them too."""
    tokenizer = tiny_tokenizer()
    compiler = GrammarCompiler(tokenizer, VOCAB, {EOS})
    state = compiler.state(Grammar.json_schema(SCHEMA), room=120)
    for token in tokenizer(written, add_special_tokens=False)["input_ids"]:
        assert state.push(token)
    monkeypatch.setattr(CompletionSearch, "_completion_behind", lambda *_: 1 / 0)
    may = np.flatnonzero(np.unpackbits(state.mask().view(np.uint8), bitorder="little"))
    assert state._steps[-1].completions
    assert {ord('"'), ord("\\")} <= set(may)
