"""What ends an answer: stop strings that hold control tokens, and a template given as an option."""

from __future__ import annotations

import pytest
from llama_index.core.base.llms.types import ChatMessage
from scripted import TEMPLATES, scripted_model

from rasd_integrations import RASD, SamplingParams, ToolUse, langchain, llama_index
from rasd_integrations.errors import ConfigurationError

SAID = "Paris.<|im_end|>\n<|im_start|>user\nAnd of Spain?<|im_end|>\n<|im_start|>system\nMadrid."
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call>'


def said(text: str, stop: tuple[str, ...], prompt: object = QUESTION, **options: object) -> object:
    """Return the answer of a model that says ``text``, whole; its stream is the same."""
    template = options.pop("template", "hermes")
    tools = options.pop("tools", None)
    rasd = RASD.from_model(*scripted_model(lambda _: text, template=template), **options)
    params = SamplingParams(stop=stop, max_tokens=200)
    answer = rasd.generate(prompt, params, tools=tools)
    pieces = list(rasd.stream(prompt, params, tools=tools))
    assert answer.text == "".join(piece.text for piece in pieces)
    assert answer.finish_reason == pieces[-1].finish_reason
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["auto", None])
@pytest.mark.parametrize("prompt", [QUESTION, "The capital of France?"])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("<|im_end|>",), "Paris."),
        (("<|im_start|>",), "Paris.\n"),
        (("<|im_end|>\n",), "Paris."),
        (("is.<|im_end|>",), "Par"),
        (("<|im_start|>user\nAnd",), "Paris.\n"),
        (("\n<|im_start|>",), "Paris."),
        (("<|im_end|>\n<|im_start|>system",), "Paris.\nuser\nAnd of Spain?"),
        (("Spain", "<|im_end|>never"), "Paris.\nuser\nAnd of "),
        (("<|im_end|>never",), "Paris.\nuser\nAnd of Spain?\nsystem\nMadrid."),
    ],
)
def test_stop_strings_of_control_tokens_end_the_answer(stop, expected, prompt, drafter):
    """Fault 2: a control token is an end, alone or within a stop string; what stands for it is never shown."""
    answer = said(SAID, stop, prompt, drafter=drafter)
    assert expected == answer.text
    assert "stop" == answer.finish_reason


@pytest.mark.parametrize(
    "stop", [("<|im_end|>",), ("</tool_call><|im_end|>", "\n<|im_start|>"), ("STOP",)]
)
def test_calls_before_a_stop_string_count(stop):
    """Fault 2: whatever blocks the answer comes in, the call before the stop is made, and none behind it."""
    text = f"{CALL}<|im_end|>\n<|im_start|>user\nSTOP{CALL}"
    for drafter in ("auto", None):
        answer = said(text, stop, drafter=drafter, tools=ToolUse.of([TOOL]))
        assert ["look_up"] == [call.name for call in answer.tool_calls]
        assert "STOP" not in answer.text


def test_a_thought_ends_at_a_stop_that_is_a_control_token():
    """Fault 2: an end token ends thoughts too, which are not searched for words."""
    options = {"chat_template": TEMPLATES["hermes"] + "{# <think> #}"}
    text = "<think>hm, Paris<|im_end|> and more</think>Yes"
    answer = said(text, ("<|im_end|>", "Paris"), chat_template_kwargs=options)
    assert ("", "hm, Paris") == (answer.text, answer.reasoning)


def bare(text: str, **options: object) -> RASD:
    """Return a model without a chat template of its own."""
    model, tokenizer = scripted_model(lambda _: text)
    tokenizer.chat_template = None
    return RASD.from_model(model, tokenizer, **options)


def test_template_given_as_an_option_is_the_models():
    """Fault 6: it makes a chat model, its turn's end ends answers, and what is warmed is found again."""
    options = {"chat_template": TEMPLATES["hermes"]}
    rasd = bare(SAID, chat_template_kwargs=options)
    assert rasd.has_chat_template
    assert not bare(SAID).has_chat_template
    rasd.warm(["Notes of " + "France " * 40])
    answer = rasd.generate(
        [{"role": "user", "content": "Notes of " + "France " * 40 + "\n\nWhat?"}]
    )
    assert ("Paris.", "stop") == (answer.text, answer.finish_reason)
    assert answer.stats.cached_prompt_tokens > 200


def test_end_of_the_option_s_turn_ends_a_grammars_answer():
    """Fault 6: under a strict tool the model may end its text as the template ends a turn."""
    rasd = bare(SAID, chat_template_kwargs={"chat_template": TEMPLATES["hermes"]})
    answer = rasd.generate(QUESTION, tools=ToolUse.of([TOOL], strict=True))
    assert ("Paris.", "stop") == (answer.text, answer.finish_reason)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat_template": 5}, "Jinja template as text"),
        ({"chat_template": ""}, "Jinja template as text"),
        ({"tools": []}, "each call sets itself"),
        ({"tokenize": True, "messages": []}, "messages, tokenize"),
    ],
)
def test_options_that_no_template_takes_are_refused(options, words):
    """What would collide with a call's own arguments, or is no template, is named when the model is made."""
    with pytest.raises(ConfigurationError, match=words):
        RASD("some/model", chat_template_kwargs=options)


@pytest.mark.parametrize("stop", [["<|im_end|>"], ["is.<|im_end|>"]])
async def test_stop_strings_of_control_tokens_in_every_class(stop):
    """Fault 2: both frameworks' classes end there, whole and streamed, awaited and not."""
    expected = "Paris." if stop == ["<|im_end|>"] else "Par"
    loaded = scripted_model(lambda _: SAID)
    chat, text = (c.from_model(*loaded) for c in (langchain.ChatRASD, langchain.RASDLLM))
    index = llama_index.RASDLLM.from_model(*loaded)
    said = [
        chat.invoke("q", stop=stop).text,
        "".join([c.text for c in chat.stream("q", stop=stop)]),
        "".join([c.text async for c in chat.astream("q", stop=stop)]),
        text.invoke("q", stop=stop),
        "".join(text.stream("q", stop=stop)),
        index.complete("q", stop=stop).text,
        [*index.stream_complete("q", stop=stop)][-1].text,
        index.chat([ChatMessage(content="q")], stop=stop).message.content,
        (await index.acomplete("q", stop=stop)).text,
    ]
    assert [expected] * len(said) == said


def test_template_given_as_an_option_makes_a_chat_model_of_llama_index():
    """Fault 6: metadata, messages and tools follow the option."""
    model, tokenizer = scripted_model(lambda _: CALL + "<|im_end|>\n<|im_start|>user\nmore")
    tokenizer.chat_template = None
    bare = llama_index.RASDLLM.from_model(model, tokenizer)
    assert not bare.metadata.is_chat_model
    llm = llama_index.RASDLLM.from_model(
        model, tokenizer, chat_template_kwargs={"chat_template": TEMPLATES["hermes"]}
    )
    assert llm.metadata.is_chat_model
    assert llm.metadata.is_function_calling_model
    response = llm.chat([ChatMessage(content="q")], tools=[TOOL])
    assert ["look_up"] == [c.tool_name for c in llm.get_tool_calls_from_response(response)]
    assert "more" not in str(response)
