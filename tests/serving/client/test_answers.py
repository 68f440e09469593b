"""What a server streams, as the deltas of an answer; its faults as our errors."""

from __future__ import annotations

import time

import pytest
from fake_server import ANSWER, OTHER, RASD, VLLM, Says, fake_server, piece, usage

from rasd_integrations.config import SamplingParams
from rasd_integrations.errors import (
    ConfigurationError,
    DecodingError,
    DeviceMemoryError,
    ModelLoadError,
    PromptError,
    PromptTooLongError,
    ServerError,
    ServerTimeoutError,
)
from rasd_integrations.runtime.pipeline import Request, joined
from rasd_integrations.serving.client.connection import ServerOptions
from rasd_integrations.serving.client.remote import RemoteRASD
from rasd_integrations.stats import DecodingStats, DrafterStats

ASKED = Request([{"role": "user", "content": "2 + 2?"}])
WAYS = pytest.mark.parametrize("way", ["sync", "async"])
STATS = DecodingStats(
    drafters={"suffix": DrafterStats(4, 3)}, target_steps=2, prompt_tokens=9, generated_tokens=5
)


def remote(server, model="", **options):
    """Return the client of a server; it does not retry unless told to."""
    return RemoteRASD(
        ServerOptions(base_url=server.base_url, **{"max_retries": 0, **options}), model
    )


async def answer(engine, way, request=ASKED):
    """Return a whole answer."""
    return engine.generate(request) if way == "sync" else await engine.agenerate(request)


@WAYS
async def test_pieces_are_joined_to_an_answer(way):
    """Text as it comes; the statistics of another's server are its usage."""
    with fake_server(
        Says([*ANSWER[:-1], usage(7, 2, cached=3, thoughts=1)]), cards=[OTHER]
    ) as server:
        engine = remote(server)
        said = await answer(engine, way)
        engine.close()

    assert ("Four.", "stop", "remote") == (said.text, said.finish_reason, said.stats.mode)
    assert (7, 3, 2, 1) == (
        said.stats.prompt_tokens, said.stats.cached_prompt_tokens,
        said.stats.generated_tokens, said.stats.reasoning_tokens,
    )  # fmt: skip
    assert 0 < said.stats.total_s < 60
    assert engine.stats.prompt_tokens == 7


def test_our_servers_statistics_arrive_whole():
    """Steps and drafters of an answer are what the server counted."""
    with fake_server(
        Says([piece(content="x"), piece("length", STATS.as_dict()), usage()])
    ) as server:
        said = remote(server).generate(ASKED)

    assert (STATS, "length") == (said.stats, said.finish_reason)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_are_apart_from_the_text(name):
    """Under OpenAI's followers' name and under vLLM's newer one."""
    with fake_server(Says([piece(**{name: "Hm."}), *ANSWER])) as server:
        said = remote(server).generate(ASKED)

    assert ("Hm.", "Four.") == (said.reasoning, said.text)


def called(index, id=None, name=None, arguments=None):
    """Return a piece of a call as servers send it."""
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": id, "type": "function", "function": function}


CALLS = {
    "in pieces": [[called(0, "a", "find", "")], [called(0, arguments='{"x"')], [called(0, arguments=": 1}")]],
    "id and name said again": [[called(0, "a", "find", '{"x"')], [called(0, "a", "find", ": 1}")]],
    "two in one piece": [[called(0, "a", "find", '{"x": 1}'), called(1, "b", "find", "{}")]],
    "counted from two": [[called(2, "a", "find", '{"x": 1}')], [called(5, "b", "find", "{}")]],
    "without an index": [[{"id": "a", "function": {"name": "find", "arguments": '{"x": 1}'}}]],
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls_are_joined_by_their_index(case):
    """Name and id once, arguments in order, calls numbered from 0, whatever the server numbers."""
    events = [piece(tool_calls=calls) for calls in CALLS[case]]
    with fake_server(Says([*events, piece("stop"), usage()])) as server:
        deltas = list(remote(server).stream(ASKED))

    said = joined(deltas)
    assert ("a", "find", '{"x": 1}') == (said.tool_calls[0].id, said.tool_calls[0].name, said.tool_calls[0].arguments)  # fmt: skip
    assert said.finish_reason == "tool_calls"
    assert [*range(len(said.tool_calls))] == sorted({c.index for d in deltas for c in d.tool_calls})


def test_a_call_without_an_id_gets_one():
    """Agents answer calls by their ids."""
    with fake_server(
        Says([piece(tool_calls=[called(0, None, "find", "{}")]), piece("tool_calls")])
    ) as server:
        (call,) = remote(server).generate(ASKED).tool_calls

    assert call.id.startswith("call_")


def test_an_unknown_end_is_told_in_the_statistics():
    """Frameworks know three ends; why a server ended an answer otherwise is not lost."""
    with fake_server(Says([piece(content="x"), piece("content_filter")])) as server:
        said = remote(server).generate(ASKED)

    assert said.finish_reason == "stop"
    assert ("the server ended the answer: content_filter",) == said.stats.faults


LOGPROB = {"token": "Four", "logprob": -0.5, "bytes": [70], "top_logprobs": []}


def test_log_probabilities_arrive_as_they_were_written():
    """A server's tokens have texts and no ids."""
    event = piece(content="Four")
    event["choices"][0]["logprobs"] = {"content": [LOGPROB]}
    with fake_server(Says([event, piece("stop")]), cards=[OTHER]) as server:
        said = remote(server).generate(Request(ASKED.prompt, SamplingParams(top_logprobs=2)))
        asked = server.bodies[0]

    assert [LOGPROB] == [one.entry for one in said.logprobs]
    assert (True, 2) == (asked["logprobs"], asked["top_logprobs"])


def test_log_probabilities_of_plain_texts_are_lists():
    """The older endpoint has them side by side; they become entries of the newer form."""
    choice = {"text": "Fo", "logprobs": {"tokens": ["Fo"], "token_logprobs": [-1.0], "top_logprobs": [{"Fo": -1.0}]}}  # fmt: skip
    end = {"choices": [{"text": "", "finish_reason": "stop"}]}
    with fake_server(Says([{"choices": [choice]}, end]), cards=[OTHER]) as server:
        said = remote(server).generate(Request("2 +", SamplingParams(top_logprobs=1)))

    entry = {"token": "Fo", "logprob": -1.0, "bytes": [70, 111]}
    assert [{**entry, "top_logprobs": [entry]}] == [one.entry for one in said.logprobs]
    assert (1, ["/v1/models", "/v1/completions"]) == (server.bodies[0]["logprobs"], server.paths)


# --- faults ---


def refusal(status, code=None, message="Not so.", headers=None, **more):
    """Return an answer with OpenAI's error object."""
    told = {"message": message, "type": "x", "param": None, "code": code, **more}
    return Says(status=status, body={"error": told}, headers=headers or {})


SIZES = {"prompt_tokens": 5000, "max_tokens": 100, "window": 4096}
FAULTS = {
    "too long, ours": (refusal(400, "context_length_exceeded", rasd=SIZES), PromptTooLongError, "5000 tokens.*100.*4096"),
    "too long, OpenAI": (refusal(400, "context_length_exceeded", "This model's maximum context length is 4096 tokens. However, your messages resulted in 5000 tokens."), PromptTooLongError, "5000 tokens"),
    "too long, vLLM": (refusal(400, 400, "This model's maximum context length is 4096 tokens and your request has 5000 input tokens"), PromptTooLongError, "5000 tokens.*4096"),
    "too long by nobody knows how much": (refusal(400, None, "The maximum context length is 4096 tokens."), PromptTooLongError, "max_tokens of 512, exceed .* 4096"),
    "a prompt": (refusal(400, "invalid_prompt"), PromptError, "Not so"),
    "an option": (refusal(400, "invalid_option"), ConfigurationError, "Not so"),
    "another's option": (refusal(422), ConfigurationError, r"refused the request \(422\): Not so"),
    "a model": (refusal(404, "model_not_found"), ModelLoadError, "Not so"),
    "another's model": (refusal(404, None, "The model `x` does not exist."), ModelLoadError, "does not exist"),
    "a path": (refusal(404, "not_found", "There is no POST here."), ConfigurationError, "no POST"),
    "memory": (refusal(503, "out_of_memory"), DeviceMemoryError, "Not so"),
    "decoding": (refusal(500, "decoding_failed"), DecodingError, "Not so"),
    "a key": (refusal(401, "invalid_api_key"), ServerError, "refuses the key.*api_key="),
    "a door": (refusal(403), ServerError, "refuses the key"),
    "busy": (refusal(429, "busy", headers={"Retry-After": "3"}), ServerError, "busy.*in 3 s"),
    "a failure": (refusal(500, "internal_error"), ServerError, r"failed \(500\)"),
    "a proxy": (Says(status=502, body=b"<html>Bad gateway</html>"), ServerError, r"failed \(502\)"),
    "in mid-answer": (Says([ANSWER[0], {"error": {"message": "Not so.", "code": "decoding_failed"}}]), DecodingError, "Not so"),
    "in mid-answer, another's": (Says([ANSWER[0], {"error": {"message": "Not so.", "code": 500}}]), ServerError, r"failed \(500\): Not so"),
    "no end": (Says(ANSWER[:1]), ServerError, "before the answer's end"),
    "cut": (Says(ANSWER[:1], whole=False), ServerError, "hung up"),
    "no JSON": (Says([ANSWER[0], "data: {oops\n\n"]), ServerError, "no answer of OpenAI's API"),
    "no object": (Says([["x"]]), ServerError, "not OpenAI's format"),
    "no text": (Says([piece(content=3)]), ServerError, "sent 3 in"),
    "no call": (Says([piece(tool_calls=["x"])]), ServerError, "sent 'x' in"),
}  # fmt: skip


@WAYS
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_servers_fault_is_an_error_of_ours(fault, way):
    """By its code, else by its status; the message says what to do."""
    says, kind, words = FAULTS[fault]
    cards = [RASD] if "nobody" not in fault else [VLLM]
    with fake_server(says, cards=cards) as server:
        engine = remote(server)
        with pytest.raises(kind, match=words) as caught:
            await answer(engine, way)
        engine.close()

    assert kind is type(caught.value)
    status = says.status if says.status != 200 else 500 if fault.endswith("another's") else None
    assert not isinstance(caught.value, ServerError) or caught.value.status == status


@WAYS
async def test_a_silent_server_is_a_timeout(way):
    """Before the answer and in the middle of it."""
    with fake_server(Says([ANSWER[0], 5.0]), cards=[RASD]) as server:
        engine = remote(server, timeout=0.1)
        with pytest.raises(ServerTimeoutError, match="timeout="):
            await answer(engine, way)
        engine.close()


@WAYS
async def test_nobody_at_the_address(way):
    """A wrong port is a failed connection, with the address."""
    with fake_server() as server:
        engine = remote(server)
    with pytest.raises(ServerError, match=r"127\.0\.0\.1.*cannot be reached") as caught:
        await answer(engine, way)

    assert caught.value.status is None


@WAYS
async def test_a_busy_server_is_asked_again(way):
    """As often as ``max_retries`` says, before the first piece."""
    busy = refusal(429, "busy", headers={"Retry-After": "0.01"})
    with fake_server(busy, busy, Says()) as server:
        engine = remote(server, max_retries=2)
        assert "Four." == (await answer(engine, way)).text
        engine.close()

    assert len(server.bodies) == 3


def test_an_error_comes_with_the_call_of_a_stream():
    """As in process: what is wrong with a request is said before the first piece is read."""
    with fake_server(refusal(400, "invalid_option")) as server, pytest.raises(ConfigurationError):
        remote(server).stream(ASKED)


@WAYS
async def test_leaving_a_stream_ends_the_request(way):
    """The server sees its client go at once, while it is silent."""
    with fake_server(Says([ANSWER[0], 30.0])) as server:
        engine, started = remote(server), time.perf_counter()
        if way == "sync":
            stream = engine.stream(ASKED)
            next(stream)
            stream.close()
        else:
            astream = engine.astream(ASKED)
            await anext(astream)
            await astream.aclose()
        assert server.left.wait(5)
        assert time.perf_counter() - started < 5
        engine.close()
