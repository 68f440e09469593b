"""Each answer makes one span with its counts and times, below the span of its caller, and says nothing of its text."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("opentelemetry.sdk.trace")

from fakes_prompting import FACTS, QUESTION, RANKED, ListSource, human
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from spans import own_tracer, recorded
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, PromptHints, SamplingParams
from rasd_integrations.config import RetrievalConfig
from rasd_integrations.errors import PromptError
from rasd_integrations.runtime.pipeline import Request

CHAT = [human("Tell me of the quick brown fox, the quick brown fox.")]
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
NAME = "chat LlamaForCausalLM"


def made(**options):
    return RASD.from_model(tiny_llama(), tiny_tokenizer(), memory=False, **options)


@pytest.fixture(scope="module")
def rasd():
    """A small model, loaded."""
    return made()


@pytest.fixture
def spans():
    """What keeps the spans of the test."""
    with recorded() as exporter:
        yield exporter


def answers(spans):
    """Return the spans of answers, without those of their parts and of their callers."""
    return [span for span in spans.get_finished_spans() if NAME.split()[1] in span.name]


def only(spans):
    (span,) = answers(spans)
    return span


def parts(spans):
    """Return the parts of the only answer, by name."""
    ours = only(spans).context.span_id
    found = [s for s in spans.get_finished_spans() if s.parent and s.parent.span_id == ours]
    return {span.name: span for span in found}


def seconds(span):
    return (span.end_time - span.start_time) / 1e9


def test_a_span_has_options_and_counts(rasd, spans):
    """Under OpenTelemetry's names; what the caller did not set is not there."""
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.5, seed=3, stop=("\x00",))
    answer = rasd.generate(CHAT, params)
    span, stats = only(spans), answer.stats
    assert (span.name, span.kind, span.status.status_code) == (
        NAME,
        trace.SpanKind.INTERNAL,
        StatusCode.UNSET,
    )
    told = dict(span.attributes)
    assert 0 < told.pop("gen_ai.response.time_to_first_chunk") <= seconds(span)
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "rasd",
        "gen_ai.request.model": "LlamaForCausalLM",
        "gen_ai.request.max_tokens": 24,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stop_sequences": ("\x00",),
        "gen_ai.response.model": "LlamaForCausalLM",
        "gen_ai.response.finish_reasons": (answer.finish_reason,),
        "gen_ai.usage.input_tokens": stats.prompt_tokens,
        "gen_ai.usage.output_tokens": len(answer.token_ids),
        "gen_ai.usage.cache_read.input_tokens": stats.cached_prompt_tokens,
        "gen_ai.usage.reasoning.output_tokens": 0,
        "rasd.mode": "lossless",
        "rasd.target_steps": stats.target_steps,
        "rasd.drafted_tokens": stats.drafted,
        "rasd.accepted_tokens": stats.accepted,
    }


def test_the_names_are_those_of_the_conventions(rasd, spans):
    """As the installed package lists them."""
    names = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    known = {value for name, value in vars(names).items() if name.startswith("GEN_AI_")}
    rasd.generate(
        CHAT, SamplingParams(max_tokens=2, top_p=0.5, top_k=2, temperature=1, stop="\x00")
    )
    told = {name for name in only(spans).attributes if name.startswith("gen_ai.")}
    assert told <= known
    assert len(told) == 15


def test_parts_last_as_long_as_the_counters_say(spans):
    """One behind the other from the answer's start, and not longer than it."""
    soon = RetrievalConfig(gate_share=1.0, gate_tokens=64, chunk_tokens=64)
    store = ListSource(RANKED)
    llm = made(drafter="self", store=store, retrieval=soon)
    prompt = "\n\n".join([*FACTS, f"Question: {QUESTION}"])
    stats = llm.generate(prompt, PARAMS, hints=PromptHints(question=QUESTION)).stats
    span, found = only(spans), parts(spans)
    assert list(found) == ["retrieve", "prefill", "draft", "verify"]
    took = {name: seconds(part) for name, part in found.items()}
    assert took == pytest.approx({n: getattr(stats, f"{n}_s") for n in took}, abs=1e-6)
    edges = [span.start_time, *(part.end_time for part in found.values())]
    assert [part.start_time for part in found.values()] == edges[:-1]
    assert edges[-1] <= span.end_time
    assert span.name == "text_completion LlamaForCausalLM"


def test_no_text_is_recorded(rasd, spans):
    """Neither of the prompt nor of the answer."""
    answer = rasd.generate(CHAT, PARAMS)
    shown = " ".join(span.to_json() for span in spans.get_finished_spans())
    assert "fox" not in shown
    assert json.dumps(answer.text)[1:-1] not in shown


def framework(kind):
    """Return one of the frameworks' models."""
    room, name = kind.split(".")
    pytest.importorskip("langchain_core" if room == "langchain" else "llama_index.core")
    cls = getattr(__import__(f"rasd_integrations.{room}", fromlist=[name]), name)
    return cls.from_model(tiny_llama(), tiny_tokenizer(), memory=False, max_tokens=4)


async def joined(pieces):
    return [piece async for piece in pieces]


ASKED = {
    "generate": lambda rasd: rasd.generate(CHAT, PARAMS),
    "stream": lambda rasd: list(rasd.stream(CHAT, PARAMS)),
    "explain": lambda rasd: rasd.explain(CHAT, PARAMS),
    "agenerate": lambda rasd: rasd.agenerate(CHAT, PARAMS),
    "astream": lambda rasd: joined(rasd.astream(CHAT, PARAMS)),
    "invoke": lambda _: framework("langchain.ChatRASD").invoke("Hi"),
    "ainvoke": lambda _: framework("langchain.ChatRASD").ainvoke("Hi"),
    "llm": lambda _: framework("langchain.RASDLLM").invoke("Hi"),
    "complete": lambda _: framework("llama_index.RASDLLM").complete("Hi"),
    "acomplete": lambda _: framework("llama_index.RASDLLM").acomplete("Hi"),
}
BATCHES = {
    "batch": lambda: framework("langchain.ChatRASD").batch(["Hi", "Ho"]),
    "abatch": lambda: framework("langchain.ChatRASD").abatch(["Hi", "Ho"]),
    "llm": lambda: framework("langchain.RASDLLM").batch(["Hi", "Ho"]),
}


async def below(spans, ask):
    """Return the answers' spans of a call in a span of its own, all of them its children."""
    with trace.get_tracer("test").start_as_current_span("request") as request:
        found = ask()
        if hasattr(found, "__await__"):
            await found
    ours = answers(spans)
    assert {span.parent.span_id for span in ours} == {request.get_span_context().span_id}
    assert {span.context.trace_id for span in ours} == {request.get_span_context().trace_id}
    return ours


@pytest.mark.parametrize("how", ASKED)
async def test_the_callers_span_is_the_parent(rasd, spans, how):
    """Of every form of call, also of those that answer in a thread."""
    assert len(await below(spans, lambda: ASKED[how](rasd))) == 1


@pytest.mark.parametrize("how", BATCHES)
async def test_a_batch_makes_a_span_for_each_answer(spans, how):
    """All below the caller's."""
    assert len(await below(spans, BATCHES[how])) == 2


def test_a_stream_belongs_to_the_span_that_it_was_asked_in(rasd, spans):
    """Not to that of its reader."""
    tracer = trace.get_tracer("test")
    with tracer.start_as_current_span("asks") as asks:
        deltas = rasd.stream(CHAT, PARAMS)
    with tracer.start_as_current_span("reads"):
        list(deltas)
    assert only(spans).parent.span_id == asks.get_span_context().span_id


def test_a_closed_stream_ends_its_span(rasd, spans):
    """It is no error, and has the counts so far."""
    deltas = rasd.stream(CHAT, PARAMS)
    next(delta for delta in deltas if delta.token_ids)
    assert answers(spans) == []
    deltas.close()
    span = only(spans)
    assert (span.status.status_code, "error.type" in span.attributes) == (StatusCode.UNSET, False)
    assert "gen_ai.response.finish_reasons" not in span.attributes
    assert 0 < span.attributes["gen_ai.usage.output_tokens"] < 24


def test_a_stream_that_is_never_read_makes_no_span(rasd, spans):
    """Nothing was decoded."""
    rasd.stream(CHAT, PARAMS).close()
    assert answers(spans) == []


def failing(_step):
    msg = "secret words"
    raise RuntimeError(msg)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request("", PARAMS), PromptError),
        (Request(CHAT, PARAMS, on_step=failing), RuntimeError),
    ],
    ids=["before", "while decoding"],
)
def test_an_error_is_the_spans_status(rasd, spans, request_, error):
    """By its class alone: messages quote what callers wrote."""
    with pytest.raises(error) as caught:
        rasd.generate(request_)
    span = only(spans)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, error.__name__)
    assert span.attributes["error.type"] == error.__name__
    assert str(caught.value) not in span.to_json()
    assert "secret" not in span.to_json()


@pytest.mark.parametrize("mode", ["route", "speculative-rag"])
def test_an_answer_of_several_is_one_span(spans, mode):
    """Its counts are those of the statistics."""
    llm = made(mode=mode, store=ListSource(RANKED))
    hints = PromptHints(question=QUESTION, chunks=RANKED[:6], context="\n\n".join(FACTS[:6]))
    prompt = "\n\n".join([*FACTS[:6], f"Question: {QUESTION}"])
    stats = llm.generate(prompt, PARAMS, hints=hints).stats
    told = only(spans).attributes
    assert told["rasd.target_steps"] == stats.target_steps
    assert told["gen_ai.usage.input_tokens"] == stats.prompt_tokens


def test_without_a_tracer_answers_are_the_same(rasd, spans):
    """And nothing is recorded."""
    expected = rasd.generate(CHAT, PARAMS).text
    with own_tracer():
        assert rasd.generate(CHAT, PARAMS).text == expected
    assert len(answers(spans)) == 1
