"""Log-probabilities where LlamaIndex's OpenAI class puts them: ``logprobs`` of responses."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import USER
from llama_index.core.base.llms.types import LogProb
from tiny import EOS, tiny_llama, tiny_tokenizer

from rasd_integrations.llama_index import RASDLLM

ASKED = {"logprobs": True, "top_logprobs": 2}


@pytest.fixture(scope="module")
def llm():
    """A small model whose calls ask for two alternatives."""
    return RASDLLM.from_model(tiny_llama(), tiny_tokenizer(), max_tokens=12, memory=False, **ASKED)


async def responses(llm, **options):
    """Return what each endpoint says, of a stream the last response."""
    chats, texts = [llm.chat(USER, **options)], [llm.complete("Hi", **options)]
    chats.append(await llm.achat(USER, **options))
    texts.append(await llm.acomplete("Hi", **options))
    chats.append([*llm.stream_chat(USER, **options)][-1])
    texts.append([*llm.stream_complete("Hi", **options)][-1])
    chats.append([r async for r in await llm.astream_chat(USER, **options)][-1])
    texts.append([r async for r in await llm.astream_complete("Hi", **options)][-1])
    return chats, texts


async def test_every_endpoint_has_the_alternatives_of_each_token(llm):
    """One list a token, most likely first; the greedy answer is the first of each."""
    for same in await responses(llm):
        for response in same:
            found = response.logprobs
            assert {type(one) for token in found for one in token} == {LogProb}
            assert {len(token) for token in found} == {2}
            assert len(found) == response.raw["usage"]["completion_tokens"]
            assert all(one.logprob >= other.logprob for one, other in found)
            said = bytes(byte for token in found for byte in token[0].bytes)
            text = getattr(response, "text", None) or response.message.content
            end = tiny_tokenizer().convert_ids_to_tokens(EOS)
            assert said.decode(errors="replace").removesuffix(end) == text
            content = response.raw["logprobs"]["content"]
            assert [one["token"] for one in content] == [token[0].token for token in found]


async def test_without_alternatives_each_list_is_the_token_itself(llm):
    """So no token is left out."""
    for same in await responses(llm, top_logprobs=0):
        for response in same:
            content = response.raw["logprobs"]["content"]
            assert [[one["logprob"]] for one in content] == [
                [one.logprob for one in token] for token in response.logprobs
            ]


async def test_unasked_there_is_nothing(llm):
    """Neither in the response nor in ``raw``."""
    for same in await responses(llm, logprobs=False):
        assert [(r.logprobs, "logprobs" in r.raw) for r in same] == [(None, False)] * 4
