"""The LlamaIndex contract: tool calling and structured prediction."""

from __future__ import annotations

import enum
from typing import Generic, TypeVar

import pytest
from contract_setup import FACT, QUESTION, STREAMS, WAYS, ContractSetup, said
from fakes_llama_index import since
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel, Field


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"Sunny in {city}."


def say_time() -> str:
    """Say what the clock shows."""
    return "noon"


ADD, WEATHER, TIME = (FunctionTool.from_defaults(fn) for fn in (add, get_weather, say_time))
SUM = "Please add 3 and 4."
CITIES = "Get the weather in Paris and in Rome, please."


async def ask(llm, tools, text, way, **options):
    """Return the responses of ``chat_with_tools`` in one of its ways."""
    asked = {"user_msg": text, **options}
    if way == "whole":
        return [llm.chat_with_tools(tools, **asked)]
    if way == "async":
        return [await llm.achat_with_tools(tools, **asked)]
    if way == "stream":
        return list(llm.stream_chat_with_tools(tools, **asked))
    return [r async for r in await llm.astream_chat_with_tools(tools, **asked)]


def calls_of(llm, response):
    """Return the names and arguments of a response's calls."""
    calls = llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
    return [(call.tool_name, call.tool_kwargs) for call in calls]


class ToolCalling(ContractSetup):
    """Function calling, as agents and programs use it."""

    def test_says_that_it_calls_functions(self, caller):
        """Agents look at the metadata."""
        assert caller.metadata.is_function_calling_model

    @WAYS
    async def test_a_tool_is_called(self, caller, way):
        """The right one, with exact arguments and an id; the message holds it as a block."""
        responses = await ask(caller, [WEATHER, ADD], SUM, way)
        (call,) = caller.get_tool_calls_from_response(responses[-1])

        assert ("add", {"a": 3, "b": 4}) == (call.tool_name, call.tool_kwargs)
        assert call.tool_id
        blocks = [b for b in responses[-1].message.blocks if isinstance(b, ToolCallBlock)]
        assert [(call.tool_id, "add")] == [(b.tool_call_id, b.tool_name) for b in blocks]

    @STREAMS
    async def test_every_piece_of_a_stream_can_be_read(self, caller, way):
        """Agents ask every response for its calls; arguments grow to the whole."""
        responses = await ask(caller, [ADD], SUM, way)
        found = [calls_of(caller, response) for response in responses]

        assert [("add", {"a": 3, "b": 4})] == found[-1]
        assert all(name == "add" for calls in found for name, _ in calls)

    @WAYS
    async def test_text_where_no_tool_fits(self, caller, way):
        """A greeting is answered with text; asking for a call that is not there is an error."""
        last = (await ask(caller, [ADD], "Hello!", way))[-1]

        assert last.message.content
        assert [] == calls_of(caller, last)
        with pytest.raises(ValueError, match="tool"):
            caller.get_tool_calls_from_response(last)

    @WAYS
    async def test_a_call_can_be_demanded(self, caller, way):
        """``tool_required`` has a tool called with arguments that fit, whatever was said."""
        last = (await ask(caller, [ADD], "Hello!", way, tool_required=True))[-1]
        ((name, arguments),) = calls_of(caller, last)

        assert ("add", {"a", "b"}) == (name, set(arguments))
        assert all(isinstance(value, int) for value in arguments.values())

    @WAYS
    async def test_a_tool_can_be_named(self, caller, way):
        """``tool_choice`` has that one called."""
        last = (await ask(caller, [ADD, WEATHER], SUM, way, tool_choice="get_weather"))[-1]

        assert ["get_weather"] == [name for name, _ in calls_of(caller, last)]

    async def test_tools_can_be_forbidden(self, caller):
        """``tool_choice="none"`` has text written."""
        last = (await ask(caller, [ADD], SUM, "whole", tool_choice="none"))[-1]

        assert [] == calls_of(caller, last)

    async def test_a_tool_without_arguments(self, caller):
        """Its arguments are an empty mapping."""
        last = (await ask(caller, [TIME], "What does the clock show?", "whole"))[-1]

        assert [("say_time", {})] == calls_of(caller, last)

    @WAYS
    async def test_arguments_of_any_letters(self, caller, way):
        """Quotes, umlauts and signs arrive as they were said."""
        last = (await ask(caller, [WEATHER], 'The weather in "Zürich 灯台 🗼"?', way))[-1]

        assert [("get_weather", {"city": "Zürich 灯台 🗼"})] == calls_of(caller, last)

    @WAYS
    async def test_several_calls_where_allowed(self, caller, way):
        """Each has an id of its own."""
        asked = {"allow_parallel_tool_calls": True}
        last = (await ask(caller, [WEATHER], CITIES, way, **asked))[-1]
        calls = caller.get_tool_calls_from_response(last)

        assert [{"city": "Paris"}, {"city": "Rome"}] == [call.tool_kwargs for call in calls]
        assert len({call.tool_id for call in calls}) == 2

    @WAYS
    async def test_one_call_where_several_are_not(self, caller, way):
        """In streams too."""
        last = (await ask(caller, [WEATHER], CITIES, way))[-1]

        assert [("get_weather", {"city": "Paris"})] == calls_of(caller, last)

    @WAYS
    async def test_the_callers_history_does_not_grow(self, caller, way):
        """The list of messages stays the caller's."""
        history = said("Good morning.")
        await ask(caller, [ADD], SUM, way, chat_history=history)

        assert said("Good morning.") == history

    @pytest.mark.parametrize("form", ["blocks", "older"])
    @WAYS
    async def test_tool_results_are_read(self, caller, way, form):
        """A conversation with a call and its result goes on, in both forms of a call."""
        block = ToolCallBlock(tool_call_id="c1", tool_name="add", tool_kwargs={"a": 3, "b": 4})
        function = {"name": "add", "arguments": '{"a": 3, "b": 4}'}
        call = {"id": "c1", "type": "function", "function": function}
        said_call = (
            ChatMessage(role="assistant", blocks=[block])
            if form == "blocks"
            else ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [call]})
        )
        result = ChatMessage(role="tool", content="7", additional_kwargs={"tool_call_id": "c1"})
        history = [*said(SUM), said_call, result]
        last = (await ask(caller, [ADD], None, way, chat_history=history))[-1]

        assert "7" in last.message.content
        assert [] == calls_of(caller, last)
        (prompt,) = self.prompts_read()
        assert prompt.count('"arguments"') >= 1

    @pytest.mark.parametrize("way", ["whole", "async"])
    async def test_predict_and_call(self, caller, way):
        """The framework's one-shot call runs the tool and returns what it gave."""
        if way == "whole":
            response = caller.predict_and_call([ADD, WEATHER], user_msg=SUM)
        else:
            response = await caller.apredict_and_call([ADD, WEATHER], user_msg=SUM)

        assert str(response) == "7"


T = TypeVar("T")


class Genre(enum.Enum):
    """Kinds of songs."""

    rock = "rock"
    folk = "folk"


class Song(BaseModel):
    """A song."""

    title: str
    seconds: int


class Box(BaseModel, Generic[T]):
    """A box of something."""

    inside: T


class Album(BaseModel):
    """An album of songs."""

    genre: Genre
    songs: list[Song] = Field(min_length=1)
    label: str | None = None


SING = PromptTemplate('The song "{title}" takes {seconds} seconds.')
SUNG = {"title": "Yesterday", "seconds": 125}


async def predict(llm, output_cls, prompt, way, **arguments):
    """Return all objects of a structured prediction in one of its ways."""
    if way == "whole":
        return [llm.structured_predict(output_cls, prompt, **arguments)]
    if way == "async":
        return [await llm.astructured_predict(output_cls, prompt, **arguments)]
    if way == "stream":
        return list(llm.stream_structured_predict(output_cls, prompt, **arguments))
    stream = await llm.astream_structured_predict(output_cls, prompt, **arguments)
    return [found async for found in stream]


class Structured(ContractSetup):
    """Answers that are objects."""

    @WAYS
    async def test_structured_predict(self, llm, way):
        """The object says what the prompt says; streams end with it."""
        assert Song(**SUNG) == (await predict(llm, Song, SING, way, **SUNG))[-1]

    @WAYS
    async def test_whatever_is_asked_the_object_is_valid(self, llm, way):
        """Nested classes, enums and limits hold, though the prompt asks for none of it."""
        last = (await predict(llm, Album, PromptTemplate("Hello! {x}"), way, x="How are you?"))[-1]

        assert isinstance(last, Album)
        assert last == Album.model_validate(last.model_dump())

    @WAYS
    async def test_a_class_with_brackets_in_its_name(self, llm, way):
        """A generic class is as good as any."""
        filled = PromptTemplate("The box holds {count} apples.")
        found = await predict(llm, Box[int], filled, way, count=12)

        assert Box[int](inside=12) == found[-1]

    @WAYS
    async def test_the_system_prompt_is_read_for_objects(self, way):
        """It stands before the template, in each way."""
        llm = self.make_llm(system_prompt="Answer like a sailor.")
        await predict(llm, Song, SING, way, **SUNG)

        assert all("Answer like a sailor." in prompt for prompt in self.prompts_read())

    @WAYS
    async def test_from_text(self, llm, way):
        """The mode that reads JSON from text works as well."""
        if "stream" in way:
            since("0.14.22")
        llm.pydantic_program_mode = PydanticProgramMode.LLM

        assert Song(**SUNG) == (await predict(llm, Song, SING, way, **SUNG))[-1]

    @WAYS
    @pytest.mark.filterwarnings("ignore:The `json` method is deprecated")
    async def test_as_structured_llm(self, llm, way):
        """The wrapper answers chats with objects."""
        structured = llm.as_structured_llm(Song)
        messages = said(SING.format(**SUNG))
        if way == "whole":
            last = structured.chat(messages)
        elif way == "async":
            last = await structured.achat(messages)
        elif way == "stream":
            *_, last = structured.stream_chat(messages)
        else:
            last = [r async for r in await structured.astream_chat(messages)][-1]

        assert Song(**SUNG) == last.raw

    @pytest.mark.parametrize("way", ["whole", "async"])
    async def test_a_query_engine_that_answers_with_objects(self, llm, index, way):
        """``output_cls`` goes through the synthesizer."""
        engine = index.as_query_engine(llm=llm, output_cls=Builder, similarity_top_k=1)
        response = engine.query(QUESTION) if way == "whole" else await engine.aquery(QUESTION)

        assert isinstance(response.response, Builder)
        assert FACT in response.source_nodes[0].text


class Builder(BaseModel):
    """Who built something."""

    name: str
