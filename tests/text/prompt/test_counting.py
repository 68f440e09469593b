"""Any part of a conversation can be counted."""

from __future__ import annotations

import pytest
from scripted import scripted_tokenizer

from rasd_integrations.response_format import ToolUse
from rasd_integrations.text.prompt.counting import count_messages, count_text
from rasd_integrations.text.prompt.template import ChatTemplate

USER = {"role": "user", "content": "Who built the lighthouse?"}
ANSWER = {"role": "assistant", "content": "Robert Stevenson did."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "1828", "tool_call_id": "1"}
PARTS = {
    "nothing": [],
    "no text": [{"role": "user", "content": " "}],
    "an empty answer": [{"role": "assistant", "content": ""}],
    "assistant first": [ANSWER, USER],
    "a call alone": [CALL],
    "a result alone": [RESULT],
    "an unknown role": [{"role": "critic", "content": "Well said."}],
    "a picture": [
        {"role": "user", "content": [{"type": "image", "data": "x"}, {"type": "text", "text": "?"}]}
    ],
    "two users": [USER, USER],
}


@pytest.fixture(params=["hermes", "plain", "strict"])
def template(request):
    """Return one template of each kind."""
    return ChatTemplate(scripted_tokenizer(request.param))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_counted(template, part):
    """Fault 4: no part is refused, and more words are more tokens."""
    messages = PARTS[part]
    tokens = count_messages(template, messages)

    assert (tokens > 0) == bool(messages)
    assert count_messages(template, [*messages, {**USER, "content": "word " * 50}]) >= tokens + 200


def test_what_can_be_asked_is_counted_as_it_is_asked(template):
    """The count of a whole prompt is the length of what the model reads, tools included."""
    tools = ToolUse.of([{"name": "look", "description": "Look it up.", "parameters": {}}])
    whole = [USER, ANSWER, USER]

    assert count_messages(template, whole) == len(template.encode_messages(whole))
    assert count_messages(template, whole, tools.visible) == len(
        template.encode_messages(whole, tools=tools.visible)
    )
    assert (0, len(template.encode_text("Hi"))) == (
        count_text(template, ""),
        count_text(template, "Hi"),
    )
