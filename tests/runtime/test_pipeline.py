"""One answer with tools, grammars and per-call options: from messages to text, calls and thoughts."""

from __future__ import annotations

import json

import pytest
from assistant import standard_model
from scripted import scripted_model
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations import (
    RASD,
    ConfigurationError,
    Grammar,
    SamplingParams,
    SpeculationConfig,
    ToolUse,
)
from rasd_integrations.prompting import PromptPlan
from rasd_integrations.runtime.pipeline import Request, draft_context
from rasd_integrations.text.prompt.template import ChatTemplate

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
QUESTION = [{"role": "user", "content": "Please add 3 and 4 with the tool."}]
GREETING = [{"role": "user", "content": "Hello!"}]
PARAMS = SamplingParams(max_tokens=200)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def saying(answer, **options):
    return RASD.from_model(*scripted_model(lambda prompt: answer), **options)


@pytest.mark.parametrize("template", ["hermes", "plain", "strict"])
def test_a_tool_is_seen_called_and_answered(template):
    """The loop of an agent, with templates that know tools, know none, and refuse roles."""
    rasd = RASD.from_model(*standard_model(template))
    tools = ToolUse.of([ADD])
    first = rasd.generate(QUESTION, PARAMS, tools=tools)
    (call,) = first.tool_calls
    assert (first.text, first.finish_reason, call.name) == ("", "tool_calls", "add")
    assert json.loads(call.arguments) == {"a": 3, "b": 4}
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    history = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [{"id": call.id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.id, "content": "7"},
    ]  # fmt: skip
    second = rasd.generate(history, PARAMS, tools=tools)
    assert (second.text, second.tool_calls, second.finish_reason) == (
        "The result is: 7",
        (),
        "stop",
    )


@pytest.mark.parametrize("opened", [False, True], ids=["model-opens", "template-opens"])
def test_text_calls_and_thoughts_come_apart(opened):
    """No markup is left in the text, whoever opened the thought; the counters know its length."""
    answer = f"<think>\nThree and four.\n</think>\n\nLet me add.\n{CALL}"
    model, tokenizer = scripted_model(lambda prompt: answer)
    tokenizer.chat_template += "{# <think></think> #}" + ("<think>" if opened else "")
    rasd = RASD.from_model(model, tokenizer)
    got = rasd.generate(QUESTION, PARAMS, tools=ToolUse.of([ADD]))
    assert (got.text, got.reasoning.strip()) == ("Let me add.", "Three and four.")
    assert got.tool_calls[0].name == "add"
    assert got.finish_reason == "tool_calls"
    assert got.stats.reasoning_tokens == len(got.reasoning.encode())  # a byte a token
    assert rasd.has_reasoning


def test_a_grammar_waits_for_the_end_of_an_open_thought():
    """The thought that the template has begun is free, the answer behind it is bound."""
    model, tokenizer = scripted_model(
        lambda prompt: '<think>Hm, "Ada"?\n</think>\n\n{"name": "Ada", "age": 36}'
    )
    tokenizer.chat_template += "<think>{# </think> #}"
    params = SamplingParams(max_tokens=200, grammar=Grammar.json_schema(PERSON))
    got = RASD.from_model(model, tokenizer).generate(GREETING, params)
    assert json.loads(got.text) == {"name": "Ada", "age": 36}
    assert got.reasoning.strip() == 'Hm, "Ada"?'


@pytest.mark.parametrize("drafting", [True, False])
@pytest.mark.parametrize("choice", ["required", "add"])
def test_a_forced_call_is_made_whatever_the_model_wants(choice, drafting):
    """The model would greet; the call it must make is valid all the same."""
    rasd = saying("Hello to you.")
    params = SamplingParams(max_tokens=200, drafting=drafting)
    answer = rasd.generate(GREETING, params, tools=ToolUse.of([ADD], choice))
    (call,) = answer.tool_calls
    assert set(json.loads(call.arguments)) == {"a", "b"}
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")


def test_a_forced_call_that_cannot_fit_is_refused():
    """Fault 7: before the answer begins, with what the shortest call needs."""
    with pytest.raises(ConfigurationError, match="max_tokens is 45, but the shortest answer"):
        saying("Hello").generate(
            GREETING, SamplingParams(max_tokens=45), tools=ToolUse.of([ADD], "add")
        )


def test_tool_choice_none_hides_the_tools():
    """The prompt is the one without tools, and call markup is plain text."""
    rasd = saying(CALL)
    hidden = ToolUse.of([ADD], "none")
    answer = rasd.generate(QUESTION, PARAMS, tools=hidden)
    assert answer.text == CALL
    assert answer.tool_calls == ()
    assert rasd.count_tokens(QUESTION, hidden) == rasd.count_tokens(QUESTION)
    assert rasd.count_tokens(QUESTION, ToolUse.of([ADD])) > rasd.count_tokens(QUESTION) + 50


async def test_every_way_of_asking_says_the_same():
    """stream, generate, astream and agenerate, with calls; of a prompt or a whole request."""
    rasd, tools = saying(f"Fine: é€😀\n{CALL}"), ToolUse.of([ADD])
    whole = rasd.generate(QUESTION, PARAMS, tools=tools)
    streams = [
        list(rasd.stream(QUESTION, PARAMS, tools=tools)),
        [chunk async for chunk in rasd.astream(QUESTION, PARAMS, tools=tools)],
    ]
    other = await rasd.agenerate(Request(QUESTION, PARAMS, tools=tools))
    for chunks in streams:
        assert "".join(c.text for c in chunks) == whole.text == other.text == "Fine: é€😀"
        deltas = [d for c in chunks for d in c.tool_calls]
        assert [d.name for d in deltas if d.name] == ["add"]
        arguments = "".join(d.arguments for d in deltas)
        assert arguments == whole.tool_calls[0].arguments == other.tool_calls[0].arguments
        assert chunks[-1].finish_reason == "tool_calls"


def test_a_request_takes_nothing_besides():
    """Its params, hints and tools are its own; others would be passed over."""
    request = Request(QUESTION, PARAMS)
    for others in ({"params": PARAMS}, {"tools": ToolUse.of([ADD])}, {"hints": None}):
        with pytest.raises(ConfigurationError, match="Request holds its own"):
            saying("Hi").stream(request, **others)


def test_a_grammar_binds_the_text():
    """The answer is JSON of the schema, drafted or not, and the same."""
    rasd = RASD.from_model(tiny_llama(), tiny_tokenizer())
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["happy", "sad"]}, "n": {"type": "integer", "maximum": 9}},
        "required": ["mood", "n"],
    }
    params = SamplingParams(max_tokens=60, grammar=Grammar.json_schema(schema))
    drafted = rasd.generate(GREETING, params)
    plain = rasd.generate(
        GREETING, SamplingParams(max_tokens=60, grammar=params.grammar, drafting=False)
    )
    assert drafted.token_ids == plain.token_ids
    assert json.loads(drafted.text)["mood"] in {"happy", "sad"}
    assert drafted.finish_reason == "stop"
    assert drafted.stats.drafters["grammar"].accepted > 10


def test_drafting_can_be_turned_off_for_a_call():
    """Plain decoding says so in its statistics."""
    rasd = RASD.from_model(tiny_llama(), tiny_tokenizer())
    on = rasd.generate(GREETING, SamplingParams(max_tokens=20))
    off = rasd.generate(GREETING, SamplingParams(max_tokens=20, drafting=False))
    assert on.token_ids == off.token_ids
    assert off.stats.drafters == {}
    assert off.stats.off_reason == "drafting is off for this call"


def test_knowledge_transfer_can_be_turned_on_and_off_for_a_call():
    """A call's own rule wins over the engine's."""
    engine = RASD.from_model(tiny_llama(), tiny_tokenizer(), drafter_model=tiny_llama(9))
    lossless = engine.generate(GREETING, SamplingParams(max_tokens=20))
    asked = SamplingParams(max_tokens=20, knowledge_transfer="rapid:40")
    steered = engine.generate(GREETING, asked)
    assert (lossless.stats.mode, steered.stats.mode) == ("lossless", "knowledge_transfer")
    assert steered.token_ids != lossless.token_ids
    always = RASD.from_model(
        tiny_llama(), tiny_tokenizer(), drafter_model=tiny_llama(9), knowledge_transfer="rapid:40"
    )
    assert always.generate(GREETING, SamplingParams(max_tokens=20)).token_ids == steered.token_ids
    off = always.generate(GREETING, SamplingParams(max_tokens=20, knowledge_transfer="none"))
    assert off.token_ids == lossless.token_ids


def test_bound_answers_are_lossless_unless_asked():
    """Knowledge transfer of the engine stays out of tool calls and structured output."""
    engine = RASD.from_model(
        tiny_llama(), tiny_tokenizer(), drafter_model=tiny_llama(9),
        speculation=SpeculationConfig(knowledge_transfer="mixture"),
    )  # fmt: skip
    grammar = Grammar("regex", "[a-z]{12}")
    assert engine.generate(GREETING, SamplingParams(max_tokens=20)).stats.mode != "lossless"
    bound = engine.generate(GREETING, SamplingParams(max_tokens=20, grammar=grammar))
    tooled = engine.generate(GREETING, SamplingParams(max_tokens=20), tools=ToolUse.of([ADD]))
    asked = engine.generate(
        GREETING, SamplingParams(max_tokens=20, grammar=grammar, knowledge_transfer="mixture")
    )
    assert (bound.stats.mode, tooled.stats.mode) == ("lossless", "lossless")
    assert asked.stats.mode == "knowledge_transfer"
    assert len(asked.text) == 12


def test_a_drafters_prompt_that_is_too_long_is_not_read():
    """What the planner estimated is counted once it is encoded."""
    template, plan = ChatTemplate(tiny_tokenizer()), PromptPlan(target="a long one", drafter="abc")
    ids = tuple(template.encode_text("abc"))
    found = [draft_context(template, plan, (), len(ids) - n).drafter_prompt_ids for n in (0, 1)]
    assert found == [ids, None]


def test_tools_need_messages():
    """A plain text has no place for them."""
    with pytest.raises(ConfigurationError, match="tools need chat messages"):
        saying("x").stream("Hello", PARAMS, tools=ToolUse.of([ADD]))


def test_a_drafter_beside_a_drafter_model_is_refused():
    """Two drafters are named; neither is passed over in silence."""
    with pytest.raises(ConfigurationError, match="drafter_model is given too"):
        RASD.from_model(tiny_llama(), tiny_tokenizer(), drafter_model=tiny_llama(9), drafter=None)
