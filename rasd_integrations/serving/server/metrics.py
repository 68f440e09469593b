"""What Prometheus reads of a server; no label says who asked, or what."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rasd_integrations.stats import DecodingStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
_TOKENS = tuple(2**n for n in range(18))


class Metrics:
    """Counters of one server."""

    def __init__(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Count nothing yet; the arguments say how many answers run and wait."""
        self.registry = own = CollectorRegistry()
        self._requests = Counter(
            "rasd_requests", "HTTP requests, by path and status.", ("path", "status"), registry=own
        )
        self._request_s = Histogram(
            "rasd_request_seconds", "Time of a request.", ("path",), buckets=_SECONDS, registry=own
        )
        self._first_s = Histogram(
            "rasd_time_to_first_token_seconds", "From the request to its first token.",
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self._token_s = Histogram(
            "rasd_time_per_output_token_seconds", "Of an answer, after its first token.",
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self._prompt = Histogram(
            "rasd_prompt_tokens", "Tokens of a prompt.", buckets=_TOKENS, registry=own
        )
        self._answer = Histogram(
            "rasd_generation_tokens", "Tokens of an answer.", buckets=_TOKENS, registry=own
        )
        told = {
            "rasd_prompt_tokens_cached": "Prompt tokens whose keys and values were known.",
            "rasd_target_steps": "Steps of the target.",
            "rasd_retrieve_seconds": "Time in stores.",
            "rasd_prefill_seconds": "Time in prefills.",
            "rasd_draft_seconds": "Time of drafting.",
            "rasd_verify_seconds": "Time in steps.",
        }
        self._sums = {name: Counter(name, text, registry=own) for name, text in told.items()}
        self._drafted = Counter(
            "rasd_draft_tokens", "Verified draft tokens, by drafter.", ("drafter",), registry=own
        )
        self._accepted = Counter(
            "rasd_accepted_tokens", "Accepted draft tokens, by drafter.", ("drafter",), registry=own
        )
        for name, text, read in (
            ("rasd_running", "Answers that are being decoded.", running),
            ("rasd_waiting", "Answers in the queue.", waiting),
        ):
            Gauge(name, text, registry=own).set_function(read)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that ended."""
        self._requests.labels(path, status).inc()
        self._request_s.labels(path).observe(seconds)

    def answer(self, stats: DecodingStats, first_s: float, rest_s: float) -> None:
        """Count an answer: seconds to its first token, and from there to its last."""
        self._first_s.observe(first_s)
        if stats.generated_tokens > 1:
            self._token_s.observe(rest_s / (stats.generated_tokens - 1))
        self._prompt.observe(stats.prompt_tokens)
        self._answer.observe(stats.generated_tokens)
        values = (
            stats.cached_prompt_tokens, stats.target_steps,
            stats.retrieve_s, stats.prefill_s, stats.draft_s, stats.verify_s,
        )  # fmt: skip
        for counter, value in zip(self._sums.values(), values, strict=True):
            counter.inc(max(value, 0))
        for name, drafter in stats.drafters.items():
            self._drafted.labels(name).inc(drafter.drafted)
            self._accepted.labels(name).inc(drafter.accepted)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)
