"""One answer, however it is called: streams, batches and their asynchronous forms on the real engine."""

from __future__ import annotations

import asyncio
import functools
from functools import reduce

import pytest
from assistant import standard_model
from langchain_core.tools import tool
from scripted import scripted_model
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.langchain import RASDLLM, ChatRASD

STORY = "Ada wrote it. 🎉 Noël in Zürich — 你好, said Łódź. 🏳️‍🌈 STOP here. And so on."
CALLS = (
    "Two calls. 你好\n"
    '<tool_call>\n{"name": "look", "arguments": {"city": "Zürich", "sky": "☔ \\"wet\\""}}\n</tool_call>\n'
    '<tool_call>\n{"name": "look", "arguments": {"city": "Łódź", "sky": "☀️"}}\n</tool_call>'
)


@tool
def look(city: str, sky: str) -> str:
    """Look at the sky of a city."""
    return city + sky


@functools.cache
def scripted(text):
    return scripted_model(lambda prompt: text)


def merged(chunks):
    return reduce(lambda a, b: a + b, chunks)


async def answers(llm, prompt):
    """Return the answer to ``prompt`` by each way of calling."""
    return {
        "invoke": llm.invoke(prompt),
        "stream": merged(llm.stream(prompt)),
        "ainvoke": await llm.ainvoke(prompt),
        "astream": merged([c async for c in llm.astream(prompt)]),
        "batch": llm.batch([prompt, "Another."])[0],
        "abatch": (await llm.abatch([prompt, "Another."]))[0],
    }


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["auto", None])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, STORY),
        (["STOP"], STORY[: STORY.index("STOP")]),
        (["你好, said"], STORY[: STORY.index("你好")]),
        (["好"], STORY[: STORY.index("好")]),
        (["🏳️‍🌈 S"], STORY[: STORY.index("🏳️")]),
        (["never", "Ada wrote it"], ""),
        (["STOP there"], STORY),
    ],
)
async def test_text_is_the_same_by_every_way(drafter, stop, expected):
    """Characters of many bytes stay whole, and a stop string that spans tokens is never half sent."""
    llm = ChatRASD.from_model(*scripted(STORY), max_tokens=300, drafter=drafter, stop=stop)
    found = await answers(llm, "Tell me.")
    assert {expected} == {m.text for m in found.values()}
    assert {"stop"} == {m.response_metadata["finish_reason"] for m in found.values()}
    pieces = [c.text for c in llm.stream("Tell me.")]
    assert expected == "".join(pieces)
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.slow
@pytest.mark.parametrize("version", [None, "v1"])
async def test_calls_are_the_same_by_every_way(version):
    """Text before the calls, two calls, characters of many bytes and quotes inside their arguments."""
    model = ChatRASD.from_model(*scripted(CALLS), max_tokens=400, output_version=version)
    for choice in (None, "any"):
        found = await answers(model.bind_tools([look], tool_choice=choice), "Look.")
        said = {m.text.strip() for m in found.values()}
        calls = [[(c["name"], c["args"]) for c in m.tool_calls] for m in found.values()]
        expected = [
            ("look", {"city": "Zürich", "sky": '☔ "wet"'}),
            ("look", {"city": "Łódź", "sky": "☀️"}),
        ]
        assert [calls[0]] * 6 == calls
        assert [] == [m.invalid_tool_calls for m in found.values() if m.invalid_tool_calls]
        if choice is None:
            assert ({"Two calls. 你好"}, expected) == (said, calls[0])
        ids = [c["id"] for m in found.values() for c in m.tool_calls]
        assert len(set(ids)) == len(ids)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 11}])
@pytest.mark.parametrize("kind", [ChatRASD, RASDLLM])
async def test_a_batch_says_what_its_prompts_say_alone(kind, sampling):
    """Answers made at the same time are those made one after another."""
    llm = kind.from_model(tiny_llama(), tiny_tokenizer(), max_tokens=20, **sampling)
    prompts = [f"Tell me of the number {n}, please. " * (1 + n % 3) for n in range(9)]

    def text(answer):
        return answer if isinstance(answer, str) else answer.text

    alone = [text(llm.invoke(prompt)) for prompt in prompts]
    assert len(set(alone)) > 3
    assert alone == [text(a) for a in llm.batch(prompts)]
    assert alone == [text(a) for a in await llm.abatch(prompts)]
    assert alone == [text(a) for a in llm.batch(prompts, config={"max_concurrency": 2})]
    together = await asyncio.gather(*(joined_stream(llm, prompt) for prompt in prompts))
    assert alone == together


async def joined_stream(llm, prompt):
    parts = [part async for part in llm.astream(prompt)]
    return "".join(p if isinstance(p, str) else p.text for p in parts)


async def test_structured_answers_and_calls_at_the_same_time():
    """Each of many answers keeps its own grammar, tools and parser."""
    llm = ChatRASD.from_model(*standard_model(), max_tokens=200)
    free, forced = llm.bind_tools([look]), llm.bind_tools([look], tool_choice="look")
    held = llm.with_structured_output(look.args_schema, method="json_schema", include_raw=True)
    cities = ("Paris", "Rome", "Bonn", "Oslo")

    async def ask(city):
        question = f"How is the sky in the city of {city}?"
        return await asyncio.gather(*(chain.ainvoke(question) for chain in (free, forced, held)))

    for city, (called, made, parsed) in zip(
        cities, await asyncio.gather(*map(ask, cities)), strict=True
    ):
        assert [city] * 2 == [m.tool_calls[0]["args"]["city"] for m in (called, made)]
        assert ("", None) == (called.text, parsed["parsing_error"])
        assert isinstance(parsed["parsed"].city, str)
