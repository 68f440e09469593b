"""LangChain's messages as chat templates read them."""

from __future__ import annotations

import pytest
from fakes_rasd import ENGINE
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from scripted import scripted_model

from rasd_integrations.errors import PromptError
from rasd_integrations.langchain import ChatRASD
from rasd_integrations.runtime.rasd import RASD

pytestmark = pytest.mark.usefixtures("fake_engine")


def last_call(llm):
    return llm._rasd.calls[-1]


def test_messages_become_template_dicts(llm):
    """Every kind of message has its role; tool arguments stay a dict for the template's tojson."""
    call = {"name": "search", "args": {"query": "x"}, "id": "1", "type": "tool_call"}
    llm.invoke(
        [
            SystemMessage("s"),
            HumanMessage([{"type": "text", "text": "a"}, "b"]),
            AIMessage(
                [
                    {"type": "text", "text": "t"},
                    {"type": "tool_use", "id": "1", "name": "search", "input": {}},
                ],
                tool_calls=[call],
            ),
            ToolMessage("found", tool_call_id="1", name="search"),
            FunctionMessage("found", name="f"),
            ChatMessage("c", role="critic"),
            AIMessage("done"),
        ]
    )
    function = {"name": "search", "arguments": {"query": "x"}}
    expected = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "t",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "found", "tool_call_id": "1", "name": "search"},
        {"role": "tool", "content": "found", "name": "f"},
        {"role": "critic", "content": "c"},
        {"role": "assistant", "content": "done"},
    ]
    assert expected == last_call(llm).prompt


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (HumanMessage([{"type": "image", "url": "http://x/y.png"}]), "'image'"),
        (HumanMessage([{"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"}]), "'audio'"),
        (SystemMessage([{"type": "json", "json": {}}]), "'json'"),
        (RemoveMessage(id="1"), "RemoveMessage"),
    ],
)
def test_content_that_is_not_text_is_refused_by_name(llm, message, name):
    """A picture must not silently vanish from the prompt."""
    with pytest.raises(PromptError, match=name):
        llm.invoke([message])


def sent(llm, *messages):
    """Return the template's dicts of ``messages``."""
    llm.invoke(list(messages))
    return last_call(llm).prompt


def call_of(name, arguments, call_id):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_content_of_either_version_is_joined_text(llm):
    """Blocks of text, plain strings and plain-text documents are one text, in order."""
    blocks = [
        "one ",
        {"type": "text", "text": "two ", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "three ", "annotations": []},
        {"type": "text-plain", "text": "four", "mime_type": "text/plain"},
    ]
    assert [{"role": "user", "content": "one two three four"}] == sent(llm, HumanMessage(blocks))


def test_thoughts_go_back_to_the_template(llm):
    """Thoughts of this model, of LangChain's standard blocks and of Anthropic's are all the assistant's."""
    messages = [
        AIMessage("a", additional_kwargs={"reasoning_content": "hm"}),
        AIMessage([{"type": "reasoning", "reasoning": "so"}, {"type": "text", "text": "b"}]),
        AIMessage(
            [
                {"type": "thinking", "thinking": "ah", "signature": "x"},
                {"type": "text", "text": "c"},
            ]
        ),
        HumanMessage("d", additional_kwargs={"reasoning_content": "not an assistant's"}),
    ]
    expected = [
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        {"role": "assistant", "content": "b", "reasoning_content": "so"},
        {"role": "assistant", "content": "c", "reasoning_content": "ah"},
        {"role": "user", "content": "d"},
    ]
    assert expected == sent(llm, *messages)


def test_calls_that_stand_in_blocks_only_are_kept(llm):
    """A history written elsewhere may have its calls in the content; one named twice is one call."""
    call = {"name": "f", "args": {"a": 1}, "id": "1"}
    blocks = [
        {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "2", "name": "g", "input": {}},
        {"type": "tool_call", "id": "3", "name": "h", "args": {"b": 2}},
    ]
    (message,) = sent(llm, AIMessage(blocks, tool_calls=[call]))
    expected = [call_of("f", {"a": 1}, "1"), call_of("g", {}, "2"), call_of("h", {"b": 2}, "3")]
    assert {"role": "assistant", "content": "", "tool_calls": expected} == message


def test_a_broken_call_of_the_past_is_shown_as_it_was_written(llm):
    """The model is to see what it did wrong; the answer to it carries the same id."""
    broken = {"name": "f", "args": '{"a": ', "id": "1", "error": "no JSON"}
    messages = sent(
        llm,
        AIMessage("", invalid_tool_calls=[broken]),
        ToolMessage("not valid JSON", tool_call_id="1", status="error"),
    )
    assert [call_of("f", '{"a": ', "1")] == messages[0]["tool_calls"]
    assert ("1", "f") == (messages[1]["tool_call_id"], messages[1]["name"])


def test_a_result_has_the_name_of_its_call(llm):
    """Some templates name the tool in its result; LangChain's messages often do not."""
    artifact = [object()]
    calls = [{"name": n, "args": {}, "id": n} for n in "fg"]
    messages = sent(
        llm,
        HumanMessage("x"),
        AIMessage("", tool_calls=calls),
        ToolMessage("one", tool_call_id="f", artifact=artifact),
        ToolMessage([{"type": "text", "text": "two"}], tool_call_id="g", name="own"),
        ToolMessage("three", tool_call_id="unknown"),
    )
    results = [
        {"role": "tool", "content": "one", "tool_call_id": "f", "name": "f"},
        {"role": "tool", "content": "two", "tool_call_id": "g", "name": "own"},
        {"role": "tool", "content": "three", "tool_call_id": "unknown"},
    ]
    assert results == messages[2:]


def test_calls_in_openais_form_are_read(llm):
    """LangChain's few-shot helper leaves the calls in `additional_kwargs`; the message knows them."""
    raw = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = sent(llm, AIMessage("", additional_kwargs={"tool_calls": [raw]}))
    assert [call_of("f", {"a": 1}, "1")] == message["tool_calls"]


def test_the_engine_reads_every_valid_history():
    """Several of a role in a row, results of errors, a prefilled answer: on a template with tools and without."""
    history = [
        SystemMessage("Be brief."),
        SystemMessage("Be kind."),
        HumanMessage("Hi."),
        HumanMessage("2 - 1?"),
        AIMessage("Let me see.", tool_calls=[{"name": "sub", "args": {"a": 2}, "id": "1"}]),
        ToolMessage("b is missing", tool_call_id="1", status="error"),
        AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Easy."}]),
        HumanMessage("So?"),
        AIMessage("The answer"),
    ]
    seen = []
    for template in ("hermes", "plain", "strict"):
        script = lambda prompt: seen.append(prompt) or "The answer is one."  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ENGINE, RASD)
            llm = ChatRASD.from_model(*scripted_model(script, template=template))
        assert " is one." == llm.invoke(history).text
    assert 3 == len(seen)
    for prompt in seen:
        said = [
            "Be brief.",
            "Be kind.",
            "Hi.",
            "2 - 1?",
            "Let me see.",
            "sub",
            "b is missing",
            "Easy.",
        ]
        places = [prompt.index(words) for words in said]
        assert sorted(places) == places


def test_other_providers_blocks_in_the_history_are_no_error(llm, caplog):
    """Fault 12: an agent goes on after another model's searches, refusals and code, and a tool's file."""
    call = {"name": "look", "args": {}, "id": "1", "type": "tool_call"}
    llm.invoke(
        [
            HumanMessage("q"),
            AIMessage(
                [
                    {"type": "web_search_call", "id": "ws_1", "action": {"query": "q"}},
                    {"type": "server_tool_use", "id": "2", "name": "web_search", "input": {}},
                    {"type": "executable_code", "executable_code": "1 + 1", "language": "PYTHON"},
                    {"type": "refusal", "refusal": " No."},
                    {"type": "tool_use", "id": ["odd"], "input": {}},
                    {"type": "thinking", "thinking": "hm"},
                ],
                tool_calls=[call],
            ),
            ToolMessage([{"type": "file", "file_id": "f"}], tool_call_id="1"),
            HumanMessage("and?"),
        ]
    )
    _, answer, result, _ = last_call(llm).prompt
    assert "1 + 1 No." == answer["content"]
    assert ["look", ""] == [c["function"]["name"] for c in answer["tool_calls"]]
    assert {"role": "tool", "content": "", "tool_call_id": "1", "name": "look"} == result
    lines = [record.getMessage() for record in caplog.records]
    assert 2 == len(lines)
    assert "'web_search_call', 'server_tool_use'" in lines[0]
    assert "'file'" in lines[1]
