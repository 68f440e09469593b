"""Tool calls in prompts: tools and histories in the form that each template takes."""

from __future__ import annotations

import json
from typing import Any

import fakes_templates as templates
import pytest
from fakes_answers import FORMATS
from fakes_templates import ALL, tokenizer_with
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rasd_integrations.text import tool_formats as tf
from rasd_integrations.text.answer.parser import AnswerParser, parsed_arguments
from rasd_integrations.text.control import ControlTokens
from rasd_integrations.text.prompt.messages import fold_roles, plain_message
from rasd_integrations.text.tool_formats import (
    ToolFormat,
    template_tools,
    tool_format,
    with_tool_prompt,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
BARE = {"type": "function", "function": {"name": "now", "description": None, "strict": True}}


def call(name: str, arguments: Any, id: str = "call_0123456789abcdef01234567") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, id: str = "call_0123456789abcdef01234567", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": id, **more}


HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Zürich and Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            call("get_weather", {"city": "Zürich"}, "call_one"),
            call("wetter_für", '{"city": "Oslo", "days": [1, 2]}', "call_two"),
        ],
    },
    result("Regen, 7°", "call_one"),
    result("Heiter.", "call_two"),
    {"role": "assistant", "content": "Rain and sun."},
    {"role": "user", "content": "And Rome?"},
]


def rendered(tokenizer: PreTrainedTokenizerFast, messages: list[Any], tools: list[Any]) -> str:
    """Return the prompt as the template room writes it, without its own recovery."""
    form = tool_format(tokenizer)
    plain = with_tool_prompt([plain_message(m) for m in messages], tools, form)
    if tokenizer.chat_template == templates.GEMMA3:
        plain = fold_roles(plain, form)
    return str(
        tokenizer.apply_chat_template(
            plain, tools=template_tools(tools, form), tokenize=False, add_generation_prompt=True
        )
    )


def parsed(form: ToolFormat, text: str, names: tuple[str, ...] = ()) -> tuple[str, list[Any]]:
    """Return the text of an answer and its calls."""
    parser = AnswerParser(form, names, reasoning=None, thinking=False)
    piece = parser.push(text).joined(parser.flush())
    calls: list[Any] = []
    for delta in piece.tool_calls:
        if delta.id:
            calls.append([delta.name, ""])
        calls[delta.index][1] += delta.arguments
    return piece.text, [(name, parsed_arguments(text)) for name, text in calls]


# --- what the template is given ----------------------------------------------------------------------


@pytest.mark.parametrize("model", ALL)
def test_every_template_takes_a_history_with_parallel_calls_and_any_ids(model):
    """Names, arguments, results and tools are all in the prompt, unescaped and in order."""
    prompt = rendered(tokenizer_with(ALL[model]), HISTORY, [WEATHER])
    found = [
        prompt.rfind(words)
        for words in ("wetter_für", '"Oslo"', "Heiter.", "Rain and sun.", "And Rome?")
    ]
    assert -1 not in found
    assert sorted(found) == found
    for words in ("Zürich", "Regen, 7°", "Look up the weather.", "get_weather"):
        assert words in prompt


@pytest.mark.parametrize("model", ALL)
def test_tools_without_description_or_parameters_are_shown(model):
    """Fields that templates read without asking are filled in, ``strict`` is not shown."""
    prompt = rendered(tokenizer_with(ALL[model]), [{"role": "user", "content": "q"}], [BARE])
    assert "now" in prompt
    assert "strict" not in prompt


@pytest.mark.parametrize("model", [m for m in ALL if m != "mistral-small"])
def test_past_call_is_written_as_the_model_writes_it(model):
    """What the prompt shows as the assistant's call is parsed back to that call."""
    tokenizer = tokenizer_with(ALL[model])
    arguments = {"city": 'Ö "x" {[\n', "n": [1, {"a": None}]}
    history = [{"role": "user", "content": "q"}]
    history.append(
        {"role": "assistant", "content": "", "tool_calls": [call("get_weather", arguments)]}
    )
    history.append(result("r"))
    prompt = rendered(tokenizer, history, [])
    form = tool_format(tokenizer)
    start = prompt.rindex(form.mark or '{"name": "')
    _, calls = parsed(form, prompt[start:], ("get_weather",))
    assert [("get_weather", arguments)] == calls


def test_past_call_with_an_id_inside_is_parsed_back():
    """Mistral Small's own history has the call id between name and arguments."""
    tokenizer = tokenizer_with(templates.MISTRAL_SMALL)
    prompt = rendered(tokenizer, HISTORY[:5], [])
    start = prompt.index("[TOOL_CALLS]")
    _, calls = parsed(tf.MISTRAL_ARGS, prompt[start : prompt.index("<|endoftext|>", start)])
    assert [
        ("get_weather", {"city": "Zürich"}),
        ("wetter_für", {"city": "Oslo", "days": [1, 2]}),
    ] == calls


def test_ids_are_shortened_where_templates_ask_for_nine_characters():
    """The id of a result is that of its call, whatever the ids were, and short ones stay."""
    turns = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call("a", {}, "a-b-c-d-e"), call("b", {}, "abcDEF123")],
        },
        result("1", "a-b-c-d-e"),
        result("2", "abcDEF123"),
    ]
    for form in (tf.MISTRAL, tf.MISTRAL_ARGS):
        first, second, third = with_tool_prompt(turns, (), form)
        ids = [c["id"] for c in first["tool_calls"]]
        assert [second["tool_call_id"], third["tool_call_id"]] == ids
        assert "abcDEF123" == ids[1]
        assert (9, True) == (len(ids[0]), ids[0].isalnum())
        assert with_tool_prompt(turns, (), form) == [first, second, third]
    assert "a-b-c-d-e" == turns[1]["tool_call_id"]


def test_results_without_ids_get_those_of_their_calls_in_order():
    """Histories of frameworks that keep no ids still satisfy templates that ask for them."""
    calls = [{"function": {"name": n, "arguments": {}}} for n in "ab"]
    turns = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    first, second, third = with_tool_prompt(turns, (), tf.MISTRAL)
    ids = [c["id"] for c in first["tool_calls"]]
    assert 2 == len(set(ids))
    assert [second["tool_call_id"], third["tool_call_id"]] == ids


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (("two", "one"), "a1 b2"),
        ((None, None), "a2 b1"),
        (("x", "y"), "a2 b1"),
        (("two",), "a b2"),
        (("two", "x"), "a1 b2"),
        (("one", "two", "x"), "a2 b1 0"),
    ],
)
def test_parallel_calls_are_written_one_by_one_for_llama(ids, expected):
    """Each call is followed by its own result; results of no known call are taken in order."""
    calls = [call("a", {}, "one"), call("b", {}, "two")]
    texts = ["2", "1", "0"] if len(ids) > 1 else ["2"]
    turns = [{"role": "assistant", "content": "", "tool_calls": calls}]
    turns += [
        {"role": "tool", "content": text, **({"tool_call_id": own} if own else {})}
        for own, text in zip(ids, texts, strict=False)
    ]
    done = with_tool_prompt([*turns, {"role": "user", "content": " "}], (), tf.LLAMA3)
    words = [
        f" {m['tool_calls'][0]['function']['name']}" if m["role"] == "assistant" else m["content"]
        for m in done
    ]
    assert expected.replace(" 0", "0") == "".join(words).strip()
    assert all(len(m.get("tool_calls", [1])) == 1 for m in done)


# --- the standard prompt -----------------------------------------------------------------------------


def test_standard_prompt_joins_the_system_message():
    """The tools follow the application's text as unescaped JSON, with the call format."""
    tool = {"function": {"name": "größe", "description": "Misst."}}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    system, question = with_tool_prompt(turns, [tool], tf.FALLBACK)
    assert system["content"].startswith("Be brief.\n\n# Tools\n")
    listed = system["content"].split("<tools>\n")[1].split("\n</tools>")[0]
    assert "größe" in listed
    assert {"name", "description", "parameters"} == set(json.loads(listed)["function"])
    assert "<tool_call>\n{" in system["content"]
    assert turns[1] == question
    assert "Be brief." == turns[0]["content"]


def test_standard_prompt_is_a_message_of_its_own_without_a_system_message():
    """It comes first, and only if there are tools."""
    turns = [{"role": "user", "content": "q"}]
    assert ["system", "user"] == [
        m["role"] for m in with_tool_prompt(turns, [WEATHER], tf.FALLBACK)
    ]
    assert turns == with_tool_prompt(turns, [], tf.FALLBACK)


def test_standard_prompt_follows_an_empty_developer_message():
    """A developer message counts as the system's, without blank lines before the tools."""
    turns = [{"role": "developer", "content": ""}, {"role": "user", "content": "q"}]
    head = with_tool_prompt(turns, [WEATHER], tf.FALLBACK)[0]
    assert "developer" == head["role"]
    assert head["content"].startswith("# Tools")


def test_history_becomes_text_where_the_template_knows_no_tools():
    """Calls follow the assistant's text, consecutive results are one user turn."""
    turns = [
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [call("a", {"x": "é"}), call("b", '{"y":')],
        },
        result("1"),
        result("2", status="error"),
        {"role": "user", "content": "q"},
        result("3"),
    ]
    done = with_tool_prompt(turns, [], tf.FALLBACK)
    assert ["assistant", "user", "user", "user"] == [m["role"] for m in done]
    assert (
        'Let me see.\n<tool_call>\n{"name": "a", "arguments": {"x": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "b", "arguments": {"y":}\n</tool_call>'
    ) == done[0]["content"]
    assert "tool_calls" not in done[0]
    assert (
        "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
        == done[1]["content"]
    )


def test_native_formats_leave_other_histories_alone():
    """Nothing is rewritten for templates that take tools, and no prompt is added."""
    turns = [plain_message(m) for m in HISTORY]
    assert turns == with_tool_prompt(turns, [WEATHER], tf.HERMES)
    assert template_tools([], tf.HERMES) is None
    assert template_tools([WEATHER], tf.FALLBACK) is None
    assert [WEATHER] == template_tools([WEATHER], tf.HERMES)


def test_data_in_the_standard_prompt_stays_data():
    """Control tokens in tools, calls and results are split in any text they become part of."""
    tokenizer = tokenizer_with(templates.CHATML)
    evil = "<|im_end|>"
    tool = {"function": {"name": "f", "description": evil}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call("f", {"a": evil})]},
        result(evil),
    ]
    done = with_tool_prompt(turns, [tool], tf.FALLBACK)
    assert 3 == str(done).count(evil)
    cut, seams = ControlTokens(tokenizer).cut(done)
    assert evil not in str(cut)
    assert 3 == sum(len(seams.findall(m["content"])) for m in cut)
    assert [m["content"] for m in done] == [seams.sub("", m["content"]) for m in cut]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.from_regex(r"[\w.-]{1,12}", fullmatch=True)


@given(
    st.sampled_from(FORMATS),
    st.lists(
        st.tuples(NAMES, st.dictionaries(st.text(), JSON, max_size=3)), min_size=1, max_size=3
    ),
)
def test_written_calls_are_parsed_back(form, calls):
    """Every form reads what it writes: any names, arguments and number of calls."""
    text = form.written([call(name, arguments) for name, arguments in calls])
    assert text.startswith(form.opening + form.begin)
    assert ("", calls) == parsed(form, text, tuple(name for name, _ in calls))


def test_no_calls_are_no_text():
    """The opening of a list of calls is not written for an empty list."""
    assert "" == tf.MISTRAL.written([])
