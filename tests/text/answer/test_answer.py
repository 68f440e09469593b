"""Parsed text, reasoning and calls do not depend on how the answer is cut into pieces."""

from __future__ import annotations

import json

import pytest
from fakes_answers import FORMATS, MARKED, NAMES, Answer, answer, call, cut, parser
from hypothesis import example, given
from hypothesis import strategies as st

from rasd_integrations.text import tool_formats as tf
from rasd_integrations.text.answer.parser import Parsed, parsed_arguments
from rasd_integrations.types import ToolCallDelta

# --- properties --------------------------------------------------------------------------------------

FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool_call>\n", "\n", " ", "[TOOL_CALLS]", "[TOOL_CALLS] [", "[ARGS]",
    "[CALL_ID]", "<|tool_call|>", "<|/tool_call|>", "<|python_tag|>", "<think>", "</think>", "```json\n", "```",
    '{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "parameters": ', '{"arguments": [1, "]"], "name": "f"}',
    '{"name": "h", "arguments": "x"}', '{"name": "f"', "{", "}", "[", "]", '"', ":", ",", ";", "\\", "name", "f",
    '"name"', '"arguments"', "1", "true", "<", "Hello", "é",
]  # fmt: skip
ANSWERS = st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join)
CUTS = st.lists(st.integers(0, 200), max_size=12)


@given(st.sampled_from([*FORMATS, None]), ANSWERS, CUTS, st.booleans(), st.booleans())
@example(tf.MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": [TOOL_CALLS]', [40], False, False)
def test_pieces_do_not_matter(format, text, cuts, thinking, forced):
    """An answer is parsed the same at once, in pieces or by the character."""
    options = {"thinking": thinking, "forced": forced}
    assert answer(format, text, **options) == answer(format, cut(text, cuts), **options)


@given(st.sampled_from([*FORMATS, None]), ANSWERS)
def test_answer_without_calls_is_unchanged(format, text):
    """Anything that is not a call is text, unchanged."""
    done = answer(format, [text], reasoning=None)
    if not done.calls:
        assert text == done.text


@given(st.sampled_from(FORMATS), st.text("ab\n <>[]|_toolcalTOL", max_size=30))
def test_only_what_may_be_markup_is_held_back(format, text):
    """After each character, the hidden end is white space and at most the beginning of a mark."""
    machine, shown = parser(format, reasoning=None), ""
    marks = (format.mark or "<|python_tag|>",)
    for end, character in enumerate(text, start=1):
        shown += machine.push(character).text
        if any(mark in text[:end] for mark in marks):
            return
        started = text[:end].strip(" \n")
        hidden = text[len(shown) : end]
        assert text[:end] == shown + hidden
        if started and (format.mark or len(started) > 1):
            tail = hidden.lstrip(" \n")
            assert any(mark.startswith(tail) for mark in marks)


@given(st.text(max_size=40), CUTS)
def test_text_passes_at_once_where_nothing_is_looked_for(text, cuts):
    """Without tools and reasoning every piece is returned at once."""
    machine = parser(None, reasoning=None)
    pieces = cut(text, cuts)
    assert pieces == [machine.push(piece).text for piece in pieces]
    assert Parsed() == machine.flush()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[]</>tool_call`,:\n', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.sampled_from(FORMATS),
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=4), JSON)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([None, 1]),
    CUTS,
)
def test_arguments_come_verbatim(format, calls, indent, cuts):
    """Any arguments, in any layout, come through as the model wrote them, call by call."""
    written = [(name, json.dumps(arguments, indent=indent)) for name, arguments in calls]
    bodies = [
        f"{format.begin}{format.head.replace('{name}', name)}{arguments}{format.tail}"
        for name, arguments in written
    ]
    text = f"{format.opening}{format.separator.join(bodies)}{format.closing}"
    assert Answer("", "", written) == answer(format, cut(text, cuts))


# --- calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", MARKED, ids=lambda f: f.name)
def test_call_is_streamed_as_it_is_written(format):
    """The name comes once it is whole, and then every character of the arguments at once."""
    arguments = '{"a": "b", "c": {}}'
    before, after = call(format, "f", "\0").split("\0")
    machine = parser(format)
    # Where the name is not inside the JSON, the brace tells that it is whole.
    first = machine.push(before + "{") if format.arguments_mark else machine.push(before)
    assert "f" == first.tool_calls[0].name
    assert first.tool_calls[0].id.startswith("call_")
    assert "" == first.text
    seen = "".join(d.arguments for d in first.tool_calls)
    for character in arguments[len(seen) :]:
        (delta,) = machine.push(character).tool_calls
        assert ToolCallDelta(0, arguments=character) == delta
    assert Parsed() == machine.push(after)
    assert Parsed() == machine.flush()


def test_name_is_known_before_the_arguments_begin():
    """The first delta does not wait for the arguments."""
    machine = parser(tf.HERMES)
    assert () == machine.push('<tool_call>\n{"name": "f').tool_calls
    (delta,) = machine.push('"').tool_calls
    assert (0, "f", "") == (delta.index, delta.name, delta.arguments)


def test_arguments_before_the_name_wait_for_it():
    """A call may be written in any order; its first delta still has the name."""
    machine = parser(tf.HERMES)
    assert Parsed() == machine.push('<tool_call>{"id": "x", "arguments": {"a": 1}, "na')
    first, second = machine.push('me": "f"}').tool_calls
    assert ("f", '{"a": 1}') == (first.name, second.arguments)


@pytest.mark.parametrize(
    ("format", "text", "calls"),
    [
        (tf.HERMES, '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>', [("f", '{"a":1}')]),
        (tf.HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n<tool_call>\n{"name": "g", "arguments": {}}', [("f", "{}"), ("g", "{}")]),
        (tf.HERMES, '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>', [("f", "{}"), ("g", "{}")]),
        (tf.HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}\n</tool_call>', [("f", "{}"), ("g", "{}")]),
        (tf.HERMES, '<tool_call>\n{"name": "f", "arguments": {}}}\n</tool_call>\n', [("f", "{}")]),
        (tf.HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>', [("f", '{"a": 1}')]),
        (tf.HERMES, '<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>', [("f", '{"a": 1}')]),
        (tf.HERMES, '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call>', [("f", '"{\\"a\\": 1}"')]),
        (tf.HERMES, '<tool_call>\n{"name": "f"}\n</tool_call>', [("f", "")]),
        (tf.HERMES, '<tool_call>\n{"name": "f", "arguments": null, "arguments": 1}\n</tool_call>', [("f", "null")]),
        (tf.HERMES, '<tool_call>\n{"name": "f", "arguments": 12 }\n</tool_call>', [("f", "12")]),
        (tf.HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>', [("unknown", "{}")]),
        (tf.HERMES, '<tool_call>\n{"name": "g\\u00f6", "arguments": {}}\n</tool_call>', [("gö", "{}")]),
        (tf.FALLBACK, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', [("f", "{}")]),
        (tf.LLAMA3, ' {"name": "f", "parameters": {"a": "b"}}', [("f", '{"a": "b"}')]),
        (tf.LLAMA3, '{"type": "function", "name": "f", "parameters": {}}', [("f", "{}")]),
        (tf.LLAMA3, '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}};', [("f", "{}"), ("g", "{}")]),
        (tf.LLAMA3, '{"name": "f", "parameters": {}}\n{"name": "g", "arguments": {}}\n', [("f", "{}"), ("g", "{}")]),
        (tf.LLAMA3, '<|python_tag|>{"name": "unknown", "parameters": {}}', [("unknown", "{}")]),
        (tf.MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]', [("f", "{}"), ("g", "{}")]),
        (tf.MISTRAL, '[TOOL_CALLS]{"name": "f", "arguments": {}}', [("f", "{}")]),
        (tf.MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": [1]', [("f", '{"a": [1]')]),
        (tf.MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": [TOOL_CALLS][{"name": "g", "arguments": {}}]', [("f", '{"a": '), ("g", "{}")]),
        (tf.MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', [("f", '{"a": 1}'), ("g", "{}")]),
        (tf.MISTRAL_ARGS, "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS] {}", [("f", "{}")]),
        (tf.MISTRAL_ARGS, "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}", [("f", "{}")]),
        (tf.MISTRAL_ARGS, '[TOOL_CALLS]f{"a": 1}', [("f", '{"a": 1}')]),
        (tf.MISTRAL_ARGS, '[TOOL_CALLS][{"name": "f", "arguments": {}}]', [("f", "{}")]),
        (tf.GRANITE, '<|tool_call|>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', [("f", "{}"), ("g", "{}")]),
        (tf.PHI, '<|tool_call|>{"name": "f", "arguments": {}}<|/tool_call|>', [("f", "{}")]),
    ],
)  # fmt: skip
def test_ways_to_write_calls(format, text, calls):
    """Calls in any form that models write are parsed, with no text left over."""
    assert Answer("", "", calls) == answer(format, text)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": "b', '{"a": "b'),
        ('{"name": "f", "arguments": {"a": 1', '{"a": 1'),
        ('{"name": "f", "arguments": ', '{"name": "f", "arguments": '),
        ('{"name": "f", "argu', '{"name": "f", "argu'),
        ('{"name": "f"', '{"name": "f"'),
        ('{"name": "f", arguments: {"a": 1}}\n</tool_call>', '{"name": "f", arguments: {"a": 1}}\n'),
        ('{"name": "f", "arguments" {"a": 1}}\n</tool_call>', '{"name": "f", "arguments" {"a": 1}}\n'),
        ('{"name": "f", "arguments": \'x\'}</tool_call>', '{"name": "f", "arguments": \'x\'}'),
        ('{"name": "f", "arguments": {"a": 1\n</tool_call>', '{"a": 1\n'),
        ('{"name": "f", "arguments": {"a": oops}}</tool_call>', '{"a": oops}'),
        ('{"name": "f", "arguments": {"a": "\\', '{"a": "\\'),
        ('{"name": "f", "arguments": 12', "12"),
        ('{"arguments": {"a": oops}, "name": "f"}</tool_call>', '{"a": oops}'),
    ],
)  # fmt: skip
def test_broken_call_is_delivered_as_it_was_written(text, arguments):
    """Nothing that is broken or cut off is mistaken for a call without arguments."""
    done = answer(tf.HERMES, "<tool_call>\n" + text)
    assert Answer("", "", [("f", arguments)]) == done
    assert parsed_arguments(done.calls[0][1]) is None


@pytest.mark.parametrize("rest", ["", "x", " 1", "["])
def test_named_call_without_an_object_is_broken(rest):
    """Mistral's mark without a JSON object behind it is a call that no one can make."""
    done = answer(tf.MISTRAL_ARGS, f"[TOOL_CALLS]f[ARGS]{rest}")
    assert Answer("", "", [("f", f"[ARGS]{rest}")]) == done


def test_text_round_calls_is_kept_without_the_space_between():
    """White space round markup goes, that between two texts stays."""
    one = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert "Let me see." == answer(tf.HERMES, f"Let me see.\n\n{one}\n").text
    assert "Done. " == answer(tf.HERMES, f"{one}\n{one}\n\nDone. ").text
    assert "So.\nDone." == answer(tf.HERMES, f"So.\n{one}\n{one}\nDone.").text
    assert 3 == len(answer(tf.HERMES, f"So.\n{one}\n{one}\nDone.{one}").calls)


def test_answer_goes_on_after_bare_calls():
    """Text behind calls that have no end mark is text, JSON that is no call included."""
    text = '{"name": "f", "parameters": {}}; {"name": "x"}'
    assert Answer('{"name": "x"}', "", [("f", "{}")]) == answer(tf.LLAMA3, text)
    assert "So {}" == answer(tf.LLAMA3, '{"name": "f", "parameters": {}}\nSo {}').text


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (tf.HERMES, "Write <tool_call> before a call and </tool_call> after it.\n"),
        (tf.HERMES, '<tool_call>{"a": 1}</tool_call>'),
        (tf.HERMES, '<tool_call>{"name": 3}</tool_call>'),
        (tf.HERMES, '<tool_call>{"name": ""}</tool_call>'),
        (tf.HERMES, '<tool_call>{"name": "bad \\x"}</tool_call>'),
        (tf.HERMES, '<tool_call>\n{"na'),
        (tf.HERMES, '<tool_call>\n{"name": "f'),
        (tf.HERMES, '<tool_call>\n{"arguments": {"a": '),
        (tf.HERMES, "<tool_call>\n[1, 2]"),
        (tf.HERMES, " \n<tool_c"),
        (tf.HERMES, '{"name": "f", "arguments": {}}.'),
        (tf.LLAMA3, '{"answer": 42, "name": "f", "parameters": {}}'),
        (tf.LLAMA3, '{"name": "unknown", "parameters": {}}'),
        (tf.LLAMA3, '{"name": "f'),
        (tf.LLAMA3, 'Use {"name": "f", "parameters": {}}'),
        (tf.LLAMA3, "<|python_tag|>brave_search.call(query='x')"),
        (tf.LLAMA3, " [1, 2]"),
        (tf.MISTRAL, "[TOOL_CALLS] are marks"),
        (tf.MISTRAL, "[TOOL_CALLS][]"),
        (tf.MISTRAL_ARGS, "[TOOL_CALLS] are marks"),
        (tf.MISTRAL_ARGS, "[TOOL_CALLS]f[CALL_ID]abc"),
        (tf.MISTRAL_ARGS, "[TOOL_CALLS]"),
        (tf.FALLBACK, '{"name": "f", "arguments": {}} is the call.'),
        (tf.FALLBACK, 'So: {"name": "f", "arguments": {}}'),
        (tf.FALLBACK, '{"name": "f", "arguments": {"a": 1}'),
        (tf.FALLBACK, '{"name": "f", "arguments": {}, "note": 1}'),
        (tf.FALLBACK, '{"name": "f", "arguments": {}} {"name": "g", "arguments": {}}'),
        (tf.FALLBACK, '```json\n{"name": "unknown", "arguments": {}}\n```'),
        (tf.FALLBACK, "```python\nprint({})\n```"),
        (tf.FALLBACK, "``"),
        (None, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'),
    ],
)  # fmt: skip
def test_what_is_no_call_is_text(format, text):
    """Markup in prose, JSON without a name, bare JSON of another name: unchanged."""
    assert Answer(text, "", []) == answer(format, text)


def test_text_that_held_markup_still_finds_the_call_in_it():
    """A mark in prose does not hide the call behind it."""
    text = 'A <tool_call> <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert Answer("A <tool_call>", "", [("f", "{}")]) == answer(tf.HERMES, text)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": 1}}',
        '\n {"arguments": {"a": 1}, "name": "f"} \n',
        '```json\n{"name": "f", "arguments": {"a": 1}}\n```\n',
        '```\n{"type": "function", "name": "f", "parameters": {"a": 1}}```',
    ],
)
@pytest.mark.parametrize("format", MARKED, ids=lambda f: f.name)
def test_whole_answer_that_is_one_call_needs_no_mark(format, text):
    """An answer that is only the JSON of an offered tool, bare or fenced, is a call."""
    assert Answer("", "", [("f", '{"a": 1}')]) == answer(format, text)


@pytest.mark.parametrize(
    "start", ['{"title": ', '{"name": "unknown"', '{"name": 3,', "```python\ni", '{"a']
)
def test_json_answers_are_not_held_back(start):
    """An answer in JSON is shown as soon as it cannot be a call any more."""
    machine = parser(tf.FALLBACK)
    shown = machine.push(start).text
    assert start.startswith(shown)
    assert start + " x" == shown + machine.push(" x").text + machine.flush().text
    if start != '{"a':
        assert start.rstrip() == shown.rstrip()


def test_forced_answer_shows_no_remains_of_markup():
    """Under a grammar that lets only calls through, a cut-off head is not text."""
    assert Answer("", "", []) == answer(tf.HERMES, '<tool_call>\n{"na', forced=True)
    assert [("f", "{}")] == answer(tf.LLAMA3, '{"name": "f", "parameters": {}}', forced=True).calls


def test_unclosed_end_mark_may_be_cut_off():
    """A call is whole without its end mark, and a piece of the mark is no text when calls are forced."""
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool'
    assert Answer("", "", [("f", "{}")]) == answer(tf.HERMES, text, forced=True)


def test_ids_differ_between_answers():
    """No two calls of a process share an id."""
    text = call(tf.HERMES, "f", "{}")
    ids = {d.id for _ in range(50) for d in parser(tf.HERMES).push(text).tool_calls if d.id}
    assert 50 == len(ids)


# --- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (" \n", {}),
        ("{}", {}),
        ('{"a": [1, "ü"]}', {"a": [1, "ü"]}),
        ('{"code": "a\nb"}', {"code": "a\nb"}),
        ('"{\\"a\\": 1}"', {"a": 1}),
        ('{"a": 1', None),
        ("[1]", None),
        ("null", None),
        ("3", None),
        ('"text"', None),
        ('"[1]"', None),
        ("[" * 100_000, None),
    ],
)
def test_arguments_are_an_object_or_broken(text, expected):
    """No text is no arguments, a quoted object is an object, and everything else is broken."""
    assert expected == parsed_arguments(text)
