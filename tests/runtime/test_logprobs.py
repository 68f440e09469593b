"""Every piece of an answer carries the log-probabilities of its own tokens, however the answer is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
from assistant import standard_model
from fakes_prompting import human
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, Grammar, SamplingParams, SpeculationConfig
from rasd_integrations.response_format import ToolUse
from rasd_integrations.runtime.pipeline import Request, joined

PARAMS = SamplingParams(max_tokens=40, ignore_eos=True, top_logprobs=2)
CHAT = [human("Tell me of the quick brown fox, the quick brown fox.")]
TOOL = {
    "type": "function",
    "function": {
        "name": "population",
        "description": "Return the number of inhabitants of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def made(parts=None):
    speculation = SpeculationConfig(num_draft_tokens=6)
    model, tokenizer = parts or (tiny_llama(), tiny_tokenizer())
    return RASD.from_model(model, tokenizer, memory=False, speculation=speculation)


@pytest.fixture(scope="module")
def plain():
    """The answer without anything special."""
    return made().generate(CHAT, PARAMS)


def check(deltas):
    """Assert that each piece has its own; return the answer."""
    for delta in deltas:
        assert [one.token_id for one in delta.logprobs] == [*delta.token_ids]
    answer = joined(deltas)
    assert [one.token_id for one in answer.logprobs] == [*answer.token_ids]
    assert len(answer.logprobs) == answer.stats.generated_tokens > 0
    return answer


def test_plain_answers(plain):
    """All tokens have one, whole or streamed."""
    answer = check(list(made().stream(CHAT, PARAMS)))
    assert [one.logprob for one in answer.logprobs] == [one.logprob for one in plain.logprobs]
    assert len(plain.logprobs) == 40


def test_an_answer_cut_at_a_stop_string(plain):
    """Tokens behind the cut are among the answer's, and have theirs."""
    stop = plain.text[10:12]
    answer = check(list(made().stream(CHAT, replace(PARAMS, stop=(stop,)))))
    assert answer.finish_reason == "stop"
    assert answer.text == plain.text[: plain.text.index(stop)]


def test_an_answer_cut_at_a_stop_token():
    """It ends the answer within a step."""
    model, tokenizer = standard_model()
    params = replace(PARAMS, ignore_eos=True, stop=(tokenizer.eos_token,))
    answer = check(list(made((model, tokenizer)).stream(CHAT, params)))
    assert answer.finish_reason == "stop"


def test_an_answer_that_is_split_by_tokens(plain):
    """Where steps are recorded each piece is one token."""
    steps = []
    request = Request(CHAT, PARAMS, on_step=steps.append)
    deltas = list(made().stream(request))
    answer = check(deltas)
    assert {len(delta.token_ids) for delta in deltas if delta.token_ids} == {1}
    assert max(len(step.token_ids) for step in steps) > 2
    assert [one.logprob for one in answer.logprobs] == pytest.approx(
        [one.logprob for one in plain.logprobs], abs=1e-4
    )


def test_an_answer_with_tools():
    """The tokens of a call have theirs, as OpenAI's have."""
    asked = [human("How many live in Oslo?")]
    tools = ToolUse(tools=(TOOL,), choice="required")
    params = SamplingParams(max_tokens=100, top_logprobs=1)
    answer = check(list(made(standard_model()).stream(Request(asked, params, tools=tools))))
    assert [call.name for call in answer.tool_calls] == ["population"]


def test_an_answer_with_a_grammar():
    """Forced tokens are certain."""
    grammar = Grammar.json_schema({"enum": ["yes", "no"]})
    params = SamplingParams(max_tokens=40, top_logprobs=2, grammar=grammar)
    answer = check(list(made().stream(CHAT, params)))
    assert answer.text in ('"yes"', '"no"')
    assert answer.logprobs[2].logprob == 0
    assert answer.logprobs[1].logprob < 0
