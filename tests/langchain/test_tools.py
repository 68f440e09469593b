"""Tools: every form in which LangChain says them, and what the engine makes of each."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import pytest
from assistant import GREETING, standard_model
from langchain_core.caches import InMemoryCache
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableBinding
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as BaseModelV1
from scripted import scripted_model
from typing_extensions import TypedDict

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain import RASDLLM, ChatRASD

ASSISTANT = functools.cache(standard_model)


@pytest.fixture
def real():
    """Return a model over the real engine, which runs a scripted assistant."""
    return ChatRASD.from_model(*ASSISTANT(), max_tokens=200)


def told(llm):
    """Return what the engine was told of tools by the latest call."""
    return llm._rasd.calls[-1].tools


# --- what a tool may be ---


@tool
def decorated(city: str, days: int = 1) -> str:
    """Get the weather."""
    return f"{city} {days}"


def plain(city: str, days: int = 1) -> str:
    """Get the weather.

    Args:
        city: Where.
        days: How long.
    """
    return f"{city} {days}"


class Pydantic(BaseModel):
    """Get the weather."""

    city: str
    days: int = Field(default=1, ge=1)


class PydanticV1(BaseModelV1):
    """Get the weather."""

    city: str
    days: int = 1


class Typed(TypedDict):
    """Get the weather."""

    city: str
    days: Annotated[int, 1, "How long."]


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (decorated, "decorated"),
        (plain, "plain"),
        (Pydantic, "Pydantic"),
        (PydanticV1, "PydanticV1"),
        (Typed, "Typed"),
        ({"title": "titled", "description": "Get the weather.", **SCHEMA}, "titled"),
        ({"name": "bare", "description": "Get the weather.", "parameters": SCHEMA}, "bare"),
        ({"name": "claude", "description": "Get the weather.", "input_schema": SCHEMA}, "claude"),
        (
            {
                "type": "function",
                "function": {
                    "name": "openai",
                    "description": "Get the weather.",
                    "parameters": SCHEMA,
                },
            },
            "openai",
        ),
    ],
)
def test_every_kind_of_tool_reaches_the_engine_in_one_form(llm, given, name):
    """Bound or passed with the call, a tool is OpenAI's dict by the time the template sees it."""
    bound = llm.bind_tools([given])
    assert isinstance(bound, RunnableBinding)
    bound.invoke("Hi")
    by_binding = told(llm)
    llm.invoke("Hi", tools=[given])
    assert by_binding == told(llm)
    (function,) = by_binding.functions
    assert (name, "Get the weather.") == (function["name"], function["description"].split("\n")[0])
    assert {"type": "string"} == {
        k: v for k, v in function["parameters"]["properties"]["city"].items() if k == "type"
    }
    assert "city" in function["parameters"]["required"]


class Tree(BaseModel):
    """A tree."""

    name: str
    children: list[Tree] = []


@tool
def plant(tree: Tree) -> str:
    """Plant a tree."""
    return tree.name


def test_a_recursive_schema_keeps_its_references(llm):
    """LangChain writes references out as far as it goes, and leaves the rest open to any value."""
    llm.bind_tools([Tree, plant]).invoke("Hi")
    whole, argument = (f["parameters"] for f in told(llm).functions)
    assert {"$ref": "#/$defs/Tree"} == whole["$defs"]["Tree"]["properties"]["children"]["items"]
    assert {"$ref": "#/$defs/Tree"} == argument["properties"]["tree"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "Unsupported function"),
        ({"type": "object", "properties": {}}, "title"),
        ({"type": "web_search"}, "web_search"),
    ],
)
def test_what_is_no_tool_is_refused(llm, given, message):
    """A provider's own search engine runs on no local model."""
    with pytest.raises(ValueError, match=message):
        llm.bind_tools([given]).invoke("Hi")
    assert [] == llm._rasd.calls


def test_two_tools_of_one_name_are_refused(llm):
    """A call could not say which it means."""
    with pytest.raises(ConfigurationError, match="decorated"):
        llm.bind_tools([decorated, decorated]).invoke("Hi")


def test_no_tools_are_no_tools(llm):
    """Agents bind an empty list where they have none."""
    llm.bind_tools([]).invoke("Hi")
    assert None is told(llm)


# --- tool_choice and its neighbours ---


@pytest.mark.parametrize(
    ("tool_choice", "choice"),
    [
        (None, "auto"),
        (False, "auto"),
        ("auto", "auto"),
        ({"type": "auto"}, "auto"),
        ("none", "none"),
        ("any", "required"),
        ("required", "required"),
        (True, "required"),
        ({"type": "any"}, "required"),
        ("plain", "plain"),
        ({"type": "function", "function": {"name": "plain"}}, "plain"),
        ({"type": "tool", "name": "plain"}, "plain"),
    ],
)
def test_every_form_of_tool_choice(llm, tool_choice, choice):
    """OpenAI's, Anthropic's and LangChain's ways to say it mean one of four things."""
    llm.bind_tools([decorated, plain], tool_choice=tool_choice).invoke("Hi")
    assert choice == told(llm).choice
    llm.invoke("Hi", tools=[decorated, plain], tool_choice=tool_choice)
    assert choice == told(llm).choice


@pytest.mark.parametrize("tool_choice", ["plian", {"type": "function"}, 3, ""])
def test_a_choice_that_cannot_be_met_is_refused(llm, tool_choice):
    """A tool that is not there, and what is no choice at all."""
    with pytest.raises(ConfigurationError, match="tool_choice"):
        llm.bind_tools([plain], tool_choice=tool_choice).invoke("Hi")


def test_strict_and_parallel_are_heard(llm):
    """`strict` closes the schemas, and may be said by the tool itself; parallel calls may be turned off."""
    llm.bind_tools([plain], strict=True, parallel_tool_calls=False).invoke("Hi")
    assert (True, False) == (told(llm).strict, told(llm).parallel)
    assert False is told(llm).functions[0]["parameters"]["additionalProperties"]
    own = {"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}
    llm.bind_tools([own]).invoke("Hi")
    assert (True, True) == (told(llm).strict, told(llm).parallel)
    llm.bind_tools([plain]).invoke("Hi", strict=True)
    assert True is told(llm).strict


def test_strict_is_heard_of_tools_in_openais_form(llm):
    """Fault 13: LangChain leaves such a tool as it is; strictness is ours to note, on a copy of the tool."""
    given = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    llm.bind_tools([given], strict=True).invoke("Hi")
    assert True is told(llm).strict
    llm.bind_tools([{**given["function"]}], strict=True).invoke("Hi")
    assert True is told(llm).strict
    llm.bind_tools([given], strict=False).invoke("Hi")
    assert False is told(llm).strict
    assert {"type": "function", "function": {"name": "f", "parameters": SCHEMA}} == given


def test_further_options_are_bound_with_the_tools(llm):
    """What goes for a call goes for a binding; nothing is dropped."""
    llm.bind_tools([plain], temperature=0.5, response_format={"type": "json_object"}).invoke("Hi")
    params = llm._rasd.calls[-1].params
    assert (0.5, True) == (params.temperature, params.grammar is not None)
    with pytest.raises(ConfigurationError, match="'temperature'"):
        llm.bind_tools([plain], temprature=0.5).invoke("Hi")


def test_a_cache_tells_tools_apart():
    """An answer with tools is none to the same prompt without them, or with a choice of its own."""
    written = '<tool_call>\n{"name": "plain", "arguments": {"city": "Rome"}}\n</tool_call>'
    parts = scripted_model(lambda prompt: written)
    llm = ChatRASD.from_model(*parts, cache=InMemoryCache(), max_tokens=200)
    bound = llm.bind_tools([plain])
    first, again = bound.invoke("Hi"), bound.invoke("Hi")
    assert [{"city": "Rome"}] == [c["args"] for c in first.tool_calls]
    assert first.tool_calls == again.tool_calls  # the same ids: it was not asked again
    assert [] == llm.bind_tools([plain], tool_choice="none").invoke("Hi").tool_calls
    assert [] == llm.invoke("Hi").tool_calls
    forced = llm.bind_tools([decorated], tool_choice="any").invoke("Hi")
    assert "decorated" == forced.tool_calls[0]["name"]


def test_a_plain_text_model_refuses_tools():
    """Only a chat template can tell the model of them."""
    llm = RASDLLM.from_model(*ASSISTANT())
    with pytest.raises(ConfigurationError, match="messages"):
        llm.invoke("Hi", tools=[plain])


# --- on the real engine ---


@pytest.mark.parametrize("template", ["hermes", "plain", "strict"])
def test_a_free_model_calls_when_it_should(template):
    """A question for a tool becomes a call, a greeting becomes text; the prompt tells of the tools."""
    llm = ChatRASD.from_model(*standard_model(template), max_tokens=200).bind_tools([decorated])
    answer = llm.invoke("What is the weather in Paris?")
    assert [{"city": "Paris"}] == [c["args"] for c in answer.tool_calls]
    assert ("", "tool_calls") == (answer.text, answer.response_metadata["finish_reason"])
    greeting = llm.invoke("Good morning!")
    assert ([], GREETING) == (greeting.tool_calls, greeting.text)


@pytest.mark.parametrize("choice", ["any", "decorated"])
@pytest.mark.parametrize("template", ["hermes", "plain", "strict"])
def test_a_forced_model_calls_whatever_it_would_say(template, choice):
    """A model that only ever greets is held to a call whose arguments fit the schema."""
    model, tokenizer = scripted_model(lambda prompt: "Good morning!", template=template)
    llm = ChatRASD.from_model(model, tokenizer, max_tokens=200)
    bound = llm.bind_tools([decorated], tool_choice=choice)
    (call,) = bound.invoke("Hello!").tool_calls
    assert "decorated" == call["name"]
    assert isinstance(decorated.args_schema(**call["args"]).city, str)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2),
        ({"parallel_tool_calls": False}, 1),
        ({"tool_choice": "any"}, 1),
        ({"tool_choice": "any", "parallel_tool_calls": True}, 2),
        ({"tool_choice": "plain", "parallel_tool_calls": True}, 2),
    ],
)
def test_parallel_calls_may_be_wanted_or_not(options, count):
    """A free model makes as many calls as it likes, one that must call makes one, unless told otherwise."""
    call = '<tool_call>\n{"name": "plain", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
    llm = ChatRASD.from_model(*scripted_model(lambda prompt: f"{call}\n{call}"), max_tokens=300)
    answer = llm.bind_tools([plain], **options).invoke("Hi")
    assert [{"city": "Rome", "days": 2}] * count == [c["args"] for c in answer.tool_calls]


def test_none_hides_the_tools(real):
    """With "none" the model reads nothing of them and cannot call."""
    question = [HumanMessage("What is the weather in Paris?")]
    hidden = real.bind_tools([decorated], tool_choice="none").invoke(question)
    assert hidden.tool_calls == []
    assert hidden.usage_metadata["input_tokens"] == real.get_num_tokens_from_messages(question)


def test_tokens_are_counted_with_tools(real):
    """The count is what the engine reads, to the token."""
    question = [HumanMessage("What is the weather in Paris?")]
    used: Any = real.bind_tools([decorated]).invoke(question).usage_metadata
    assert used["input_tokens"] == real.get_num_tokens_from_messages(question, tools=[decorated])
