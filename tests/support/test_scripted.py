"""The scripted model says its script through the real engine, and notices a wrong cache."""

from __future__ import annotations

import json
from collections.abc import Sequence

import fakes
import pytest
import torch
from assistant import GREETING, standard_model, standard_recover, standard_script
from fakes import ScriptedDrafter
from scripted import ANSWER, TEMPLATES, WINDOW, LostError, scripted_model, scripted_tokenizer
from tiny import EOS, VOCAB

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.runtime.rasd import RASD

TEXT = 'Ein Satz, «zwei» Sätze, 你好 🙂: {"a": [1, 2]}\n and one two, one two, one two.'
CHAT = [{"role": "user", "content": "Tell me one two, one two."}]
LONG = SamplingParams(max_tokens=400)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather at a location.",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["location"],
        },
    },
}


def rendered(messages, tools=None, template="hermes") -> str:
    return scripted_tokenizer(template).apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )


def decode(drafter, params=LONG, n: int | None = 6):
    """Return the ids and the number of steps of one answer by the bare decoder."""
    model, tokenizer = scripted_model(lambda prompt: TEXT)
    decoder = SpeculativeDecoder(
        TargetModel(model), drafter, config=SpeculationConfig(num_draft_tokens=n)
    )
    blocks = list(decoder.generate(tokenizer.encode(rendered(CHAT)), params))
    return [t for block in blocks for t in block.token_ids], len(blocks)


def truth() -> Sequence[int]:
    return [*scripted_tokenizer().encode(TEXT), EOS]


DRAFTS = {
    "oracle": fakes.oracle,
    "wrong": lambda ids: fakes.always_wrong(ids, VOCAB),
    "partly right": lambda ids: fakes.partly_right(ids, VOCAB),
    "random": lambda ids: fakes.random_tokens(VOCAB),
    "tree": lambda ids: fakes.as_tree(fakes.oracle(ids), VOCAB),
    "partly right tree": lambda ids: fakes.as_tree(fakes.partly_right(ids, VOCAB), VOCAB),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", sorted(DRAFTS))
def test_every_draft_leaves_the_script(draft, temperature):
    """Whatever is drafted, chain or tree, greedy or sampled, the answer is the script and an end token."""
    drafter = ScriptedDrafter(DRAFTS[draft](truth()))
    params = SamplingParams(max_tokens=400, temperature=temperature, seed=1)
    assert decode(drafter, params)[0] == truth()


def test_drafts_save_steps():
    """Right drafts make the answer in a sixth of the steps, so the speculative path did run."""
    plain, steps = decode(None)
    assert plain == truth()
    oracle, fewer = decode(ScriptedDrafter(fakes.oracle(truth())))
    assert oracle == plain
    assert fewer <= steps / 6 + 2
    suffix, some = decode(SuffixDrafter())
    assert suffix == plain
    assert some < steps


@pytest.mark.parametrize("drafter", ["auto", "self", None])
def test_whole_runtime_speaks_the_script(drafter):
    """Through the runtime the text is the script, by chat messages and by a plain text prompt."""
    model, tokenizer = scripted_model(lambda prompt: f"{TEXT} {len(prompt)}")
    rasd = RASD.from_model(model, tokenizer, drafter=drafter)
    answer = rasd.generate(CHAT, LONG)
    assert answer.text == f"{TEXT} {len(rendered(CHAT))}"
    assert answer.finish_reason == "stop"
    for prompt in ("One two", "One two, three"):  # the second goes on where the first was answered
        assert rasd.generate(prompt, LONG).text == f"{TEXT} {len(prompt)}"


def test_turns_reuse_the_cache():
    """The second turn finds the first one's keys and values, and its answer is its own script."""
    asked: list[str] = []

    def script(prompt: str) -> str:
        asked.append(prompt)
        return f"Answer number {len(asked)}."

    model, tokenizer = scripted_model(script)
    rasd = RASD.from_model(model, tokenizer)
    first = rasd.generate(CHAT, LONG)
    more = [*CHAT, {"role": "assistant", "content": first.text}, {"role": "user", "content": "?"}]
    second = rasd.generate(more, LONG)
    assert [first.text, second.text] == ["Answer number 1.", "Answer number 2."]
    assert second.stats.cached_prompt_tokens == first.stats.prompt_tokens + len(first.text)
    assert asked == [rendered(CHAT), rendered(more)]


def test_long_prompts_are_read_whole():
    """A prompt of several prefill pieces reaches the script byte for byte."""
    content = "".join(f"Line {i} of «many».\n" for i in range(250))
    model, tokenizer = scripted_model(lambda prompt: prompt[-80:-40])
    rasd = RASD.from_model(model, tokenizer)
    messages = [{"role": "user", "content": content}]
    assert rasd.generate(messages, LONG).text == rendered(messages)[-80:-40]
    assert rasd.window == WINDOW


def test_generate_of_transformers_agrees():
    """Plain ``model.generate`` says the same."""
    model, tokenizer = scripted_model(lambda prompt: TEXT)
    prompt = torch.tensor([tokenizer.encode(rendered(CHAT))])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=200,
        pad_token_id=0,
    )  # fmt: skip
    assert out[0, prompt.shape[1] :].tolist() == truth()


def test_wrong_cache_is_noticed():
    """A row in the wrong place, a mask that shows too much, or a wrong position is an error, not an answer."""
    model, tokenizer = scripted_model(lambda prompt: TEXT)
    ids = tokenizer.encode(ANSWER)
    prompt = torch.tensor([ids])
    model(prompt)
    with pytest.raises(LostError):
        model(prompt, position_ids=torch.arange(1, 1 + len(ids))[None])
    with pytest.raises(LostError):
        model(prompt, attention_mask=torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool))
    target, buffer = TargetModel(model), KVBuffer(64)
    for _ in target.prefill(ids[:-1], buffer):
        pass
    with torch.inference_mode():
        for rows in buffer.rows(0, 0, buffer.length):
            rows[:, 3] = rows[:, 4]
    with pytest.raises(LostError):
        target.step(ids[-1:], buffer)


def masked_answer(script, allowed, recover=None) -> str:
    """Return what plain decoding says where only the answers of ``allowed`` may be said."""
    model, tokenizer = scripted_model(script, recover=recover)
    ends = [[*tokenizer.encode(text), EOS] for text in allowed]
    ids = tokenizer.encode(rendered(CHAT))
    said: list[int] = []
    while not said or said[-1] != EOS:
        row = model(torch.tensor([[*ids, *said]]), use_cache=False).logits[0, -1]
        may = {end[len(said)] for end in ends if end[: len(said)] == said}
        said.append(max(may, key=row.tolist().__getitem__))
    return tokenizer.decode(said[:-1])


def test_masked_decoding_ends_soon():
    """Where a mask forbids the script, white space is stepped over and values are closed soonest."""
    plain = ['{"a":1}', '{"a":1,"b":2}', "{}"]
    assert masked_answer(lambda p: '{"a": 1, "b": 2}', plain) == '{"a":1,"b":2}'
    assert masked_answer(lambda p: '{"a":1}', ['{"a": 1}', '{"b": 1}']) == '{"a": 1}'
    strings = ['{"x":"y}"}', '{"x":"y"}', '{"x":"y","z":1}']
    assert masked_answer(lambda p: "Hello", strings) == '{"x":"y"}'
    both = ['{"name":"f"}', '{"name":"g"}']
    assert masked_answer(lambda p: "Hello", both, recover=lambda p, s: both[1]) == both[1]


def calls(messages) -> list[dict]:
    """Return the tool calls of the standard script's answer."""
    answer = standard_script(rendered(messages, [TOOL]))
    parts = answer.split("<tool_call>\n")[1:]
    return [json.loads(part.removesuffix("\n").removesuffix("\n</tool_call>")) for part in parts]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_assistant_calls_tools_and_reads_results():
    """The standard script calls the tool that the question names, once a place, then tells the result."""
    question = user("What is the weather in San Francisco, CA?")
    call = {"name": "get_weather", "arguments": {"location": "San Francisco, CA"}}
    assert calls([question]) == [call]
    two = calls([user("What is the weather in Paris and in Rome?")])
    assert [c["arguments"]["location"] for c in two] == ["Paris", "Rome"]
    assert calls([user("Hello!")]) == []
    asked = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
    done = [question, asked, {"role": "tool", "content": "It's sunny."}]
    assert standard_script(rendered(done, [TOOL])) == "The result is: It's sunny."


def test_assistant_answers_without_tools():
    """It greets, copies the line that fits the question, and writes the JSON that it is asked for."""
    assert standard_script(rendered([user("Hello!")])) == GREETING
    context = (
        "Bob was born in Oslo in 1970.\nAnna likes red apples.\n\nQuestion: Where was Bob born?"
    )
    assert standard_script(rendered([user(context)])) == "Bob was born in Oslo in 1970."
    asked = "A joke, please, as JSON with 'setup' and 'punchline' keys."
    assert json.loads(standard_script(rendered([user(asked)]))).keys() == {"setup", "punchline"}


def test_assistant_follows_what_is_forced():
    """A call that was begun for it is ended with fitting arguments, also of a tool it would not choose."""
    prompt = rendered([user("Hello!")], [TOOL])
    begun = '<tool_call>\n{"name": "get_weather", "arg'
    whole = standard_recover(prompt, begun)
    assert whole.startswith(begun)
    inner = whole.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(inner)["arguments"] == {"location": "Hello!"}
    assert standard_recover(prompt, "Well") == ""


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_templates_carry_a_conversation(template):
    """Under each template the runtime answers a conversation with a system message and two user turns."""
    rasd = RASD.from_model(*standard_model(template))
    messages = [
        {"role": "system", "content": "Anna likes red apples."},
        user("Hello."),
        user("What kind of apples are liked by Anna?"),
    ]
    assert rasd.generate(messages, LONG).text == "Anna likes red apples."
