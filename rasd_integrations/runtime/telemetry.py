"""OpenTelemetry spans of answers, by its conventions for generative AI; nothing where no tracer is set up."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from rasd_integrations._version import __version__
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import TextDelta

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer, TracerProvider

_NANOSECONDS = 1_000_000_000
_PROVIDER = "rasd"
# The options of a call that the conventions name.
_REQUEST = {
    "max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed",
    "stop": "stop_sequences",
}  # fmt: skip
_PARTS = ("retrieve", "prefill", "draft", "verify")


def _provider() -> TracerProvider | None:
    """Return what makes tracers, if the program has set it up."""
    if "opentelemetry.trace" not in sys.modules:  # who sets up a tracer imports it
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    return None if isinstance(provider, trace.ProxyTracerProvider) else provider


@contextmanager
def below_caller(headers: Mapping[str, str]) -> Iterator[None]:
    """Put spans of the block below the one that an HTTP request's headers name (``traceparent``).

    Not where a span is there already: what traces the server itself has read the headers.
    """
    if _provider() is None:
        yield
        return
    from opentelemetry import context, trace
    from opentelemetry.propagate import extract

    if trace.get_current_span().get_span_context().is_valid:
        yield
        return
    token = context.attach(extract(headers, context.get_current()))
    try:
        yield
    finally:
        context.detach(token)


class AnswerSpan:
    """The span of one answer, from when it is asked for; recorded once it is read, or fails.

    Its parent is the span around the call. It has options, counts and times, and never a text but stop strings.
    """

    def __init__(self, model: str, request: Request, stats: DecodingStats) -> None:
        """Begin an answer of ``model``, which ``stats`` count."""
        self._tracer: Tracer | None = None
        if (provider := _provider()) is None:
            return
        from opentelemetry import context

        self._tracer = provider.get_tracer("rasd_integrations", __version__)
        self._parent, self._began = context.get_current(), time.time_ns()
        self._model, self._request, self._stats = model, request, stats

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Record the span if the block, which checks and plans, fails."""
        try:
            yield
        except Exception as err:
            if self._tracer is not None:
                span = self._start(self._tracer)
                self._fail(span, err)
                span.end()
            raise

    def over(self, deltas: Generator[TextDelta, None, None]) -> Generator[TextDelta, None, None]:
        """Yield ``deltas``; the span ends with them, and when the consumer closes this iterator."""
        return deltas if self._tracer is None else self._recorded(deltas, self._tracer)

    def _recorded(
        self, deltas: Generator[TextDelta, None, None], tracer: Tracer
    ) -> Generator[TextDelta, None, None]:
        span = self._start(tracer)
        first_s: float | None = None
        reason: str | None = None
        try:
            with closing(deltas):
                for delta in deltas:
                    if first_s is None and delta.token_ids:
                        first_s = (time.time_ns() - self._began) / _NANOSECONDS
                    reason = delta.finish_reason
                    yield delta
        except BaseException as err:
            if not isinstance(err, GeneratorExit):
                self._fail(span, err)
            raise
        finally:
            if span.is_recording():
                self._tell(span, first_s, reason)
                self._add_parts(span, tracer)
            span.end()

    def _start(self, tracer: Tracer) -> Span:
        given = self._request.params
        does = "text_completion" if isinstance(self._request.prompt, str) else "chat"
        known: dict[str, Any] = {
            "gen_ai.operation.name": does,
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": self._model,
        }
        for option, name in _REQUEST.items():
            if (value := getattr(given, option)) is not None:
                known[f"gen_ai.request.{name}"] = value
        return tracer.start_span(
            f"{does} {self._model}",
            context=self._parent,
            attributes=known,
            start_time=self._began,
        )

    def _fail(self, span: Span, error: BaseException) -> None:
        """Set the span's status; an error's message may hold the caller's text."""
        from opentelemetry.trace import Status, StatusCode

        name = type(error).__name__
        span.set_attribute("error.type", name)
        span.set_status(Status(StatusCode.ERROR, name))

    def _tell(self, span: Span, first_s: float | None, reason: str | None) -> None:
        stats = self._stats
        told: dict[str, Any] = {
            "gen_ai.response.model": self._model,
            "gen_ai.usage.input_tokens": stats.prompt_tokens,
            "gen_ai.usage.output_tokens": stats.generated_tokens,
            "gen_ai.usage.cache_read.input_tokens": stats.cached_prompt_tokens,
            "gen_ai.usage.reasoning.output_tokens": stats.reasoning_tokens,
            "rasd.mode": stats.mode,
            "rasd.target_steps": stats.target_steps,
            "rasd.drafted_tokens": stats.drafted,
            "rasd.accepted_tokens": stats.accepted,
        }
        if first_s is not None:
            told["gen_ai.response.time_to_first_chunk"] = first_s
        if reason is not None:
            told["gen_ai.response.finish_reasons"] = (reason,)
        span.set_attributes(told)

    def _add_parts(self, span: Span, tracer: Tracer) -> None:
        """Add a child for the seconds of each part, one behind the other: steps and drafts take turns."""
        from opentelemetry.trace import set_span_in_context

        inside, at = set_span_in_context(span, self._parent), self._began
        for part in _PARTS:
            seconds: float = getattr(self._stats, f"{part}_s")
            if seconds > 0:
                child = tracer.start_span(part, context=inside, start_time=at)
                at += int(seconds * _NANOSECONDS)
                child.end(at)
