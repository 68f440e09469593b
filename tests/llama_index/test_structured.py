"""Structured prediction of the LlamaIndex LLM, over an engine that says what the test wrote."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import USER, call_of
from fakes_llama_index import FakeRASD, called, since, thought
from llama_index.core import PromptTemplate
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel, ConfigDict, ValidationError
from scripted import scripted_model

from rasd_integrations.errors import DecodingError
from rasd_integrations.llama_index import RASDLLM
from rasd_integrations.response_format import Grammar


class Song(BaseModel):
    """A song."""

    model_config = ConfigDict(title="A song, with a title")

    name: str
    seconds: int | None = None


TEMPLATE = PromptTemplate("Sing of {topic}.")
SUNG = called("A song, with a title", '{"name": "Yes', 'terday", "seconds": 125}')


async def predict(llm, how, **options):
    """Predict a song in one of four ways and return all that came."""
    if how == "sync":
        return [llm.structured_predict(Song, TEMPLATE, options, topic="rain")]
    if how == "async":
        return [await llm.astructured_predict(Song, TEMPLATE, options, topic="rain")]
    if how == "stream":
        return list(llm.stream_structured_predict(Song, TEMPLATE, options, topic="rain"))
    stream = await llm.astream_structured_predict(Song, TEMPLATE, options, topic="rain")
    return [found async for found in stream]


WAYS = pytest.mark.parametrize("how", ["sync", "async", "stream", "astream"])


@WAYS
async def test_a_chat_model_is_made_to_call_the_class(llm, how):
    """The call is demanded whatever the options say, so that its grammar holds; streams grow to the same object."""
    llm._rasd.answers = ([thought("A song."), *SUNG],)
    found = await predict(llm, how, temperature=0.5, tool_choice="none", tool_required=False)

    call = call_of(llm)
    assert Song(name="Yesterday", seconds=125) == found[-1]
    assert ("required", False, 0.5) == (call.tools.choice, call.tools.parallel, call.params.temperature)  # fmt: skip
    assert "Sing of rain." == call.prompt[-1]["content"]
    if "stream" in how:
        assert [None, "Yes", "Yesterday", "Yesterday"] == [song.name for song in found]
        assert [False, True, True, True] == [isinstance(song, Song) for song in found]


@WAYS
@pytest.mark.parametrize("mode", [PydanticProgramMode.DEFAULT, PydanticProgramMode.LLM])
async def test_a_base_model_writes_json_by_grammar(llm, monkeypatch, how, mode):
    """The schema stands in the prompt and binds the text; chat models do so where they are told."""
    if "stream" in how:
        since("0.14.22")
    monkeypatch.setattr(FakeRASD, "has_chat_template", mode is PydanticProgramMode.LLM)
    llm.pydantic_program_mode = mode
    llm._rasd.answers = ('{"name": "Yesterday", "seconds": 125}',)
    found = await predict(llm, how)

    call = call_of(llm)
    assert Song(name="Yesterday", seconds=125) == found[-1]
    assert Grammar.json_schema(Song.model_json_schema()) == call.params.grammar
    assert call.tools is None
    assert '"seconds"' in call.text


@WAYS
async def test_an_object_that_was_cut_is_no_object(llm, how):
    """At ``max_tokens`` there is an error that says so."""
    llm._rasd.answers = (called("A song, with a title", '{"name": "Yes'),)
    llm._rasd.ends = "length"

    with pytest.raises(DecodingError, match="Raise max_tokens"):
        await predict(llm, how)


@pytest.mark.parametrize("how", ["async", "stream", "astream"])
async def test_what_the_class_itself_refuses_is_said(llm, how):
    """A validator that no schema can show raises pydantic's own error."""
    llm._rasd.answers = (called("A song, with a title", '{"name": 5}'),)

    with pytest.raises(ValidationError, match="name"):
        await predict(llm, how)


@WAYS
async def test_structured_events(llm, how):
    """Observers see a structured prediction begin and end with its object."""
    seen = []

    class Events(BaseEventHandler):
        def handle(self, event, **_):
            seen.append((event.class_name(), getattr(event, "output", None)))

    handler, root = Events(), get_dispatcher()
    root.add_event_handler(handler)
    llm._rasd.answers = (SUNG,)
    await predict(llm, how)
    root.event_handlers.remove(handler)

    told = [pair for pair in seen if pair[0].startswith("LLMStructured")]
    assert ("LLMStructuredPredictStartEvent", None) == told[0]
    assert ("LLMStructuredPredictEndEvent", Song(name="Yesterday", seconds=125)) == told[-1]
    assert "LLMChatStartEvent" in {name for name, _ in seen}


@pytest.mark.filterwarnings("ignore:The `json` method is deprecated")
async def test_as_structured_llm(llm):
    """The wrapper that agents and query engines use."""
    llm._rasd.answers = [SUNG] * 4
    structured = llm.as_structured_llm(Song)
    raws = [
        structured.chat(USER).raw,
        (await structured.achat(USER, max_tokens=9)).raw,
        [r.raw for r in structured.stream_chat(USER)][-1],
        structured.complete("Sing.").raw,
    ]

    assert [Song(name="Yesterday", seconds=125)] * 4 == raws
    assert 9 == llm._rasd.calls[1].params.max_tokens


def test_a_class_reads_unique_items_into_a_set(llm):
    """What no grammar can hold to is not asked of a class that drops doubles itself."""

    class Tagged(BaseModel):
        tags: set[int]

    llm.complete("Sing.", response_format=Tagged)
    expected = Tagged.model_json_schema()
    del expected["properties"]["tags"]["uniqueItems"]
    assert [Grammar.json_schema(expected)] == [call.params.grammar for call in llm._rasd.calls]


def test_a_response_format_binds_one_call(llm):
    """OpenAI's form, or a class; complete and chat alike."""
    schema = Song.model_json_schema()
    llm.complete("Sing.", response_format=Song)
    llm.chat(USER, response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    llm.chat(USER, response_format={"type": "json_object"})
    llm.chat(USER, response_format={"type": "text"})

    expected = [*[Grammar.json_schema(schema)] * 2, Grammar.json_object(), None]
    assert expected == [call.params.grammar for call in llm._rasd.calls]


async def test_a_cut_answer_is_closed_or_an_error(caplog):
    """On the real engine: ``on_cut="close"`` warns and names what was closed; ``"raise"`` is an error everywhere."""
    told = "cut at max_tokens, 40 tokens, and these values were closed: name"
    said = '{"name": "A long song' + " and on" * 90
    llm = RASDLLM.from_model(*scripted_model(lambda _: said), max_tokens=40)
    closed = llm.complete("Sing.", response_format=Song)
    assert Song.model_validate_json(closed.text).name.startswith("A long song")
    assert ["name"] == closed.raw["rasd"]["closed_fields"]
    assert told in caplog.text

    for strict, options in (
        (RASDLLM.from_model(*scripted_model(lambda _: said), max_tokens=40, on_cut="raise"), {}),
        (llm, {"on_cut": "raise"}),
    ):
        with pytest.raises(DecodingError, match=told):
            strict.complete("Sing.", response_format=Song, **options)
        with pytest.raises(DecodingError, match=told):
            await strict.achat(USER, response_format=Song, **options)
        with pytest.raises(DecodingError, match=told):
            list(strict.stream_chat(USER, response_format=Song, **options))
