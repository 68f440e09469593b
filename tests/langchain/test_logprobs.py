"""Log-probabilities where langchain-openai puts them: in the metadata of messages, chunks and generations."""

from __future__ import annotations

from functools import reduce
from operator import add
from types import SimpleNamespace

import pytest
from fakes_langchain import FakeRASD
from fakes_rasd import ENGINE
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.langchain import RASDLLM, ChatRASD
from rasd_integrations.types import TextDelta, TokenLogprob

ASKED = {"logprobs": True, "top_logprobs": 2}
OPTIONS = {"max_tokens": 12, "memory": False}
TOKENIZER = tiny_tokenizer()


def made(kind, **options):
    return kind.from_model(tiny_llama(), TOKENIZER, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def entries():
    """The log-probabilities of the chat model's answer."""
    return made(ChatRASD).invoke("Hi", **ASKED).response_metadata["logprobs"]["content"]


def check(entries, text, top=2):
    """Assert that they are OpenAI's, of tokens that join to ``text``."""
    keys = ("token", "logprob", "bytes")
    assert {tuple(one) for one in entries} == {(*keys, "top_logprobs")}
    assert {tuple(other) for one in entries for other in one["top_logprobs"]} <= {keys}
    assert {len(one["top_logprobs"]) for one in entries} == {top}
    data = bytes(byte for one in entries for byte in one["bytes"]).decode(errors="replace")
    assert data.removesuffix(TOKENIZER.eos_token) == text


def near(entries):
    """Return what equals ``entries`` but for the rounding, which drafts and cached prompts change."""
    return [
        {
            **one,
            "logprob": pytest.approx(one["logprob"], abs=1e-4),
            **({"top_logprobs": near(one["top_logprobs"])} if "top_logprobs" in one else {}),
        }
        for one in entries
    ]


def test_a_message_has_them(entries):
    """One entry a token, of the answer's own probabilities."""
    answer = made(ChatRASD, **ASKED).invoke("Hi")
    assert answer.response_metadata["logprobs"] == {"content": near(entries)}
    assert len(entries) == answer.usage_metadata["output_tokens"]
    check(entries, answer.text)


@pytest.mark.parametrize("version", [None, "v1"])
def test_chunks_have_those_of_their_tokens(entries, version):
    """Joined they are the message's."""
    llm = made(ChatRASD, output_version=version)
    chunks = list(llm.stream("Hi", **ASKED))
    whole = reduce(add, chunks)
    assert whole.response_metadata["logprobs"]["content"] == near(entries)
    assert len([c for c in chunks if "logprobs" in c.response_metadata]) > 1
    check(whole.response_metadata["logprobs"]["content"], whole.text)


async def test_asynchronous_calls_have_them(entries):
    """Whole and streamed."""
    llm = made(ChatRASD, **ASKED)
    answer = await llm.ainvoke("Hi")
    chunks = [chunk async for chunk in llm.astream("Hi")]
    for message in (answer, reduce(add, chunks)):
        found = message.response_metadata["logprobs"]["content"]
        assert [one["token"] for one in found] == [one["token"] for one in entries]


def test_callbacks_see_them(entries):
    """With the chunk and in the result, as langchain-openai's ``generation_info``."""
    seen = []

    class Report(BaseCallbackHandler):
        def on_llm_new_token(self, token, *, chunk=None, **kwargs):
            seen.extend((chunk.generation_info or {}).get("logprobs", {}).get("content", ()))

        def on_llm_end(self, response, **kwargs):
            seen.append(response.generations[0][0].generation_info["logprobs"]["content"])

    made(ChatRASD, streaming=True).invoke("Hi", {"callbacks": [Report()]}, **ASKED)
    *streamed, last = seen
    tokens = [one["token"] for one in entries]
    assert [one["token"] for one in streamed] == [one["token"] for one in last] == tokens


def test_completions_have_them():
    """In the generation's own information, whole and in the pieces of a stream."""
    llm = made(RASDLLM, **ASKED)
    (answer,) = llm.generate(["Hi"]).generations[0]
    check(answer.generation_info["logprobs"]["content"], answer.text)
    pieces = list(llm._stream("Hi"))
    found = [
        e for p in pieces for e in (p.generation_info or {}).get("logprobs", {}).get("content", ())
    ]
    check(found, answer.text)
    assert len(pieces) > 2


def test_no_alternatives_unless_asked_for():
    """``logprobs`` alone is the token's own; unasked there is nothing."""
    llm = made(ChatRASD, logprobs=True)
    answer = llm.invoke("Hi")
    check(answer.response_metadata["logprobs"]["content"], answer.text, top=0)
    assert "logprobs" not in llm.invoke("Hi", logprobs=False).response_metadata
    assert "logprobs" not in made(RASDLLM).generate(["Hi"]).generations[0][0].generation_info


@pytest.mark.parametrize("kind", [ChatRASD, RASDLLM])
def test_tokens_without_text_are_not_lost(kind, monkeypatch):
    """Thoughts, held-back bytes, and what a piece with text and thoughts says."""
    one, two, three = (TokenLogprob(i, -float(i)) for i in (1, 2, 3))
    pieces = [
        TextDelta("", (1,), logprobs=(one,)),
        TextDelta("said", (2,), reasoning="thought", logprobs=(two,)),
        TextDelta("", (3,), logprobs=(three,)),
    ]
    monkeypatch.setattr(ENGINE, FakeRASD)
    monkeypatch.setattr(FakeRASD, "tokenizer", TOKENIZER, raising=False)
    llm = kind(model="org/one")
    llm._rasd.answer = lambda prompt: SimpleNamespace(
        pieces=lambda: iter(pieces), end="stop", reasoning=""
    )
    asked = [HumanMessage("Hi")] if kind is ChatRASD else "Hi"
    (found,) = llm.generate([asked]).generations[0]
    content = found.generation_info["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [-1, -2, -3]
