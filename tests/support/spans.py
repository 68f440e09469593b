"""OpenTelemetry spans for tests: a process has one tracer provider for good, and here each test its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def own_tracer() -> Iterator[None]:
    """Let the block set up a tracer, which the tests after it do not see."""
    trace = pytest.importorskip("opentelemetry.trace")
    from opentelemetry.util._once import Once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_TRACER_PROVIDER", None)
        patch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
        yield


@contextmanager
def recorded() -> Iterator[Any]:
    """Yield an exporter that keeps the spans of the block."""
    pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with own_tracer():
        trace.set_tracer_provider(provider)
        yield exporter
