"""The server as OpenAI's own client and a plain HTTP client see it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from served import engines_over, served
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.config import SamplingParams
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.serving.server.answers import deltas_of
from rasd_integrations.serving.server.formats import Head
from rasd_integrations.serving.server.places import BusyError, Places
from rasd_integrations.types import TextDelta, TokenLogprob, ToolCallDelta

ASK = [{"role": "user", "content": "Say something about the river."}]
TOOL = {
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


def client_of(found, **options):
    return openai.OpenAI(base_url=found.base_url, api_key="none", max_retries=0, **options)


def chat(found, **options):
    return client_of(found).chat.completions.create(model="", messages=ASK, **options)


OPTIONS = {
    "greedy": {"max_tokens": 12},
    "sampled": {"max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 3},
    "stop": {"max_tokens": 12, "stop": ["e", "a"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_answer_is_that_of_the_engine(tiny, name):
    """Whole and streamed, text and messages: what the engine says in the process, the server says over HTTP."""
    options = OPTIONS[name]
    expected = tiny.server.base.generate(ASK, SamplingParams(**options))
    whole = chat(tiny, **options)
    chunks = list(chat(tiny, stream=True, stream_options={"include_usage": True}, **options))
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.completion_tokens == expected.stats.generated_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert chunks[-2].choices[0].rasd["target_steps"] > 0
    text = client_of(tiny).completions.create(model="tiny", prompt="Once", **options)
    assert text.choices[0].text == tiny.server.base.generate("Once", SamplingParams(**options)).text


def test_several_answers_to_several_prompts(tiny):
    """Choices are numbered prompt by prompt; each is what its own seed gives alone."""
    got = client_of(tiny).completions.create(
        model="", prompt=["Once", "Twice"], n=2, seed=5, temperature=1.0, max_tokens=6
    )
    alone = [
        tiny.server.base.generate(p, SamplingParams(seed=seed, temperature=1.0, max_tokens=6))
        for p in ("Once", "Twice")
        for seed in (5, 6)
    ]
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in got.choices] == [a.text for a in alone]
    assert got.usage.prompt_tokens == alone[0].stats.prompt_tokens + alone[2].stats.prompt_tokens
    streamed: dict[int, str] = dict.fromkeys(range(4), "")
    for chunk in client_of(tiny).completions.create(
        model="", prompt=["Once", "Twice"], n=2, seed=5, temperature=1.0, max_tokens=6, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert [*streamed.values()] == [a.text for a in alone]


def test_bodies_are_openais_objects(tiny):
    """What is sent fits the client's own types, field by field, and no field is null that a client may read."""
    raw = {"messages": ASK, "max_tokens": 4}
    whole = httpx.post(f"{tiny.base_url}/chat/completions", json=raw).json()
    ChatCompletion.model_validate(whole, strict=True)
    body = httpx.post(f"{tiny.base_url}/completions", json={"prompt": "Once", "max_tokens": 4})
    Completion.model_validate(body.json(), strict=True)
    with httpx.stream(
        "POST", f"{tiny.base_url}/chat/completions", json=raw | {"stream": True}
    ) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in got.iter_lines() if line]
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        ChatCompletionChunk.model_validate_json(event, strict=True)
        assert "tool_calls" not in json.loads(event)["choices"][0]["delta"]


def test_log_probabilities_are_those_of_the_engine(tiny):
    """Whole and streamed, in both of OpenAI's forms: one entry a token, as many alternatives as asked for."""
    expected = tiny.server.base.generate(ASK, SamplingParams(max_tokens=6, top_logprobs=2)).logprobs
    values = [one.logprob for one in expected]
    whole = chat(tiny, max_tokens=6, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in chat(tiny, max_tokens=6, logprobs=True, top_logprobs=2, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    for entries in (whole, streamed):
        assert [entry.logprob for entry in entries] == pytest.approx(values)
        assert {len(entry.top_logprobs) for entry in entries} == {2}
    completion = client_of(tiny).completions.create(
        model="", prompt="Once", max_tokens=6, logprobs=3
    )
    found = completion.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == completion.usage.completion_tokens
    assert all(max(top.values()) >= own for top, own in zip(found.top_logprobs, found.token_logprobs, strict=True))  # fmt: skip


def test_a_step_that_says_much_is_sent_in_objects_of_one_call():
    """Accepted drafts may end one call and begin another in a step; clients read an object's first call only."""
    calls = (
        ToolCallDelta(0, "a", "add"),
        ToolCallDelta(0, arguments='{"a": 1}'),
        ToolCallDelta(1, "b", "add"),
    )
    delta = TextDelta("So:", tool_calls=calls, logprobs=(TokenLogprob(5, -0.5, ()),))
    head = Head("m", chat=True, entries=lambda found: [{"logprob": one.logprob} for one in found])
    sent = [chunk["choices"][0] for chunk in head.chunks(0, delta)]
    assert [choice["delta"].get("content") for choice in sent] == ["So:", None, None, None]
    found = [choice["delta"]["tool_calls"] for choice in sent[1:]]
    assert [[call["index"] for call in calls] for calls in found] == [[0], [0], [1]]
    logprobs = [choice["logprobs"] for choice in sent]
    assert logprobs == [{"content": [{"logprob": -0.5}], "refusal": None}, None, None, None]


def test_tools_are_called(assistant):
    """A call comes whole and in pieces; its arguments are JSON, and its result can be sent back."""
    client = client_of(assistant)
    ask = [{"role": "user", "content": "Please add 3 and 4."}]
    whole = client.chat.completions.create(model="assistant", messages=ask, tools=[TOOL])
    (call,) = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 3, "b": 4})
    streamed = client.chat.completions.create(model="assistant", messages=ask, tools=[TOOL], stream=True)  # fmt: skip
    found = [chunk.choices[0].delta.tool_calls or [] for chunk in streamed]
    assert {len(calls) for calls in found} == {0, 1}  # clients read the first
    pieces = [call for calls in found for call in calls]
    assert pieces[0].function.name == "add"
    assert json.loads("".join(p.function.arguments for p in pieces)) == {"a": 3, "b": 4}
    forced = client.chat.completions.create(
        model="assistant", messages=ASK, tools=[TOOL], max_tokens=160,
        tool_choice={"type": "function", "function": {"name": "add"}},
    )  # fmt: skip
    assert {*json.loads(forced.choices[0].message.tool_calls[0].function.arguments)} == {"a", "b"}
    message = whole.choices[0].message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": call.id, "content": "7"}
    last = client.chat.completions.create(model="assistant", messages=[*ask, message, result], tools=[TOOL])  # fmt: skip
    assert "7" in last.choices[0].message.content


def test_an_answer_follows_a_schema(assistant):
    """The client's own `parse` reads the class that it asked for."""

    class Sum(BaseModel):
        total: int

    got = client_of(assistant).chat.completions.parse(
        model="", messages=[{"role": "user", "content": "Total 12, as JSON."}], response_format=Sum, max_tokens=40
    )  # fmt: skip
    assert isinstance(got.choices[0].message.parsed, Sum)


def test_chunks_sent_along_are_quoted(assistant):
    """Chunks of the client's own retrieval come back as the sources of what the answer quotes."""
    fact = "The bridge over the river was built in 1912."
    messages = [{"role": "user", "content": f"Context:\n{fact}\n\nQuestion: When was the bridge built?"}]  # fmt: skip
    chunk = {"text": fact, "id": "c7", "metadata": {"source": "guide.md"}}
    got = client_of(assistant).chat.completions.create(
        model="", messages=messages, extra_body={"rasd": {"chunks": [chunk], "store": False}}
    )
    (quote,) = got.choices[0].rasd["quotes"]
    assert quote["chunk_id"] == "c7"
    assert quote["metadata"] == {"source": "guide.md"}


ERRORS = [
    ({"messages": []}, openai.BadRequestError, "invalid_prompt"),
    ({"temperature": -1}, openai.BadRequestError, "invalid_option"),
    ({"extra_body": {"top_q": 3}}, openai.BadRequestError, "invalid_option"),
    ({"max_tokens": 9000}, openai.BadRequestError, "context_length_exceeded"),
    ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "kind", "code"), ERRORS)
def test_errors_are_those_of_openais_client(tiny, change, kind, code, stream):
    """A bad request has its status and code, also where a stream was asked for."""
    with pytest.raises(kind) as caught:
        client_of(tiny).chat.completions.create(
            **{"model": "", "messages": ASK, "stream": stream} | change
        )
    assert caught.value.code == code
    if code == "context_length_exceeded":
        assert caught.value.body["rasd"]["window"] == 8192


BODIES = [
    (b"{", "application/json", 400, "invalid_prompt"),
    (b"[]", "application/json", 400, "invalid_prompt"),
    (b'{"messages": [}', "application/json; charset=utf-8", 400, "invalid_prompt"),
    (b"[" * 60_000, "application/json", 400, "invalid_prompt"),
    (b"\xff\xfe\x00", "application/json", 400, "invalid_prompt"),
    (b"{}", "text/plain", 415, "not_json"),
    (b'{"messages": "' + b"x" * 70_000 + b'"}', "application/json", 413, "body_too_large"),
]


@pytest.mark.parametrize(("body", "kind", "status", "code"), BODIES)
def test_bad_bodies_are_refused(body, kind, status, code):
    """No body is an internal error, and a large one is not read to its end."""
    with served(engines_over(tiny_llama(), tiny_tokenizer()), body_bytes=65536) as found:
        got = httpx.post(
            f"{found.base_url}/chat/completions", content=body, headers={"content-type": kind}
        )
        assert (got.status_code, got.json()["error"]["code"]) == (status, code)


LONG = {"messages": ASK, "max_tokens": 6000, "ignore_eos": True}


def post(found, path="chat/completions", **options):
    return httpx.post(f"{found.base_url}/{path}", timeout=60, **options)


def test_a_client_that_hangs_up_ends_its_answer(tiny):
    """The place is free again at once, though nothing was sent yet that could fail."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{tiny.base_url}/chat/completions", json=LONG, timeout=0.3)
    assert tiny.settles(2.0)


def test_a_stream_that_is_closed_ends_its_answer(tiny):
    """Whoever reads a few words and leaves frees the place within a step."""
    with client_of(tiny) as client:
        got = client.chat.completions.create(
            model="", messages=ASK, max_tokens=6000, stream=True, extra_body={"ignore_eos": True}
        )  # fmt: skip
        next(got)
        assert tiny.server.places.running == 1
        got.close()
    assert tiny.settles(2.0)


def test_a_full_server_refuses_at_once(tiny):
    """Two answers run, two wait, the fifth is told to come again; the others are right."""
    expected = tiny.server.base.generate(ASK, SamplingParams(max_tokens=400, ignore_eos=True)).text
    body = LONG | {"max_tokens": 400}
    got: list[httpx.Response] = []
    ask = lambda: got.append(post(tiny, json=body))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while tiny.server.places.running + tiny.server.places.waiting < 4:
        time.sleep(0.005)
    refused = httpx.post(f"{tiny.base_url}/chat/completions", json=body)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert "2 answers run and 2 wait" in refused.json()["error"]["message"]
    for thread in threads:
        thread.join()
    assert {r.json()["choices"][0]["message"]["content"] for r in got} == {expected}
    assert tiny.settles(0.5)


def test_a_flood_is_no_larger_than_the_queue(tiny):
    """However many come in the same moment, no more than the limit are taken, and none is lost."""
    engine, places = tiny.server.base, Places(2, 3)
    asks = [Request(ASK, SamplingParams(max_tokens=3))]

    async def ask():
        deltas = deltas_of(engine, asks, places, seconds=30, left=asyncio.Event().wait)
        try:
            return len([delta async for delta in deltas]) > 0
        except BusyError:
            return False

    async def flood():
        return await asyncio.gather(*(ask() for _ in range(20)))

    assert asyncio.run(flood()) == [True] * 5 + [False] * 15
    assert (places.running, places.waiting) == (0, 0)


def test_answers_that_leave_give_their_places_back(tiny):
    """Whether they ran, waited, or had not begun to wait."""
    engine, places = tiny.server.base, Places(1, 5)
    asks = [Request(ASK, SamplingParams(max_tokens=3000, ignore_eos=True))] * 3

    async def leave(after):
        deltas = deltas_of(engine, asks, places, seconds=30, left=asyncio.Event().wait)
        reading = asyncio.create_task(anext(deltas))
        await asyncio.sleep(after)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await deltas.aclose()

    for after in (0, 0.001, 0.2):
        asyncio.run(leave(after))
        assert (places.running, places.waiting) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_character_is_data(assistant, stream):
    """Half of a surrogate pair in a chunk, and so in a quote's metadata, is sent back as JSON can write it."""
    fact = "The bridge over the river was built in 1912."
    body = {
        "messages": [{"role": "user", "content": f"Context:\n{fact}\n\nQuestion: When was the bridge built?"}],
        "stream": stream, "rasd": {"chunks": [{"text": fact, "metadata": {"by": "\ud800x"}}]},
    }  # fmt: skip
    got = httpx.post(f"{assistant.base_url}/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})  # fmt: skip
    assert got.status_code == 200
    assert '"by":"\\ud800x"' in got.text


def test_a_body_that_is_cut_is_no_error_of_the_server(tiny, caplog):
    """A client that leaves in the middle of its body is a line in the metrics, and no traceback."""
    host, port = tiny.root.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 900\r\n\r\n{"
        )
        time.sleep(0.1)
    for _ in range(100):
        if 'status="499"' in httpx.get(f"{tiny.root}/metrics").text:
            break
        time.sleep(0.02)
    assert 'status="499"' in httpx.get(f"{tiny.root}/metrics").text
    assert "A request failed" not in caplog.text


def test_a_slow_reader_holds_no_place(tiny):
    """An answer gives its place back when it is made, not when it is read."""
    with httpx.stream("POST", f"{tiny.base_url}/chat/completions", json=LONG | {"max_tokens": 300, "stream": True}) as slow:  # fmt: skip
        assert tiny.settles(30)
        assert slow.read().endswith(b"data: [DONE]\n\n")


def test_a_request_has_a_limit_of_time():
    """The answer ends with an error that names the limit; a stream says so in its last event."""
    model = tiny_llama(max_position_embeddings=8192)
    with served(engines_over(model, tiny_tokenizer()), seconds=0.4) as found:
        url = f"{found.base_url}/chat/completions"
        got = httpx.post(url, json=LONG, timeout=20)
        assert (got.status_code, got.json()["error"]["code"]) == (504, "timeout")
        last = (
            httpx.post(url, json=LONG | {"stream": True}, timeout=20).text.strip().split("\n\n")[-1]
        )
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert found.settles()


def test_tokens_are_limited_where_the_server_says_so():
    """A longer prompt or answer is refused by its number; without one, the limit holds."""
    with served(engines_over(tiny_llama(), tiny_tokenizer()), prompt_tokens=60, answer_tokens=5) as found:  # fmt: skip
        body = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
        url = f"{found.base_url}/chat/completions"
        assert httpx.post(url, json=body).json()["usage"]["completion_tokens"] == 5
        over = httpx.post(url, json=body | {"max_tokens": 6}).json()["error"]
        assert "at most 5 here" in over["message"]
        long = body | {"messages": [{"role": "user", "content": "word " * 80}]}
        assert httpx.post(url, json=long).json()["error"]["code"] == "context_length_exceeded"


def test_keys_open_their_own_namespaces():
    """Without a key nothing is answered; one tenant's prompts are not in another's cache."""
    keys = {"sk-a": "a", "sk-b": "b"}
    model = tiny_llama(max_position_embeddings=8192)
    with served(engines_over(model, tiny_tokenizer()), keys=keys) as found:
        url, body = f"{found.base_url}/chat/completions", {"messages": ASK, "max_tokens": 4}

        def cached(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            usage = httpx.post(url, json=body, headers=headers).json()["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        for headers in ({}, {"authorization": "Bearer sk-c"}, {"authorization": "Basic sk-a"}):
            for path in ("chat/completions", "completions"):
                got = httpx.post(f"{found.base_url}/{path}", json=body, headers=headers)
                assert (got.status_code, got.json()["error"]["code"]) == (401, "invalid_api_key")
            assert httpx.get(f"{found.base_url}/models", headers=headers).status_code == 401
            assert httpx.post(f"{found.root}/tokenize", json={"prompt": "a"}, headers=headers).status_code == 401  # fmt: skip
        assert [cached("sk-a"), cached("sk-b"), cached("sk-a"), cached("sk-b")][:2] == [0, 0]
        assert cached("sk-a") > 0


def test_the_server_says_how_it_is():
    """It lives at once, is ready once the model is loaded, and is not while it drains; all is counted."""
    with served(engines_over(tiny_llama(), tiny_tokenizer()), load=False) as found:
        ask = lambda path: httpx.get(found.root + path)  # noqa: E731
        say = lambda: post(found, json={"messages": ASK, "max_tokens": 3})  # noqa: E731
        assert (ask("/health").status_code, ask("/ready").status_code) == (200, 503)
        assert (say().status_code, say().headers["retry-after"]) == (503, "1")
        found.server.load()
        assert (ask("/ready").status_code, say().status_code) == (200, 200)
        card = ask("/v1/models/tiny").json()
        assert (card["owned_by"], card["max_model_len"]) == ("rasd", found.server.base.window)
        told = ask("/metrics").text
        assert 'rasd_requests_total{path="/v1/chat/completions",status="200"} 1.0' in told
        assert 'rasd_requests_total{path="/v1/chat/completions",status="503"} 2.0' in told
        assert "rasd_generation_tokens_sum 3.0" in told
        found.server.draining = True
        assert (ask("/ready").status_code, say().status_code) == (503, 503)
        assert ask("/v1/nothing").json()["error"]["code"] == "not_found"
        assert httpx.post(f"{found.base_url}/embeddings", json={}).status_code == 501


def test_tokens_are_counted_as_the_model_reads_them(tiny):
    """As vLLM's route does: ids of a text, the number for messages with the template around them."""
    engine = tiny.server.base
    ask = lambda body: httpx.post(f"{tiny.root}/tokenize", json=body).json()  # noqa: E731
    assert ask({"prompt": "Once upon", "add_special_tokens": False})["tokens"] == engine.encode("Once upon")  # fmt: skip
    assert ask({"prompt": "Once upon"})["count"] == engine.count_tokens("Once upon")
    assert ask({"messages": ASK})["count"] == engine.count_tokens(ASK)
    assert ask({"messages": 3})["error"]["code"] == "invalid_prompt"
