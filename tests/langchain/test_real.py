"""Tools and structured output with a real small model, drafting on: SmolLM2 knows no tools and little JSON."""

from __future__ import annotations

from datetime import date
from enum import Enum
from typing import Annotated

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from smollm2 import fresh_smollm2

from rasd_integrations.langchain import ChatRASD

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def llm():
    kept = fresh_smollm2()
    with ChatRASD(model=kept.name, max_tokens=600) as llm:
        yield llm.load()


# A small model under greedy decoding repeats itself for ever where a text may be of any length.
Text = Annotated[str, Field(max_length=30)]


class Priority(Enum):
    """How soon."""

    LOW = "low"
    HIGH = "high"


class Address(BaseModel):
    """Where to."""

    street: Text
    city: Text
    country: Text | None = None


class Part(BaseModel):
    """One thing."""

    name: Text
    quantity: Annotated[int, Field(ge=1, le=99)]


class Order(BaseModel):
    """An order, as the office files it."""

    customer: Text
    email: Text | None
    age: Annotated[int, Field(ge=18, le=120)] | None
    address: Address
    parts: Annotated[list[Part], Field(min_length=1, max_length=3)]
    priority: Priority
    channel: Annotated[str, Field(pattern="^(phone|shop|web)$")]
    gift: bool
    total: Annotated[float, Field(ge=0, le=10_000)]
    notes: Annotated[list[Text], Field(max_length=2)] = []
    due: date
    courier: Text | None = None


ORDERS = (
    "Ada would like two brass lamps for a theatre in Oslo, urgently.",
    "Chen asks for 12 bicycle bells for a school in Kyoto, by phone.",
    "Fatima wants a violin case and 3 bows sent to Vienna, as a gift.",
)


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
@pytest.mark.parametrize("text", ORDERS)
def test_an_order_of_twelve_fields_is_valid(llm, method, text):
    """Nested objects, lists, enums, patterns, limits, dates and optionals, out of a model of 135M weights."""
    chain = llm.with_structured_output(Order, method=method, include_raw=True)
    answer = chain.invoke([HumanMessage(f"{text} Fill in the order form as JSON.")])
    assert (None, Order) == (answer["parsing_error"], type(answer["parsed"]))
    told = answer["raw"].response_metadata["rasd"]
    assert told["drafters"]["grammar"]["accepted"] > 0
    assert told["mean_acceptance_length"] > 1


@tool
def weather(city: str, days: int) -> str:
    """Get the weather of the coming days in a city."""
    return f"{city}: rain for {days} days."


async def test_a_forced_call_of_a_model_without_tools_is_valid(llm):
    """A template that knows no tools gets the package's own prompt; the call fits the tool's schema."""
    bound = llm.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    question = "How will the weather be in Paris for the next 3 days?"
    answer = await bound.ainvoke(question)
    (call,) = answer.tool_calls
    assert "rain" in weather.invoke(call).content
    streamed = [f async for c in bound.astream(question) for f in c.tool_call_chunks]
    assert "".join(f["args"] for f in streamed) == "".join(f["args"] for f in streamed if f["index"] == 0)  # fmt: skip
    assert answer.response_metadata["finish_reason"] == "tool_calls"
