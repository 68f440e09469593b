"""Answers of a server are children of the span that the request names, over real HTTP."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk.trace")

from opentelemetry import trace
from opentelemetry.propagate import inject
from served import engines_over, served
from spans import own_tracer, recorded
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.runtime.telemetry import below_caller
from rasd_integrations.serving.server.app import build_app

BODY = {"max_tokens": 4, "ignore_eos": True}
CHAT = BODY | {"messages": [{"role": "user", "content": "Who?"}]}
NAME = "LlamaForCausalLM"


def untraced(server):
    """Return the application without the spans that FastAPI makes in its latest versions: as earlier ones run it."""
    app = build_app(server)

    async def run(scope, receive, send):
        await app({**scope, "fastapi.telemetry": None}, receive, send)

    return run


@pytest.fixture(scope="module", params=["alone", "below FastAPI's spans"])
def server(request):
    """Serve a random model."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "alone":
            patch.setattr("served.build_app", untraced)
        with served(engines_over(tiny_llama(), tiny_tokenizer(), memory=False)) as found:
            yield found


@pytest.fixture
def spans():
    """What keeps the spans of the test."""
    with recorded() as exporter:
        yield exporter


def ask(server, body, headers, path="chat/completions"):
    """Return a whole response; the server's places are then free."""
    got = httpx.post(f"{server.base_url}/{path}", json=body, headers=headers, timeout=60)
    assert server.settles()
    return got


def callers(spans):
    """Return for each answer the context of the first span above it that the server did not make, if any."""
    ends = time.monotonic() + 5
    while time.monotonic() < ends:
        made = {span.context.span_id: span for span in spans.get_finished_spans()}
        with suppress(KeyError):  # a span of the server's ends after its response
            return [_above(s, made) for s in made.values() if s.name.endswith(NAME)]
        time.sleep(0.01)
    pytest.fail("the server's spans did not end")


def _above(span, made):
    while span.parent is not None and not span.parent.is_remote:
        span = made[span.parent.span_id]
    return span.parent


def called(server, body, path="chat/completions"):
    """Ask inside a span; return its context and the response."""
    headers: dict[str, str] = {}
    with trace.get_tracer("test").start_as_current_span("caller") as span:
        inject(headers)
    assert "traceparent" in headers
    return span.get_span_context(), ask(server, body, headers, path)


REQUESTS = {
    "whole": (CHAT, "chat/completions", 1),
    "streamed": (CHAT | {"stream": True}, "chat/completions", 1),
    "three answers": (CHAT | {"n": 3, "temperature": 1.0}, "chat/completions", 3),
    "two texts": (BODY | {"prompt": ["Once", "upon"]}, "completions", 2),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_answers_are_children_of_the_callers_span(server, spans, case):
    """Each of a request, in the caller's trace."""
    body, path, count = REQUESTS[case]
    caller, got = called(server, body, path)
    assert got.status_code == 200
    found = [(one.span_id, one.trace_id) for one in callers(spans)]
    assert [(caller.span_id, caller.trace_id)] * count == found


def test_requests_at_once_keep_their_callers_apart(server, spans):
    """Each answer is in the trace of its own request."""
    with ThreadPoolExecutor(4) as pool:
        asked = [*pool.map(lambda _: called(server, CHAT)[0].span_id, range(8))]
    assert len(set(asked)) == 8
    assert sorted(asked) == sorted(one.span_id for one in callers(spans))


@pytest.mark.parametrize("given", [None, "", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_without_a_caller_an_answer_begins_a_trace(server, spans, given):
    """Also where the header is none; and nothing is left of an earlier request's."""
    caller, _ = called(server, CHAT)
    assert ask(server, CHAT, {} if given is None else {"traceparent": given}).status_code == 200
    first, second = callers(spans)
    assert (first.span_id, second) == (caller.span_id, None)


def test_a_servers_own_span_stays_between(spans):
    """What traces the server itself has read the header; an answer is below that span."""
    headers: dict[str, str] = {}
    tracer = trace.get_tracer("test")
    with tracer.start_as_current_span("caller"):
        inject(headers)
    with tracer.start_as_current_span("server") as own, below_caller(headers):
        assert trace.get_current_span() is own
    with below_caller(headers):
        assert trace.get_current_span().get_span_context().is_remote
    assert not trace.get_current_span().get_span_context().is_valid


def test_without_a_tracer_nothing_is_read(monkeypatch):
    """The header is not looked at: its reader is not even imported."""
    monkeypatch.setitem(sys.modules, "opentelemetry.propagate", None)  # an import raises
    with own_tracer(), below_caller({"traceparent": "00-" + "1" * 32 + "-" + "1" * 16 + "-01"}):
        assert not trace.get_current_span().get_span_context().is_valid
    with recorded(), pytest.raises(ImportError), below_caller({}):
        pass
