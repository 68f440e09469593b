"""What a server is asked: its models once, and of each kind of server only what it knows."""

from __future__ import annotations

import pytest
from fake_server import OTHER, RASD, VLLM, Says, fake_server

from rasd_integrations.config import SamplingParams
from rasd_integrations.errors import ConfigurationError, ModelLoadError, ServerError
from rasd_integrations.prompting import PromptHints
from rasd_integrations.response_format import Grammar, ToolUse
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.serving.client.connection import ServerOptions
from rasd_integrations.serving.client.remote import RemoteRASD
from rasd_integrations.types import Chunk

MESSAGES = [{"role": "user", "content": "Who?"}]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
# All that OpenAI's API documents and this package may send; another server may refuse any other field.
OPENAI = {
    "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options",
    "tools", "tool_choice", "parallel_tool_calls", "response_format", "logprobs", "top_logprobs",
}  # fmt: skip


def remote(server, model="", **options):
    """Return the client of a server; options of either kind."""
    own = {
        n: options.pop(n)
        for n in ("context", "knowledge_transfer", "chat_template_kwargs")
        if n in options
    }
    return RemoteRASD(
        ServerOptions(base_url=server.base_url, max_retries=0, **options), model, **own
    )


def sent(card, request, **options):
    """Return the body that a server with this model gets."""
    with fake_server(cards=[card]) as server:
        engine = remote(server, **options)
        engine.generate(request)
        engine.close()
    return server.bodies[0]


# --- whose server it is ---


def test_the_models_are_asked_for_once():
    """Before the first answer, which names the only model there is."""
    with fake_server() as server:
        engine = remote(server)
        assert "" == engine.model_name
        engine.generate(Request(MESSAGES))
        engine.generate(Request("Who?"))

    assert ["/v1/models", "/v1/chat/completions", "/v1/completions"] == server.paths
    assert ("one", 2048, {"one"}) == (
        engine.model_name, engine.window, {body["model"] for body in server.bodies}
    )  # fmt: skip


def test_our_server_is_asked_again_while_it_loads():
    """It lists the model at once, and its window when it is loaded."""
    with fake_server(cards=[{"id": "one", "owned_by": "rasd"}]) as server:
        engine = remote(server)
        assert engine.window is None
        server.cards = [RASD]
        assert (2048, 2048) == (engine.window, engine.window)

    assert 2 == len(server.paths)


MODELS = {
    "another name": ([RASD, {**RASD, "id": "two"}], "three", ModelLoadError, "'three'.*'one', 'two'"),
    "none of several": ([RASD, {**RASD, "id": "two"}], "", ModelLoadError, "No model is named.*'one', 'two'"),
    "none at all": ([], "one", ModelLoadError, "serves none"),
    "no list, no name": (None, "", ConfigurationError, "404"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_is_not_served_is_refused(case):
    """The error names those that are."""
    cards, name, kind, words = MODELS[case]
    with fake_server(cards=cards) as server, pytest.raises(kind, match=words):
        remote(server, name).ensure_loaded()


def test_a_server_without_a_list_is_asked_for_the_model():
    """It may serve any name; it is treated as another's."""
    with fake_server(cards=None) as server:
        engine = remote(server, "mine")
        engine.generate(Request(MESSAGES))

    assert ("mine", None) == (server.bodies[0]["model"], engine.window)
    assert set(server.bodies[0]) <= OPENAI


def test_a_page_is_no_list_of_models():
    """An address without /v1 often answers with one."""
    with fake_server() as server:
        server.cards = "a page"
        with pytest.raises(ServerError, match=r"no list of models.*/v1"):
            remote(server).ensure_loaded()


# --- what is sent ---

HINTS = PromptHints(question="Who?", chunks=(Chunk("Ada", id="a"),), filter={"page": 3})
SAMPLED = {"temperature": 0.5, "top_p": 0.9, "seed": 4, "max_tokens": 9, "stop": ("x",)}
ALIKE = {
    "bare": Request(MESSAGES),
    "sampled": Request(MESSAGES, SamplingParams(**SAMPLED)),
    "log-probabilities": Request(MESSAGES, SamplingParams(top_logprobs=2)),
    "a plain text": Request("Who?", SamplingParams(**SAMPLED)),
    "a schema": Request(MESSAGES, SamplingParams(grammar=Grammar.json_object())),
    "tools": Request(MESSAGES, tools=ToolUse.of([TOOL], "find")),
    "strict tools": Request(MESSAGES, tools=ToolUse.of([TOOL], strict=True)),
    "chunks": Request(MESSAGES, hints=HINTS, searches=False),
    "plain decoding": Request(MESSAGES, SamplingParams(drafting=False)),
    "values that change nothing": Request(
        MESSAGES,
        SamplingParams(top_k=0, min_p=0, repetition_penalty=1, no_repeat_ngram_size=0, knowledge_transfer="none"),
        context="prompt",
    ),
    "thoughts of earlier": Request([*MESSAGES, {"role": "assistant", "content": "I.", "reasoning_content": "Hm."}]),
}  # fmt: skip


@pytest.mark.parametrize("case", ALIKE)
def test_another_server_gets_no_field_that_it_does_not_know(case):
    """OpenAI's own only, with the longest answer that is documented; always streamed, with usage."""
    body = sent(OTHER, ALIKE[case])

    assert set(body) <= OPENAI
    assert (True, {"include_usage": True}) == (body["stream"], body["stream_options"])
    assert 9 if "stop" in body else 512 == body["max_tokens"]
    assert all("reasoning_content" not in message for message in body.get("messages", ()))


def test_strict_tools_are_told_as_openai_does():
    """The option is a part of each function there."""
    assert sent(OTHER, ALIKE["strict tools"])["tools"][0]["function"]["strict"] is True
    assert "strict" not in sent(OTHER, ALIKE["tools"])["tools"][0]["function"]


VLLMS = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}


def test_vllm_gets_the_options_that_it_knows():
    """Under its names; and what is for the chat template."""
    body = sent(VLLM, Request(MESSAGES, SamplingParams(**VLLMS)), chat_template_kwargs={"x": 1})

    assert {**VLLMS, "chat_template_kwargs": {"x": 1}} == {n: body[n] for n in set(body) - OPENAI}


def test_our_server_gets_everything():
    """Chunks, hints, and what the model was built with."""
    params = SamplingParams(no_repeat_ngram_size=3, drafting=False)
    request = Request(MESSAGES, params, hints=HINTS)
    body = sent(RASD, request, context="documents", knowledge_transfer="rapid")

    assert {
        "question": "Who?", "filter": {"page": 3}, "chunks": [{"text": "Ada", "id": "a"}],
        "no_repeat_ngram_size": 3, "drafting": False, "context": "documents", "knowledge_transfer": "rapid",
    } == body["rasd"]  # fmt: skip
    assert "max_tokens" not in body


def test_a_calls_own_options_come_first():
    """What the model was built with is for requests that do not say."""
    request = Request(MESSAGES, SamplingParams(knowledge_transfer="none"), context="prompt")
    body = sent(RASD, request, context="documents", knowledge_transfer="rapid")

    assert ("none", "prompt") == (body["rasd"]["knowledge_transfer"], body["rasd"]["context"])


REFUSED = {
    "no_repeat_ngram_size": Request(MESSAGES, SamplingParams(no_repeat_ngram_size=3)),
    "knowledge_transfer": Request(MESSAGES, SamplingParams(knowledge_transfer="mixture")),
    "context": Request(MESSAGES, context="documents"),
    "on_cut": Request(MESSAGES, SamplingParams(on_cut="raise")),
    "use_generation_config": Request(MESSAGES, SamplingParams(use_generation_config=False)),
    "scored": Request(MESSAGES, SamplingParams(scored=True)),
    "grammar": Request(MESSAGES, SamplingParams(grammar=Grammar("regex", "[a-z]+"))),
}  # fmt: skip


@pytest.mark.parametrize("card", [VLLM, OTHER], ids=["vllm", "other"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_another_server_cannot_follow_is_refused(name, card):
    """By name, before anything is sent."""
    with (
        fake_server(cards=[card]) as server,
        pytest.raises(ConfigurationError, match=f"^{name} is"),
    ):
        remote(server).generate(REFUSED[name])

    assert [] == server.bodies


@pytest.mark.parametrize("name", [*VLLMS, "chat_template_kwargs"])
def test_what_only_vllm_knows_is_refused_elsewhere(name):
    """An option that a server might ignore is not sent to it."""
    own = {"chat_template_kwargs": {"x": 1}} if name not in VLLMS else {}
    params = SamplingParams(**{n: v for n, v in VLLMS.items() if n == name})
    with (
        fake_server(cards=[OTHER]) as server,
        pytest.raises(ConfigurationError, match=f"^{name} is"),
    ):
        remote(server, **own).generate(Request(MESSAGES, params))

    assert [] == server.bodies


# --- tokens ---


@pytest.mark.parametrize("text", ["word", "a context " * 100], ids=["word", "context"])
@pytest.mark.parametrize("card", [RASD, VLLM], ids=["rasd", "vllm"])
def test_tokens_are_counted_by_the_server(card, text):
    """Beside /v1; a text's ids are kept, as splitters ask for the same words and contexts again and again."""
    says = [Says(body={"count": 2, "tokens": [5, 6]}), Says(body={"count": 9})]
    with fake_server(*says, cards=[card]) as server:
        engine = remote(server, chat_template_kwargs={"x": 1})
        assert [[5, 6], [5, 6], []] == [
            engine.encode(text),
            engine.encode(text),
            engine.encode(""),
        ]
        assert (9, 0) == (
            engine.count_tokens(MESSAGES, ToolUse.of([TOOL])),
            engine.count_tokens([]),
        )

    assert ["/v1/models", "/tokenize", "/tokenize"] == server.paths
    assert [
        {"model": "one", "prompt": text, "add_special_tokens": False},
        {"model": "one", "messages": MESSAGES, "tools": [TOOL], "chat_template_kwargs": {"x": 1}},
    ] == server.bodies


def test_a_server_that_does_not_count_is_not_asked_to():
    """Others have an endpoint of that name that does something else."""
    with (
        fake_server(cards=[OTHER]) as server,
        pytest.raises(ConfigurationError, match="counts tokens"),
    ):
        remote(server).encode("word")

    assert ["/v1/models"] == server.paths


def test_a_count_that_is_none_is_an_error():
    """A list that is missing is not an empty one."""
    with fake_server(Says(body={"x": 1})) as server, pytest.raises(ServerError, match="'tokens'"):
        remote(server).encode("word")


# --- keys and headers ---


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [("mine", "theirs", "mine"), (None, "theirs", "theirs"), (None, None, "none")],
)
def test_the_key(given, environment, expected, monkeypatch):
    """The option's, else the environment's, else one that says nothing."""
    from pydantic import SecretStr

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if environment:
        monkeypatch.setenv("OPENAI_API_KEY", environment)
    with fake_server() as server:
        remote(server, api_key=given and SecretStr(given)).generate(Request(MESSAGES))

    assert {f"Bearer {expected}"} == {headers["authorization"] for headers in server.headers}


def test_a_key_that_the_server_repeats_is_hidden():
    """Errors are logged."""
    from pydantic import SecretStr

    says = Says(status=401, body={"error": {"message": "Wrong key sk-abc."}})
    with fake_server(says) as server, pytest.raises(ServerError) as caught:
        remote(server, api_key=SecretStr("sk-abc")).generate(Request(MESSAGES))

    assert "sk-abc" not in str(caught.value)


async def test_the_clients_options_are_passed_on():
    """Headers of every request, of both clients."""
    with fake_server() as server:
        engine = remote(server, client_kwargs={"default_headers": {"x-tenant": "a"}})
        engine.generate(Request(MESSAGES))
        await engine.agenerate(Request(MESSAGES))
        engine.close()

    assert ["a"] * 3 == [headers["x-tenant"] for headers in server.headers]


async def test_a_client_of_ones_own_is_used_and_left_open():
    """A proxy of one of them must not be passed by in the other."""
    from openai import DefaultAsyncHttpxClient, DefaultHttpxClient

    given = {
        "http_client": DefaultHttpxClient(headers={"x-own": "sync"}),
        "http_async_client": DefaultAsyncHttpxClient(headers={"x-own": "async"}),
    }
    with fake_server() as server:
        engine = remote(server, client_kwargs=given)
        engine.generate(Request(MESSAGES))
        await engine.agenerate(Request(MESSAGES))
        engine.close()
        assert [False, False] == [client.is_closed for client in given.values()]
        half = remote(server, client_kwargs={"http_client": given["http_client"]})
        with pytest.raises(ConfigurationError, match=r"http_async_client.*Give both"):
            await half.agenerate(Request(MESSAGES))
    given["http_client"].close()
    await given["http_async_client"].aclose()

    assert ["sync", "sync", "async"] == [headers["x-own"] for headers in server.headers]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_url": "host:8000/v1"}, "must be an address"),
        ({"base_url": "http://me:secret@host/v1"}, "^(?!.*secret).*user and password"),
        ({"timeout": 0}, "timeout is 0"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"client_kwargs": {"api_key": "secret"}}, "^(?!.*secret).*Give api_key= itself"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options, words):
    """By name, with the limit; no secret is shown."""
    with pytest.raises(ConfigurationError, match=words):
        ServerOptions(**{"base_url": "http://host:8000/v1", **options})


def test_an_option_that_the_client_does_not_take_is_named():
    """The openai package's own word of it is a TypeError."""
    with (
        fake_server() as server,
        pytest.raises(ConfigurationError, match="client_kwargs has bogus"),
    ):
        remote(server, client_kwargs={"bogus": 1}).ensure_loaded()
