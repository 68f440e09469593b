"""What goes over the wire: a request that is written and read is the same request."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rasd_integrations.config import SamplingParams
from rasd_integrations.errors import ConfigurationError, PromptError
from rasd_integrations.prompting import PromptHints
from rasd_integrations.response_format import Grammar, ToolUse
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.serving.reading import read_chat, read_completion
from rasd_integrations.serving.wire import write_chat, write_completion
from rasd_integrations.stats import Candidate, DecodingStats, Quote, Reward
from rasd_integrations.transfer import Confidence, transfer_rule
from rasd_integrations.types import Chunk

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"what": "é"}}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Hm."},
    {"role": "tool", "content": "Ada", "tool_call_id": "c1", "name": "find"},
]
CHUNKS = (
    Chunk("one", id="a", rank=0, metadata={"source": "s", "page": 3}),
    Chunk("two", rank=1, stored="two, as stored"),
)
EVERY = SamplingParams(
    temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, no_repeat_ngram_size=3, max_tokens=9,
    stop=("x", "y"), seed=4, ignore_eos=True, scored=True, drafting=False, use_generation_config=False,
    on_cut="raise", knowledge_transfer="mixture:0.75", top_logprobs=2,
)  # fmt: skip
REQUESTS = {
    "bare": Request(MESSAGES[:2]),
    "every option": Request(MESSAGES, EVERY),
    "lossless by name": Request(MESSAGES, SamplingParams(knowledge_transfer="none")),
    "a rule as an object": Request(MESSAGES, SamplingParams(knowledge_transfer=Confidence(0.5))),
    "schema": Request(MESSAGES, SamplingParams(grammar=Grammar.json_schema({"type": "array"}))),
    "regex": Request(MESSAGES, SamplingParams(grammar=Grammar("regex", "[a-z]+"))),
    "tools": Request(MESSAGES, tools=ToolUse.of([TOOL], "find", parallel=False, strict=True)),
    "free tools": Request(MESSAGES, tools=ToolUse.of([TOOL])),
    "hints": Request(
        MESSAGES,
        hints=PromptHints(
            question="Who?",
            search_query="who",
            chunks=CHUNKS,
            context="one two",
            filter={"page": 3},
        ),
    ),
    "documents, without the store": Request(MESSAGES, context="documents", searches=False),
}


def over_the_wire(body):
    return json.loads(json.dumps(body))


def plain(request):
    """Return the parts of a request that can be compared; where a hint was found is the server's own word."""
    hints = request.hints
    known = hints and (
        hints.question, hints.search_query, hints.chunks, hints.context, hints.filter, hints.rerender
    )  # fmt: skip
    rule = transfer_rule(request.params.knowledge_transfer)  # its name travels
    params = {
        n: getattr(request.params, n) for n in SamplingParams.__slots__ if n != "knowledge_transfer"
    }
    return request.prompt, params, rule, request.tools, known, request.context, request.searches


@pytest.mark.parametrize("name", REQUESTS)
def test_a_chat_request_arrives_as_it_was_sent(name):
    """Every option, message, tool, grammar and hint is read as it was written."""
    sent = REQUESTS[name]
    asked = read_chat(over_the_wire(write_chat(sent, {"enable_thinking": False})))
    assert plain(asked.requests[0]) == plain(sent)
    assert asked.template_kwargs == {"enable_thinking": False}


def test_a_completion_arrives_as_it_was_sent():
    """A plain text is sent as OpenAI's older endpoint takes it; a list of texts is several requests."""
    schema, pattern = Grammar.json_schema({"type": "array"}), Grammar("regex", "[a-z]+")
    for grammar in (None, schema, pattern):
        sent = Request("Once", replace(EVERY, grammar=grammar), PromptHints(chunks=CHUNKS))
        asked = read_completion(over_the_wire(write_completion(sent)))
        assert plain(asked.requests[0]) == plain(sent)
    asked = read_completion({"prompt": ["a", "b"], "n": 2, "seed": 5})
    assert asked.answers == 4
    assert [(r.prompt, r.params.seed) for r in asked.each()] == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]  # fmt: skip


def test_a_rule_without_a_name_is_refused():
    """A function cannot travel, so it is refused before anything is sent."""
    with pytest.raises(ConfigurationError, match="no name that a server knows"):
        write_chat(Request(MESSAGES, SamplingParams(knowledge_transfer=lambda p, q, s: p)), {})


ASK = {"messages": [{"role": "user", "content": "Hi"}]}
REFUSED = [
    ({"messages": None}, PromptError, "messages is None"),
    ({"messages": []}, PromptError, "one message or more"),
    ({"messages": ["Hi"]}, PromptError, r"messages\[0\] is 'Hi'"),
    ({"messages": [{"role": "user", "content": 3}]}, PromptError, r"messages\[0\].content is 3"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, PromptError, "image_url"),
    ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, PromptError, "the call 3"),
    ({**ASK, "temprature": 1}, ConfigurationError, "Did you mean 'temperature'"),
    ({**ASK, "temperature": "hot"}, ConfigurationError, "temperature is 'hot'"),
    ({**ASK, "frequency_penalty": 0.5}, ConfigurationError, "frequency_penalty is 0.5"),
    ({**ASK, "skip_special_tokens": False}, ConfigurationError, "skip_special_tokens is False"),
    ({**ASK, "ignore_eos": 3}, ConfigurationError, "ignore_eos is 3"),
    ({**ASK, "n": 0}, ConfigurationError, "n is 0"),
    ({**ASK, "n": 99}, ConfigurationError, "16 answers at most"),
    ({**ASK, "stream": "yes"}, ConfigurationError, "stream is 'yes'"),
    ({**ASK, "stop": 3}, ConfigurationError, "stop is 3"),
    ({**ASK, "tools": {}}, ConfigurationError, "tools is {}"),
    ({**ASK, "stream_options": {"usage": True}}, ConfigurationError, "Unknown option 'usage'"),
    ({**ASK, "rasd": ["x"]}, ConfigurationError, "rasd is"),
    ({**ASK, "rasd": {"chunk": []}}, ConfigurationError, "Did you mean 'chunks'"),
    ({**ASK, "rasd": {"chunks": [3]}}, ConfigurationError, r"chunks'\]\[0\] is a int"),
    ({**ASK, "rasd": {"chunks": [{"id": "a"}]}}, ConfigurationError, r"chunks\[0\].text is None"),
    ({**ASK, "rasd": {"grammar": "a+"}}, ConfigurationError, "rasd.grammar is 'a\\+'"),
    ({**ASK, "rasd": {"grammar": {"kind": "yacc", "source": "a"}}}, ConfigurationError, "kind is 'yacc'"),
    ({**ASK, "rasd": {"grammar": {"regex": "a"}}}, ConfigurationError, "Unknown option 'regex'"),
    ({**ASK, "rasd": {"context": "all"}}, ConfigurationError, "'prompt' or 'documents'"),
    ({**ASK, "rasd": {"store": True}}, ConfigurationError, "rasd.store is True"),
    ({**ASK, "rasd": {"grammar": {"kind": "regex", "source": "a"}}, "response_format": {"type": "json_object"}},
     ConfigurationError, "give one of them"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "error", "says"), REFUSED)
def test_what_cannot_be_read_is_refused_by_name(body, error, says):
    """A bad field, or one that would be ignored, is an error that names it."""
    with pytest.raises(error, match=says):
        read_chat(body)


@pytest.mark.parametrize(
    "harmless",
    [
        {"frequency_penalty": 0},
        {"logit_bias": {}},
        {"user": "u"},
        {"metadata": {"a": "b"}},
        {"skip_special_tokens": True},
        {"tools": None},
    ],
)
def test_fields_that_change_nothing_are_taken(harmless):
    """Clients send OpenAI's defaults and labels; they ask for nothing else."""
    assert plain(read_chat({**ASK, **harmless}).requests[0]) == plain(read_chat(ASK).requests[0])


def test_statistics_are_read_as_they_were_written():
    """All that an answer reports comes back as the same record."""
    stats = DecodingStats(
        target_steps=3, generated_tokens=5, faults=("a fault",), quotes=(Quote(0, 3, "one", "a", 2, {"p": 1}),),
        rewards=(Reward(0.5, True),), candidates=(Candidate("t", -0.5, -0.25),), tv_bound=0.5, off_reason="why",
    )  # fmt: skip
    stats.count("suffix", 4, 2)
    written = over_the_wire(stats.as_dict())
    assert DecodingStats.of({**written, "of a later version": 1}) == stats
