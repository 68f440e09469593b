"""How text, thoughts and calls become message chunks, and what the chunks add up to."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import pytest
from fakes_langchain import Answer
from langchain_core.callbacks import BaseCallbackHandler
from langchain_tests.utils.stream_lifecycle import assert_valid_event_stream

from rasd_integrations.langchain import ChatRASD

GOOD = ("f", '{"a": 1, "b": ["ü", null]}')
CUT = ("g", '{"a": 2, "b": "half of it')
WHOLE = Answer("Some text.", "Let me think.", [GOOD, ("g", "")])
BROKEN = Answer("", "", [GOOD, CUT], finish_reason="length")

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning"),
    pytest.mark.usefixtures("fake_engine"),
]


def saying(answer, **options):
    """Return a model that says ``answer``."""
    llm = ChatRASD(model="org/one", **options)
    llm._rasd.answer = lambda prompt: answer
    return llm


def merged(chunks):
    return reduce(lambda a, b: a + b, chunks)


def calls(message):
    return [(c["name"], c["args"], c["id"]) for c in message.tool_calls]


EXPECTED = [("f", {"a": 1, "b": ["ü", None]}, "call_0"), ("g", {}, "call_1")]


def test_a_chunk_carries_one_kind_of_thing():
    """LangChain reads a chunk with text and calls as one without calls."""
    chunks = list(saying(WHOLE).stream("Hi"))
    kinds = [
        [bool(c.content), bool(c.additional_kwargs), bool(c.tool_call_chunks), c.chunk_position]
        for c in chunks
    ]
    assert {1} == {sum(map(bool, kind)) for kind in kinds}
    assert ["last"] == [c.chunk_position for c in chunks if c.chunk_position]
    assert chunks[-1].chunk_position == "last"


def test_thoughts_are_streamed_and_kept_apart_from_the_text():
    """Thoughts come word by word under LangChain's own name for them, before the text."""
    chunks = list(saying(WHOLE).stream("Hi"))
    thoughts = [c.additional_kwargs.get("reasoning_content", "") for c in chunks]
    assert ["Let", " me", " think."] == [t for t in thoughts if t]
    message = merged(chunks)
    assert ("Some text.", "Let me think.") == (
        message.text,
        message.additional_kwargs["reasoning_content"],
    )
    assert ["reasoning", "text", "tool_call", "tool_call"] == [
        b["type"] for b in message.content_blocks
    ]
    assert message.usage_metadata["output_token_details"] == {"reasoning": 3}


def test_calls_are_streamed_as_fragments():
    """The first fragment has id and name, the join of all is the JSON as it was written."""
    fragments = [f for c in saying(WHOLE).stream("Hi") for f in c.tool_call_chunks]
    first = [f for f in fragments if f["index"] == 0]
    assert ("f", "call_0") == (first[0]["name"], first[0]["id"])
    assert {None} == {x for f in first[1:] for x in (f["name"], f["id"])}
    assert GOOD[1] == "".join(f["args"] for f in first)
    assert len(first) > 4


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize("streaming", [False, True])
async def test_every_way_of_calling_gives_the_same_calls(version, streaming):
    """Invoked, streamed and event-streamed answers hold the same calls, text and thoughts."""
    llm = saying(WHOLE, output_version=version, streaming=streaming)
    messages = [
        llm.invoke("Hi"),
        await llm.ainvoke("Hi"),
        merged(llm.stream("Hi")),
        merged([c async for c in llm.astream("Hi")]),
        llm.stream_events("Hi", version="v3").output,
        await (await llm.astream_events("Hi", version="v3")).output,
    ]
    for message in messages:
        assert EXPECTED == calls(message)
        assert [] == message.invalid_tool_calls
        assert "Some text." == message.text
        blocks = message.content_blocks
        assert ["reasoning", "text", "tool_call", "tool_call"] == [b["type"] for b in blocks]
        assert "Let me think." == blocks[0]["reasoning"]
        assert "tool_calls" == message.response_metadata["finish_reason"]


@pytest.mark.parametrize("version", [None, "v1"])
def test_event_streams_follow_the_protocol(version):
    """Every block is opened, continued and closed; the call's arguments come in pieces."""
    llm = saying(WHOLE, output_version=version)
    events, written, so_far = [], [], [""]
    for event in llm.stream_events("Hi", version="v3"):
        events.append(event)
        delta = event.get("delta", {})
        if delta.get("type") == "tool-call-delta":
            written.append(delta["args"])
        elif delta.get("type") == "block-delta":  # langchain-core 1.6: the call so far
            so_far.append(delta["fields"]["args"])
    assert_valid_event_stream(events)
    written += [b.removeprefix(a) for a, b in pairwise(so_far)]
    assert GOOD[1] == "".join(written)
    assert sum(map(bool, written)) > 1


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_cut_call_is_filed_as_invalid(version, streaming):
    """Half a call is no call, though LangChain would mend its JSON where a callback listens."""
    llm = saying(BROKEN, output_version=version, streaming=streaming)
    for message in (llm.invoke("Hi"), await llm.ainvoke("Hi"), llm.batch(["Hi"])[0]):
        assert EXPECTED[:1] == calls(message)
        (broken,) = message.invalid_tool_calls
        assert (*CUT, "call_1") == (broken["name"], broken["args"], broken["id"])
        assert "max_tokens" in broken["error"]
        assert {} == message.additional_kwargs
        assert ["f"] == [b["name"] for b in message.content_blocks if b["type"] == "tool_call"]


def test_a_stream_says_which_calls_are_cut():
    """LangChain mends cut JSON when it adds chunks up; the last chunk says what was broken."""
    message = merged(saying(BROKEN).stream("Hi"))
    (broken,) = message.additional_kwargs["invalid_tool_calls"]
    assert ("call_1", CUT[1]) == (broken["id"], broken["args"])
    assert "length" == message.response_metadata["finish_reason"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ('{"a": 1', "no JSON"),
        ('{"a": 1} and more', "no JSON"),
        ("{'a': 1}", "no JSON"),
        ("[1, 2]", "no object"),
        ("3", "no object"),
    ],
)
def test_arguments_that_are_no_object_are_invalid(arguments, reason):
    """What a model that is free to call writes is read strictly, and shown as it is."""
    message = saying(Answer("", "", [("f", arguments), GOOD])).invoke("Hi")
    assert [GOOD[0]] == [c["name"] for c in message.tool_calls]
    (broken,) = message.invalid_tool_calls
    assert arguments == broken["args"]
    assert reason in broken["error"]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("", {}),
        ("{}", {}),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
        ('"{\\"a\\": 1}"', {"a": 1}),
    ],
)
def test_arguments_with_small_slips_are_read(arguments, value):
    """No arguments at all, raw line breaks in strings, and an object written as a string."""
    message = saying(Answer("", "", [("f", arguments)])).invoke("Hi")
    assert ([value], []) == ([c["args"] for c in message.tool_calls], message.invalid_tool_calls)


class Tokens(BaseCallbackHandler):
    """Collects what callbacks hear."""

    def __init__(self):
        self.words, self.chunks, self.ends = [], [], []

    def on_llm_new_token(self, token, *, chunk=None, **kwargs):
        self.words.append(token)
        self.chunks.append(chunk)

    def on_llm_end(self, response, **kwargs):
        self.ends.append(response.generations[0][0].message)


def test_callbacks_hear_of_fragments_and_of_the_whole():
    """The fragments of a call reach a callback as chunks; the end is the whole message."""
    tokens = Tokens()
    list(saying(WHOLE).stream("Hi", config={"callbacks": [tokens]}))
    assert "Some text." == "".join(tokens.words)
    fragments = [f["args"] for c in tokens.chunks for f in c.message.tool_call_chunks]
    assert GOOD[1] == "".join(fragments)
    (end,) = tokens.ends
    assert EXPECTED == calls(end)


def test_an_answer_may_go_back_as_it_came():
    """A merged stream or a v1 message is a message of the history: the same dicts for the template."""
    prompts = []
    for version in (None, "v1"):
        llm = saying(WHOLE, output_version=version)
        for message in (llm.invoke("Hi"), merged(llm.stream("Hi"))):
            llm.invoke([message])
            prompts.append(llm._rasd.calls[-1].prompt)
    assert [prompts[0]] * 4 == prompts
    assert ("Some text.", "Let me think.") == (
        prompts[0][0]["content"],
        prompts[0][0]["reasoning_content"],
    )
    assert ["f", "g"] == [c["function"]["name"] for c in prompts[0][0]["tool_calls"]]
