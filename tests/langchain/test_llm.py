"""RASDLLM: raw prompts in, text out, with usage, tokens for callbacks and one path for all calls."""

from __future__ import annotations

import pytest
from fakes_langchain import ANSWER
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain import RASDLLM

pytestmark = pytest.mark.usefixtures("fake_engine")


@pytest.fixture
def llm():
    return RASDLLM(model="org/one")


def test_the_prompt_goes_to_the_model_as_given(llm):
    """No chat template, no trimming: special characters are data."""
    llm.invoke("  Q: <|im_end|>\n")
    assert "  Q: <|im_end|>\n" == llm._rasd.calls[0].prompt


async def test_all_prompts_of_a_call_are_answered_with_their_usage(llm):
    """`generate` takes many prompts: each answer has its own usage, and the result has the sum."""
    for result in (llm.generate(["one", "two words"]), await llm.agenerate(["one", "two words"])):
        usages = [g[0].generation_info["token_usage"]["prompt_tokens"] for g in result.generations]
        assert [1, 2] == usages
        assert {
            "token_usage": {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9},
            "model_name": "org/one",
        } == result.llm_output
        assert "suffix" in result.generations[1][0].generation_info["rasd"]["drafters"]


class Tokens(BaseCallbackHandler):
    """Collects reported tokens and the results."""

    def __init__(self):
        self.words, self.results = [], []

    def on_llm_new_token(self, token, **kwargs):
        self.words.append(token)

    def on_llm_end(self, response, **kwargs):
        self.results.append(response)


async def test_a_stream_reports_its_tokens_and_ends_with_its_metadata(llm):
    """LangChain leaves the tokens of a plain LLM's stream to the model."""
    for astream in (False, True):
        tokens = Tokens()
        config = {"callbacks": [tokens]}
        if astream:
            [_ async for _ in llm.astream("Hi", config=config)]
        else:
            list(llm.stream("Hi", config=config))
        assert ["Ada", " wrote", " it.", ""] == tokens.words
        info = tokens.results[0].generations[0][0].generation_info
        assert {"model_name", "finish_reason", "token_usage", "rasd"} == set(info)
        assert 4 == info["token_usage"]["total_tokens"]


def test_an_invoked_answer_reports_no_tokens(llm):
    """Tokens are a stream's."""
    tokens = Tokens()
    llm.invoke("Hi", config={"callbacks": [tokens]})
    assert [] == tokens.words


def test_options_of_a_call_are_honoured_or_refused(llm):
    """The same rules as for the chat model."""
    llm.invoke("Hi", max_tokens=2, stop=["X"])
    assert (2, ("X",)) == (llm._rasd.calls[0].params.max_tokens, llm._rasd.calls[0].params.stop)
    with pytest.raises(ConfigurationError, match="'max_tokens'"):
        llm.invoke("Hi", max_new_tokens=2)
    with pytest.raises(ConfigurationError, match="functions"):
        llm.invoke("Hi", functions=[{"name": "f"}])


def test_two_models_never_share_a_cached_answer():
    """The cache key names the model."""
    cache = InMemoryCache()
    one, two = RASDLLM(model="org/one", cache=cache), RASDLLM(model="org/two", cache=cache)
    two._rasd.answer = lambda prompt: "two"
    assert [ANSWER, "two", ANSWER] == [m.invoke("Hi") for m in (one, two, one)]


async def test_cached_prompts_of_a_batch_are_not_decoded_again(llm):
    """Only the prompts that the cache does not know reach the engine."""
    llm = RASDLLM(model="org/one", cache=InMemoryCache())
    llm.invoke("Hi")
    llm.generate(["Hi", "Ho"])
    await llm.agenerate(["Hi", "Ho", "Hu"])
    assert ["Hi", "Ho", "Hu"] == [call.prompt for call in llm._rasd.calls]


def test_tokens_are_counted_by_the_models_own_tokenizer(llm):
    """LangChain's default would load GPT-2 from the hub."""
    assert llm.get_num_tokens("one two three") == 3


def test_tracing_parameters_name_provider_and_model(llm):
    """Traces show what was asked of which model."""
    params = llm._get_ls_params(stop=["X"])
    assert ("rasd", "llm", "org/one", ["X"]) == (
        params["ls_provider"],
        params["ls_model_type"],
        params["ls_model_name"],
        params["ls_stop"],
    )
