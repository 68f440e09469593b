"""Compiled grammars: what they let through, what they force, and what they refuse to be."""

from __future__ import annotations

import builtins
import gc
import json
import weakref

import pytest
from fakes_answers import FORMATS
from fakes_templates import tokenizer_with
from tiny import EOS, VOCAB, tiny_tokenizer

from rasd_integrations import ConfigurationError, Grammar, MissingDependencyError, ToolUse
from rasd_integrations.text import tool_formats as tf
from rasd_integrations.text.grammar.compiler import GrammarCompiler, grammar_compiler

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
                "required": ["x"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": 'grüß "Gott"', "parameters": {}}},
]


MARKS = ("<tool_call>", "</tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "</think>")


@pytest.fixture(scope="module", params=["bytes", "marks are tokens"])
def tokenizer(request):
    """Models such as Qwen's have tokens for the marks of a call that they do not call special."""
    if request.param == "bytes":
        return tiny_tokenizer()
    return tokenizer_with(None, added=MARKS)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, max(VOCAB, len(tokenizer)), {EOS})


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def taken(state, tokenizer, text):
    """Return how much of `text` may be written, and whether the answer may end there."""
    state = state.fork()
    tokens = ids(tokenizer, text)
    count = next((i for i, token in enumerate(tokens) if not state.push(token)), len(tokens))
    may_end = bool(int(state.mask().view("uint32")[EOS // 32]) >> (EOS % 32) & 1)
    return tokenizer.decode(tokens[:count]), state.finished or may_end


def accepts(state, tokenizer, text):
    return taken(state, tokenizer, text) == (text, True)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def test_a_schema_lets_its_instances_through(compiler, tokenizer):
    """Instances pass in one way of writing; nothing else does, nor anything after the end."""
    state = compiler.state(Grammar.json_schema(SCHEMA))
    assert accepts(state, tokenizer, '{"name": "Zoë \\" \U0001f600", "age": -3}')
    assert taken(state, tokenizer, '{"name":"Ada"')[0] == '{"name":'
    assert taken(state, tokenizer, '{"name": "Ada", "age": 3.5}')[0] == '{"name": "Ada", "age": 3'
    assert taken(state, tokenizer, '{"name": "Ada", "age": 3, "x": 1}')[0].endswith('"age": 3')
    assert not accepts(state, tokenizer, '{"name": "Ada"')
    for token in ids(tokenizer, '{"name": "Ada", "age": 3}'):
        assert not state.finished
        assert state.push(token)
    assert state.finished


def test_what_is_forced_is_told(compiler, tokenizer):
    """Keys and punctuation leave no choice."""
    state = compiler.state(Grammar.json_schema(SCHEMA))
    assert tokenizer.decode(state.forced()) == '{"name": "'
    for token in ids(tokenizer, '{"name": "A"'):
        state.push(token)
    assert tokenizer.decode(state.forced()) == ', "age": '


def test_steps_are_taken_back_and_forks_stand_alone(compiler, tokenizer):
    """A refused token changes nothing; pop and fork are independent of other states."""
    state = compiler.state(Grammar.json_schema(SCHEMA))
    start = state.mask().tobytes()
    first, wrong = ids(tokenizer, "{")[0], ids(tokenizer, "[")[0]
    assert not state.push(wrong)
    assert state.mask().tobytes() == start
    fork = state.fork()
    assert fork.push(first)
    assert state.mask().tobytes() == start
    fork.pop(1)
    fork.pop(0)
    assert fork.mask().tobytes() == start


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("regex", "a/b[0-9]{2}"), "a/b12", "a/b1x"),
        (Grammar("regex", r"a\/b|c\\/d"), r"c\/d", "c/d"),
        (Grammar("lark", 'start: "yes" | "no" REST\nREST: /!+/'), "no!!", "maybe"),
        (Grammar.json_object(), '{"a": [1, {"b": null}]}', "[1]"),
    ],
)
def test_other_kinds_of_grammar(compiler, tokenizer, grammar, good, bad):
    """Regular expressions, Lark, any JSON object."""
    state = compiler.state(grammar)
    assert accepts(state, tokenizer, good)
    assert not accepts(state, tokenizer, bad)


FORMS = {form.name: form for form in FORMATS}
CALLS = [
    {"function": {"name": "add", "arguments": {"x": 3, "unit": "F"}}},
    {"function": {"name": "now", "arguments": {}}},
    {"function": {"name": 'grüß "Gott"', "arguments": {}}},
]


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_forced_call_is_written_as_the_model_writes_it(compiler, tokenizer, form):
    """Each format's own markup passes; text, unknown functions and, unless allowed, several calls do not."""
    form = FORMS[form]
    one = compiler.state(None, ToolUse.of(TOOLS, "required"), form)
    several = compiler.state(None, ToolUse.of(TOOLS, "required", parallel=True), form)
    for call in CALLS:
        if not (form is tf.MISTRAL_ARGS and "Gott" in call["function"]["name"]):
            assert accepts(one, tokenizer, form.written([call])), form.written([call])
    assert accepts(several, tokenizer, form.written(CALLS[:2]))
    assert not accepts(one, tokenizer, form.written(CALLS[:2]))
    assert not accepts(several, tokenizer, form.written([{"name": "mul", "arguments": {}}]))
    assert not accepts(several, tokenizer, "It is 3.")
    assert not accepts(several, tokenizer, "")


def test_a_named_choice_leaves_one_function(compiler, tokenizer):
    """The others are not reachable, and it is called once."""
    state = compiler.state(None, ToolUse.of(TOOLS, "now"), tf.HERMES)
    assert accepts(state, tokenizer, tf.HERMES.written(CALLS[1:2]))
    assert not accepts(state, tokenizer, tf.HERMES.written(CALLS[:1]))


def test_a_free_model_is_free(compiler):
    """Optional tools constrain nothing unless they are strict."""
    assert compiler.state(None, ToolUse.of(TOOLS), tf.HERMES) is None
    assert compiler.state(None, ToolUse.of(TOOLS, "none"), tf.HERMES) is None
    assert compiler.state(None) is None


@pytest.mark.parametrize("form", ["hermes", "llama3", "granite", "mistral"])
def test_strict_tools_bind_the_arguments_only(compiler, tokenizer, form):
    """Any text may be written; what opens a call must go on as one."""
    form = FORMS[form]
    state = compiler.state(None, ToolUse.of(TOOLS, strict=True), form)
    assert accepts(state, tokenizer, "Grüße, <tool> and [brackets].\nNo call.")
    assert accepts(state, tokenizer, form.written(CALLS[:1]))
    assert accepts(state, tokenizer, form.written(CALLS[:2]))
    broken = form.written([{"name": "add", "arguments": {"y": 3}}])
    assert not accepts(state, tokenizer, broken)
    if form is not tf.LLAMA3:
        assert accepts(state, tokenizer, f"Let me see.\n{form.written(CALLS[:1])}")


def test_tools_beside_a_grammar_leave_the_choice(compiler, tokenizer):
    """Agents with a response format: either calls, or a text of the format."""
    state = compiler.state(Grammar.json_schema(SCHEMA), ToolUse.of(TOOLS), tf.HERMES)
    assert accepts(state, tokenizer, '{"name": "Ada", "age": 3}')
    assert accepts(state, tokenizer, tf.HERMES.written(CALLS[:2]))
    assert not accepts(state, tokenizer, "Ada is 3.")
    with pytest.raises(ConfigurationError, match="tool_choice 'now' demands a call"):
        compiler.state(Grammar.json_schema(SCHEMA), ToolUse.of(TOOLS, "now"), tf.HERMES)


def test_an_open_thought_comes_first(compiler, tokenizer):
    """Reasoning that the prompt has opened is free up to its end mark."""
    state = compiler.state(Grammar.json_schema(SCHEMA), thought_end="</think>")
    assert accepts(state, tokenizer, 'Hm {"name"\n</think>\n\n{"name": "Ada", "age": 3}')
    assert not accepts(state, tokenizer, '{"name": "Ada", "age": 3}')


def test_control_tokens_of_the_markup_are_control_tokens(tokenizer):
    """A mark that is one id of the vocabulary is written as that id."""
    mistral = tiny_tokenizer()
    mistral.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    mark = mistral.convert_tokens_to_ids("[TOOL_CALLS]")
    compiler = GrammarCompiler(mistral, len(mistral), {EOS})
    forced = compiler.state(None, ToolUse.of(TOOLS, "now"), tf.MISTRAL)
    assert forced.forced()[0] == mark
    assert accepts(forced, mistral, tf.MISTRAL.written(CALLS[1:2]))
    strict = compiler.state(None, ToolUse.of(TOOLS, strict=True), tf.MISTRAL)
    assert accepts(strict, mistral, "Some [text].")
    assert accepts(strict, mistral, f"First.{tf.MISTRAL.written(CALLS[:2])}")
    assert not accepts(strict, mistral, "[TOOL_CALLS]nonsense")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Grammar.json_schema({"not": {"type": "string"}}), "not"),
        (Grammar("lark", "start: missing"), "missing"),
        (Grammar.json_schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused(compiler, grammar, message):
    """The error names what cannot be followed; nothing is ignored."""
    with pytest.raises(ConfigurationError, match=message):
        compiler.state(grammar)


def test_a_tool_that_cannot_be_followed_is_named(compiler):
    """The error names the tool."""
    bad = {"name": "odd", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    with pytest.raises(ConfigurationError, match=r"Tool 'odd': .*not"):
        compiler.state(None, ToolUse.of([*TOOLS, bad], "required"), tf.HERMES)


def test_a_set_among_the_arguments_is_a_list(compiler, tokenizer):
    """The framework that reads it drops duplicates."""
    tags = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    tool = {"name": "tag", "parameters": {"type": "object", "properties": {"t": tags}}}
    state = compiler.state(None, ToolUse.of([tool], "tag"), tf.HERMES)
    assert accepts(
        state, tokenizer, tf.HERMES.written([{"name": "tag", "arguments": {"t": [1, 2]}}])
    )


@pytest.mark.slow
def test_a_grammar_is_compiled_once_and_the_tokenizer_is_let_go():
    """Compilers are shared by tokenizer, and die with it."""
    tokenizer = tiny_tokenizer()
    first = grammar_compiler(tokenizer, VOCAB, {EOS})
    assert grammar_compiler(tokenizer, VOCAB, {EOS}) is first
    assert grammar_compiler(tokenizer, VOCAB + 5, {EOS}) is not first
    for n in range(100):
        first.state(Grammar("regex", f"a{n}"))
    assert len(first._compiled) == 64
    gone = weakref.ref(tokenizer)
    del tokenizer, first
    gc.collect()
    assert gone() is None


def test_without_llguidance_the_extra_is_named(monkeypatch):
    """The error names the extra."""
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("llguidance"):
            raise ModuleNotFoundError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match=r"rasd-integrations\[structured\]"):
        GrammarCompiler(tiny_tokenizer(), VOCAB, {EOS})


def test_every_mask_of_a_real_answer_allows_what_is_written(compiler, tokenizer):
    """Along a nested answer no token that belongs to it is masked."""
    value = {"name": "Ada", "age": 36}
    nested = {"type": "array", "items": SCHEMA, "minItems": 2, "maxItems": 2}
    state = compiler.state(Grammar.json_schema(nested))
    for token in ids(tokenizer, json.dumps([value, value])):
        assert int(state.mask().view("uint32")[token // 32]) >> (token % 32) & 1
        assert state.push(token)
    assert state.finished
