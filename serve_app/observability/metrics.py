"""Metrics of the ingress: what clients experience, with the field's suffixes and buckets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve_app.config.sections_cost import SloSection
from serve_app.observability.activity import Activity
from serve_app.observability.histogram import WeightedHistogram
from serve_app.observability.log_metrics import LostLines

PREFIX = "xeray_"

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKEN_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip

REPLICA_STATES = ("loading", "ready", "draining", "stuck", "dead")
_WHOLE = frozenset({"stop", "length", "tool_calls"})
"""Finish reasons of an answer that its client got whole."""

_SEQUENCE_HISTOGRAMS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("time_to_first_token_seconds", "Arrival to first token, seconds.", TTFT_BUCKETS),
    ("e2e_request_latency_seconds", "Arrival to last token, seconds.", REQUEST_BUCKETS),
    ("request_queue_time_seconds", "Waiting for the engine, seconds.", REQUEST_BUCKETS),
    ("request_prefill_time_seconds", "Scheduled to first token, seconds.", REQUEST_BUCKETS),
    ("request_decode_time_seconds", "First to last token, seconds.", REQUEST_BUCKETS),
    ("request_time_per_output_token_seconds", "Mean per token after the first.", ITL_BUCKETS),
    ("request_prompt_tokens", "Prompt tokens of a sequence.", TOKEN_BUCKETS),
    ("request_generation_tokens", "Generated tokens of a sequence.", TOKEN_BUCKETS),
)


class IngressMetrics:
    """Counters and histograms of one ingress replica, in a registry of their own.

    All times are seconds. `replica_id` becomes the `replica` label when texts are merged. `on_ttft`
    is told each time to first token. `slo` says which sequences count as goodput.
    """

    def __init__(
        self, model_name: str, replica_id: str = "ingress", slo: SloSection | None = None
    ) -> None:
        self.replica_id = replica_id
        self.registry = CollectorRegistry()
        self.activity = Activity()
        self.on_ttft: Callable[[float], None] = lambda seconds: None
        self._model_name = model_name
        self._http_requests = self._counter(
            "http_requests_total", "HTTP requests by endpoint and status.", "endpoint", "status"
        )
        self._inflight = self._gauge(
            "http_requests_in_flight", "Inference requests that this ingress replica works on."
        )
        self._success = self._counter(
            "request_success_total",
            "Finished sequences by finish reason.",
            "model_name",
            "finished_reason",
        )
        self._key_tokens = self._counter(
            "key_tokens_total",
            "Tokens of finished sequences by API key (its name) and kind.",
            "key",
            "kind",
        )
        self._key_sequences = self._counter(
            "key_sequences_total", "Finished sequences by API key (its name).", "key"
        )
        self._retried = self._counter(
            "requests_retried_total",
            "Sequences that were sent to another replica before their first token.",
        )
        self._moved = self._counter(
            "requests_moved_total",
            "Sequences that left a full replica's queue for another one that had a place.",
        )
        self._continued = self._counter(
            "streams_continued_total",
            "Sequences that went on at another replica after they had tokens.",
        )
        self._served_by = self._counter(
            "served_by_total",
            "Answered inference requests by who answered: local or fallback.",
            "served_by",
        )
        self._replicas = self._gauge(
            "replicas", "Model replicas by state, as this ingress replica sees them.", "state"
        )
        self.set_replicas(())
        self.registry.register(LostLines())
        self._slo = _SloMetrics(model_name, slo or SloSection(), self.registry)
        self._make_histograms()

    def _make_histograms(self) -> None:
        # Existing dashboards name this one so, without a prefix.
        self._latency = Histogram(
            "inference_latency_seconds",
            "End to end time of an inference request, seconds.",
            ("model_name",),
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        ).labels(self._model_name)
        (
            self._ttft,
            self._e2e,
            self._queue,
            self._prefill,
            self._decode,
            self._tpot,
            self._prompt_tokens,
            self._generation_tokens,
        ) = (self._histogram(*spec) for spec in _SEQUENCE_HISTOGRAMS)
        self._itl = WeightedHistogram(
            f"{PREFIX}inter_token_latency_seconds",
            "Time between tokens, seconds; gathered tokens share their interval evenly.",
            ITL_BUCKETS,
            {"model_name": self._model_name},
        )
        self.registry.register(self._itl)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help_text, labels, registry=self.registry)

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            PREFIX + name, help_text, ("model_name",), buckets=buckets, registry=self.registry
        ).labels(self._model_name)

    def count_request(self, endpoint: str, status: int) -> None:
        """Count an answered HTTP request; `endpoint` is a route's template, never a raw path."""
        self._http_requests.labels(endpoint, str(status)).inc()

    def count_key_tokens(self, key: str, num_prompt: int, num_generated: int) -> None:
        """Count the tokens of a sequence that the API key named `key` asked for."""
        self._key_sequences.labels(key).inc()
        self._key_tokens.labels(key, "prompt").inc(num_prompt)
        self._key_tokens.labels(key, "generation").inc(num_generated)

    def count_retry(self) -> None:
        """Count a sequence that another replica is asked for, before its first token."""
        self._retried.inc()

    def count_moved(self) -> None:
        """Count a sequence that waited at a full replica and is sent to one that has room."""
        self._moved.inc()

    def count_continued(self) -> None:
        """Count a sequence that has its next token from another replica."""
        self._continued.inc()

    def set_in_flight(self, count: int) -> None:
        """Report how many inference requests are being worked on."""
        self._inflight.set(count)
        self.activity.num_in_flight = count

    def set_replicas(self, states: Iterable[str]) -> None:
        """Report the state of each model replica that is known."""
        counts = dict.fromkeys(REPLICA_STATES, 0)
        for state in states:
            counts[state] = counts.get(state, 0) + 1
        for state, count in counts.items():
            self._replicas.labels(state).set(count)

    def count_served(self, by: str) -> None:
        """Count an answered inference request; `by` is local or fallback."""
        self._served_by.labels(by).inc()
        self.activity.note_served(by)

    def observe_latency(self, seconds: float) -> None:
        """Observe an inference request's time from arrival to the end of the answer."""
        self._latency.observe(seconds)

    def start_sequence(self, arrival_s: float) -> SequenceTimer:
        """Return a timer for one sequence; `arrival_s` is the arrival on `time.monotonic`."""
        return SequenceTimer(self, arrival_s)

    def render(self) -> str:
        """Return this replica's samples as Prometheus text."""
        return generate_latest(self.registry).decode()

    def _finish(self, timer: SequenceTimer, reason: str, now_s: float) -> None:
        self._success.labels(self._model_name, reason).inc()
        self._e2e.observe(now_s - timer.arrival_s)
        self._prompt_tokens.observe(timer.num_prompt)
        self._generation_tokens.observe(timer.num_generated)
        tpot_s = timer.tpot_s
        self.activity.note_finish(tpot_s, timer.num_generated)
        if timer.first_token_s is None:
            return
        self._decode.observe(timer.last_token_s - timer.first_token_s)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)
        if reason in _WHOLE:
            self._slo.judge(timer.first_token_s - timer.arrival_s, tpot_s)


class _SloMetrics:
    """Goodput: whole sequences that met the configured limits, and those that were judged."""

    def __init__(self, model_name: str, section: SloSection, registry: CollectorRegistry) -> None:
        self._ttft_s, self._tpot_s = section.ttft_ms / 1000, section.tpot_ms / 1000
        self._judged, self._good = (
            Counter(PREFIX + name, text, ("model_name",), registry=registry).labels(model_name)
            for name, text in (
                ("slo_sequences_total", "Whole sequences, judged by the SLO."),
                ("goodput_sequences_total", "Whole sequences that met each limit of the SLO."),
            )
        )
        limit = Gauge(
            f"{PREFIX}slo_limit_seconds",
            "Configured limit of the SLO, by kind (ttft, tpot).",
            ("kind",),
            registry=registry,
        )
        limit.labels("ttft").set(self._ttft_s)
        limit.labels("tpot").set(self._tpot_s)

    def judge(self, ttft_s: float, tpot_s: float | None) -> None:
        """Count a whole sequence; one of a single token has no time per token."""
        self._judged.inc()
        if ttft_s <= self._ttft_s and (tpot_s is None or tpot_s <= self._tpot_s):
            self._good.inc()


class SequenceTimer:
    """Times of one sequence's tokens, as they reach the ingress."""

    __slots__ = (
        "_metrics",
        "arrival_s",
        "first_token_s",
        "last_token_s",
        "num_first",
        "num_generated",
        "num_prompt",
    )

    def __init__(self, metrics: IngressMetrics, arrival_s: float) -> None:
        self._metrics = metrics
        self.arrival_s = arrival_s
        self.first_token_s: float | None = None
        self.last_token_s = arrival_s
        self.num_first = 0
        self.num_generated = 0
        self.num_prompt = 0

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after those that came first; None where none did."""
        num_later = self.num_generated - self.num_first
        if self.first_token_s is None or num_later <= 0:
            return None
        return (self.last_token_s - self.first_token_s) / num_later

    def on_tokens(self, num_prompt: int, num_generated: int) -> None:
        """Note that `num_generated` tokens (so far) have arrived; cheap, called for each chunk."""
        num_new = num_generated - self.num_generated
        if num_new <= 0:
            return
        now_s = time.monotonic()
        if self.first_token_s is None:
            self.first_token_s = now_s
            self.num_prompt = num_prompt
            self.num_first = num_new
            self._metrics._ttft.observe(now_s - self.arrival_s)
            self._metrics.activity.note_first_token(now_s - self.arrival_s)
            self._metrics.on_ttft(now_s - self.arrival_s)
        else:
            self._metrics._itl.observe((now_s - self.last_token_s) / num_new, num_new)
        self.last_token_s = now_s
        self.num_generated = num_generated

    def on_engine_times(self, queue_time_s: float | None, engine_ttft_s: float | None) -> None:
        """Note the engine's own times, which come with the first chunk."""
        if queue_time_s is not None:
            self._metrics._queue.observe(queue_time_s)
            if engine_ttft_s is not None:
                self._metrics._prefill.observe(max(0.0, engine_ttft_s - queue_time_s))

    def on_finish(self, reason: str, num_prompt: int) -> None:
        """Note the end: a finish reason, or `abort` or `error`."""
        self.num_prompt = num_prompt or self.num_prompt
        self._metrics._finish(self, reason, time.monotonic())
