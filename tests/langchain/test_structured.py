"""Structured output on the real engine: every kind of schema by every method, whole, streamed and cut."""

from __future__ import annotations

import functools
import json
from enum import Enum
from itertools import pairwise
from typing import Annotated, Any

import pytest
from assistant import standard_model
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration
from langchain_core.runnables import RunnableLambda
from pydantic import BaseModel, Field, field_validator
from pydantic.v1 import BaseModel as BaseModelV1
from scripted import scripted_model
from typing_extensions import TypedDict

from rasd_integrations.errors import ConfigurationError, DecodingError
from rasd_integrations.langchain import ChatRASD
from rasd_integrations.langchain.structured_output import StructuredParser

METHODS = ("function_calling", "json_schema", "json_mode")
HELD = METHODS[:2]  # to the schema, not only to JSON
ASSISTANT = functools.cache(standard_model)


class Joke(BaseModel):
    """A joke."""

    setup: str
    punchline: str


class JokeV1(BaseModelV1):
    """A joke."""

    setup: str
    punchline: str


class JokeDict(TypedDict):
    """A joke."""

    setup: Annotated[str, ..., "the question"]
    punchline: Annotated[str, ..., "the answer"]


SCHEMA = Joke.model_json_schema()
BARE = {k: v for k, v in SCHEMA.items() if k not in ("title", "description")}
KINDS = {"pydantic": Joke, "pydantic v1": JokeV1, "typeddict": JokeDict, "schema": SCHEMA}
OPENAI = {"name": "Joke", "parameters": BARE}
ASKED = "Tell a joke in JSON with 'setup' and 'punchline'."


@pytest.fixture
def llm():
    return ChatRASD.from_model(*ASSISTANT(), max_tokens=300)


def stubborn(answer="Good morning!", **options):
    """Return a model that would say ``answer`` to everything."""
    model = scripted_model(lambda prompt: answer)
    return ChatRASD.from_model(*model, **{"max_tokens": 300, **options})


def fields(value):
    return value if isinstance(value, dict) else value.dict() if isinstance(value, JokeV1) else value.model_dump()  # fmt: skip


# --- every kind by every method ---


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_schema_by_every_method(llm, kind, method):
    """Classes give their objects, other schemas give dicts; with the raw message where asked for."""
    schema = KINDS[kind]
    chain = llm.with_structured_output(schema, method=method)
    wanted = schema if kind.startswith("pydantic") else dict
    answers = [chain.invoke(ASKED), await chain.ainvoke(ASKED), chain.batch([ASKED])[0]]
    assert [wanted] * 3 == [type(a) for a in answers]
    assert {"setup", "punchline"} == set(fields(answers[0]))
    assert [answers[0]] * 3 == answers

    raw = llm.with_structured_output(schema, method=method, include_raw=True)
    for both in (raw.invoke(ASKED), await raw.ainvoke(ASKED)):
        assert {"raw", "parsed", "parsing_error"} == set(both)
        assert (answers[0], None) == (both["parsed"], both["parsing_error"])
        assert isinstance(both["raw"], AIMessage)
        assert both["raw"].usage_metadata["output_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
async def test_streams_grow_to_the_whole_object(kind, method):
    """A dict grows key by key; an object comes as soon as it is one; the last is the invoked answer."""
    llm = ChatRASD.from_model(*ASSISTANT(), max_tokens=300, drafter=None)  # a token a step
    chain = llm.with_structured_output(KINDS[kind], method=method)
    whole = chain.invoke(ASKED)
    streams = [list(chain.stream(ASKED)), [x async for x in chain.astream(ASKED)]]
    for parts in streams:
        assert whole == parts[-1]
        assert len(parts) > 3
        texts = ["".join(map(str, fields(part).values())) for part in parts]
        assert all(after.startswith(before) for before, after in pairwise(texts))
        if isinstance(whole, dict):
            assert {"setup"} == set(next(part for part in parts if part))


@pytest.mark.parametrize("form", [BARE, OPENAI, {"name": "Joke", "schema": BARE}, {"type": "json_schema", "json_schema": {"name": "Joke", "schema": BARE}}])  # fmt: skip
def test_schemas_in_every_form_of_a_dict(llm, form):
    """A schema without a name, OpenAI's function and OpenAI's response format say the same."""
    answer = llm.with_structured_output(form, method="json_schema").invoke(ASKED)
    assert ["setup", "punchline"] == list(answer)


def test_json_mode_needs_no_schema(llm):
    """Any JSON object, as the prompt asks for it."""
    answer = llm.with_structured_output(method="json_mode").invoke(ASKED)
    assert {"setup", "punchline"} == set(answer)


# --- held to the schema, whatever the model would say ---


class Color(str, Enum):
    """Two of them."""

    RED = "red"
    BLUE = "blue"


class Node(BaseModel):
    """A node of a tree, with limits of every kind."""

    name: Annotated[str, Field(pattern="^[a-z]{2,4}$")]
    weight: Annotated[int, Field(ge=10, lt=20)]
    color: Color
    tags: Annotated[list[str], Field(min_length=2, max_length=3)]
    child: Node | None
    note: str | None = None


@pytest.mark.parametrize("method", HELD)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 5.0, "seed": 3}])
@pytest.mark.parametrize("drafter", ["auto", None])
def test_a_stubborn_model_is_held_to_the_schema(method, sampling, drafter):
    """Limits, enums, patterns, nesting and recursion hold, greedy and sampled, drafting and not."""
    llm = stubborn(drafter=drafter, **sampling)
    assert isinstance(llm.with_structured_output(Node, method=method).invoke("Hello!"), Node)


def test_exactly_one_call_is_made(llm):
    """A model that would call twice is stopped after the first object."""
    call = (
        '<tool_call>\n{"name": "Joke", "arguments": {"setup": "a", "punchline": "b"}}\n</tool_call>'
    )
    chain = stubborn(f"{call}\n{call}").with_structured_output(Joke, include_raw=True)
    answer = chain.invoke("Hello!")
    assert 1 == len(answer["raw"].tool_calls)
    assert Joke(setup="a", punchline="b") == answer["parsed"]


@pytest.mark.parametrize("strict", [None, True, False])
@pytest.mark.parametrize("method", HELD)
def test_strict_is_heard_by_both_methods(method, strict):
    """The grammar is strict in any case; a strict schema is closed also for the model that reads it."""
    chain = stubborn().with_structured_output(SCHEMA, method=method, strict=strict)
    assert {"setup", "punchline"} == set(chain.invoke("Hello!"))


# --- answers that are no object ---


@pytest.mark.parametrize(("method", "room"), [("function_calling", 66), ("json_schema", 20), ("json_mode", 1)])  # fmt: skip
@pytest.mark.parametrize("schema", [Joke, JokeDict])
async def test_a_room_too_small_is_told_before_the_answer(method, room, schema):
    """Fault 7: the error says what the shortest object needs, invoked and streamed, and is no parser's."""
    llm = stubborn('{"setup": "A long question', max_tokens=room)
    chain = llm.with_structured_output(schema, method=method)
    told = f"max_tokens is {room}, but the shortest answer that the schema allows needs"
    with pytest.raises(ConfigurationError, match=told):
        chain.invoke("Hello!")
    with pytest.raises(ConfigurationError, match=told):
        await chain.ainvoke("Hello!")
    with pytest.raises(ConfigurationError, match=told):
        list(chain.stream("Hello!"))


def test_closed_fields_are_named_or_an_error(caplog):
    """Fault 8: a cut answer is warned of and names what the model did not write; `on_cut="raise"` is an error."""
    for method in ("json_schema", "function_calling"):
        room = 60 if method == "json_schema" else 130
        said = '{"setup": "A long' + " and on" * 90
        if method == "function_calling":
            said = '<tool_call>\n{"name": "Joke", "arguments": ' + said
        bound = stubborn(said, max_tokens=room)
        chain = bound.with_structured_output(Joke, method=method, include_raw=True)
        answer = chain.invoke("Hello!")
        assert answer["parsed"].setup.startswith("A long")
        closed = answer["raw"].response_metadata["rasd"]["closed_fields"]
        assert closed == ["setup", "punchline"], method
        assert "these values were closed: setup, punchline" in caplog.text
        caplog.clear()
        strict = bound.model_copy(update={"on_cut": "raise"})
        with pytest.raises(DecodingError, match=f"cut at max_tokens, {room} tokens, .*punchline"):
            strict.with_structured_output(Joke, method=method).invoke("Hello!")


@pytest.mark.parametrize(("method", "room"), [("function_calling", 94), ("json_schema", 34)])
def test_an_object_closed_at_max_tokens_is_an_object(method, room):
    """Where the engine can close an answer in time, it is whole."""
    llm = stubborn('{"setup": "A long question, longer than the answer may be"', max_tokens=room)
    answer = llm.with_structured_output(Joke, method=method, include_raw=True).invoke("Hello!")
    assert (None, Joke) == (answer["parsing_error"], type(answer["parsed"]))
    assert answer["raw"].usage_metadata["output_tokens"] <= room


def test_an_object_closed_too_early_names_max_tokens():
    """What JSON mode closes in time is JSON, but need not be what the class wants."""
    usage = {"input_tokens": 1, "output_tokens": 12, "total_tokens": 13}
    closed = AIMessage("{}", response_metadata={"finish_reason": "length"}, usage_metadata=usage)
    with pytest.raises(OutputParserException, match=r"(?s)no Joke.*max_tokens, 12 tokens"):
        StructuredParser(answer_class=Joke).invoke(closed)


def test_a_stream_that_ends_inside_an_object_is_an_error():
    """What could still grow is an object so far; once the answer has ended it is none."""
    cut = AIMessage('{"setup": "why', response_metadata={"finish_reason": "stop"})
    parser: Any = StructuredParser()
    growing = [ChatGeneration(message=AIMessage(cut.content))]
    assert parser.parse_result(growing, partial=True) == {"setup": "why"}
    with pytest.raises(OutputParserException, match="stop string"):
        parser.parse_result([ChatGeneration(message=cut)], partial=True)


def test_a_stop_string_that_cuts_is_named():
    """The caller's own stop string may stand in the object."""
    llm = stubborn('{"setup": "why so?", "punchline": "x"}', stop=["so"])
    with pytest.raises(OutputParserException, match="stop string"):
        llm.with_structured_output(Joke, method="json_schema").invoke("Hello!")


class Picky(BaseModel):
    """What no grammar can say."""

    word: str

    @field_validator("word")
    @classmethod
    def _palindrome(cls, value: str) -> str:
        if value != value[::-1]:
            msg = "no palindrome"
            raise ValueError(msg)
        return value


@pytest.mark.parametrize("method", METHODS)
def test_a_classs_own_rules_are_reported(method):
    """An object that its class refuses is LangChain's parser error, or stands beside the raw message."""
    llm = stubborn('{"word": "abc"}', max_tokens=200)
    if method == "function_calling":
        llm = stubborn('<tool_call>\n{"name": "Picky", "arguments": {"word": "abc"}}\n</tool_call>')
    with pytest.raises(OutputParserException, match="no palindrome"):
        llm.with_structured_output(Picky, method=method).invoke("Hello!")
    raw = llm.with_structured_output(Picky, method=method, include_raw=True).invoke("Hello!")
    assert "no palindrome" in str(raw["parsing_error"])
    assert '{"word": "abc"}' in (raw["raw"].text or json.dumps(raw["raw"].tool_calls[0]["args"]))


def test_parser_errors_are_langchains(llm):
    """`with_retry` and `with_fallbacks` on parser errors work as with any model."""
    short = stubborn('{"setup": "A long question", "punchline": ""}', stop=["question"])
    chain = short.with_structured_output(Joke, method="json_schema").with_fallbacks(
        [llm.with_structured_output(Joke, method="json_schema")],
        exceptions_to_handle=(OutputParserException,),
    )
    assert isinstance(chain.invoke(ASKED), Joke)


# --- with tools, in chains, refused ---


def weather(city: str) -> str:
    """Get the weather in a city."""
    return city


def test_tools_beside_a_schema(llm):
    """The model may call a tool instead of answering; then there is nothing parsed and no error."""
    chain = llm.with_structured_output(
        Joke, method="json_schema", include_raw=True, tools=[weather]
    )
    called = chain.invoke("What is the weather in Paris?")
    assert ["weather"] == [c["name"] for c in called["raw"].tool_calls]
    assert (None, None) == (called["parsed"], called["parsing_error"])
    answered = chain.invoke(ASKED)
    assert ([], Joke) == (answered["raw"].tool_calls, type(answered["parsed"]))


def test_disabled_streaming_gives_the_whole_object(llm):
    """`disable_streaming="tool_calling"` streams one message, from which the call is still read."""
    quiet = llm.model_copy(update={"disable_streaming": "tool_calling"})
    (joke,) = quiet.with_structured_output(Joke).stream(ASKED)
    assert isinstance(joke, Joke)


def test_the_parser_reads_plain_text_too(llm):
    """After another parser or a plain LLM there is only text."""
    parser: Any = StructuredParser(answer_class=Joke)
    chain = (
        RunnableLambda(lambda _: '{"setup": "a", "punchline": "b"}') | StrOutputParser() | parser
    )
    assert Joke(setup="a", punchline="b") == chain.invoke("x") == parser.parse('{"setup": "a", "punchline": "b"}')  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "options", "message"),
    [
        (Joke, {"method": "json"}, "'json'"),
        (Joke, {"methods": "json_mode"}, "'method'"),
        (Joke, {"method": "json_mode", "strict": True}, "json_mode"),
        (None, {}, "schema"),
        (Joke, {"tools": [weather]}, "tools="),
        (Joke, {"tools": [weather], "method": "json_schema"}, "include_raw"),
    ],
)
def test_what_cannot_be_met_is_refused(llm, schema, options, message):
    """Unknown options, unknown methods and combinations that mean nothing."""
    with pytest.raises(ConfigurationError, match=message):
        llm.with_structured_output(schema, **options)


def test_a_schema_without_a_name_cannot_be_a_tool(llm):
    """LangChain says what is missing."""
    with pytest.raises(ValueError, match="title"):
        llm.with_structured_output(BARE, method="function_calling")


class Tagged(BaseModel):
    """A note with tags."""

    tags: set[Color]


@pytest.mark.parametrize("method", HELD)
def test_sets_are_read_from_arrays_by_both_methods(method):
    """An array of unique items cannot be held to; a class drops doubles itself, so it is not asked for."""
    llm = stubborn()
    answer = llm.with_structured_output(Tagged, method=method).invoke("Hello!")
    assert isinstance(answer.tags, set)
    assert answer.tags <= {*Color}
    with pytest.raises(ConfigurationError, match="unique"):
        llm.with_structured_output(Tagged.model_json_schema(), method="json_schema").invoke(
            "Hello!"
        )
