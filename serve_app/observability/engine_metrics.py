"""Metrics of one engine, taken from its `EngineStats`; the model replica renders them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve_app.core.events import EngineStats
from serve_app.observability.histogram import WeightedHistogram
from serve_app.observability.log_metrics import LostLines
from serve_app.observability.metrics import PREFIX

ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("num_requests_running", "num_running", "Sequences in the running batch."),
    ("num_requests_waiting", "num_waiting", "Sequences that wait to be scheduled."),
    (
        "max_num_requests_running",
        "max_num_running",
        "Most sequences that ran at once since the batching toggles last changed.",
    ),
    ("kv_cache_usage_perc", "kv_cache_usage", "Share of KV blocks in use (1 is all)."),
    ("kv_blocks", "num_blocks", "KV blocks in all."),
    (
        "memory_bandwidth_limit_bytes",
        "bandwidth_limit_bytes",
        "Measured copy bandwidth of the device, bytes per second (0: not measured).",
    ),
    (
        "memory_bandwidth_share",
        "bandwidth_share",
        "Share of that limit that the last step's reads reached (1 is all).",
    ),
    ("kv_blocks_cached", "num_cached_blocks", "KV blocks kept for prefix hits, reclaimable."),
)
_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("prompt_tokens", "num_prompt_tokens_total", "Prompt tokens taken in."),
    ("generation_tokens", "num_generation_tokens_total", "Tokens generated."),
    ("num_preemptions", "num_preemptions_total", "Sequences preempted for lack of KV blocks."),
    (
        "prefix_cache_queries",
        "num_prefix_queries_tokens_total",
        "Prompt tokens looked up in the prefix cache.",
    ),
    (
        "prefix_cache_hits",
        "num_prefix_hit_tokens_total",
        "Prompt tokens found in the prefix cache.",
    ),
    ("engine_steps", "num_steps_total", "Engine steps."),
    ("engine_step_seconds", "step_time_s_total", "Time spent in engine steps, seconds."),
    ("num_joins", "num_joins_total", "Sequences that joined a batch which was already decoding."),
    (
        "num_chunked_prefills",
        "num_chunked_prefills_total",
        "Prefills that took more than one step.",
    ),
    ("num_aborted", "num_aborted_total", "Sequences aborted."),
    (
        "num_cache_releases",
        "num_cache_releases_total",
        "Times that unused device memory was given back under pressure.",
    ),
    ("num_shed", "num_shed_total", "Sequences ended for lack of device memory."),
    ("spec_decode_num_drafts", "num_drafts_total", "Drafts of speculative decoding."),
    (
        "spec_decode_num_draft_tokens",
        "num_draft_tokens_total",
        "Tokens in drafts of speculative decoding.",
    ),
    (
        "spec_decode_num_accepted_tokens",
        "num_accepted_tokens_total",
        "Tokens of drafts that the model would have chosen itself.",
    ),
)


class EngineMetrics(Collector):
    """Turns the engine's latest statistics into samples with the label `model_name`.

    `update` may be called from one thread while another renders.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._stats = EngineStats()
        self._operator_seconds: dict[str, float] = {}
        self._updated_s: float | None = None
        self._bytes_per_s = 0.0
        self._iteration_tokens = WeightedHistogram(
            f"{PREFIX}iteration_tokens_total",
            "Tokens per engine step; steps between two updates count with their mean.",
            ITERATION_BUCKETS,
            {"model_name": model_name},
        )
        self.registry.register(self._iteration_tokens)
        self.registry.register(self)
        self.registry.register(LostLines())

    def update(self, stats: EngineStats, now_s: float | None = None) -> None:
        """Take over `stats` (counters since the engine's start); `now_s` is monotonic seconds.

        After a respawn the engine's counters restart; Prometheus sees a reset, as it should.
        """
        now_s = time.monotonic() if now_s is None else now_s
        last = self._stats
        num_steps = stats.num_steps_total - last.num_steps_total
        if num_steps > 0:
            num_tokens = stats.num_scheduled_tokens_total - last.num_scheduled_tokens_total
            self._iteration_tokens.observe(max(0, num_tokens) / num_steps, num_steps)
        num_bytes = stats.weight_bytes_read_total - last.weight_bytes_read_total
        num_bytes += stats.kv_bytes_read_total - last.kv_bytes_read_total
        if self._updated_s is not None and now_s > self._updated_s:
            self._bytes_per_s = max(0, num_bytes) / (now_s - self._updated_s)
        self._updated_s = now_s
        self._stats = stats

    def set_operator_seconds(self, seconds: Mapping[str, float]) -> None:
        """Tell how long each operator took over the steps of the last profile."""
        self._operator_seconds = dict(seconds)

    def describe(self) -> Iterable[Metric]:
        """Return no families: names are checked by the tests, not at registration."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Yield gauges and counters of the latest statistics."""
        stats, labels = self._stats, (self._model_name,)
        for name, attribute, help_text in _GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, help_text, labels=("model_name",))
            gauge.add_metric(labels, float(getattr(stats, attribute)))
            yield gauge
        for name, attribute, help_text in _COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, help_text, labels=("model_name",))
            counter.add_metric(labels, float(getattr(stats, attribute)))
            yield counter
        if self._operator_seconds:
            times = CounterMetricFamily(
                f"{PREFIX}operator_seconds",
                "Own time of the largest operators over the last profile's steps, seconds.",
                labels=("op", "model_name"),
            )
            for name, seconds in self._operator_seconds.items():
                times.add_metric((name, self._model_name), seconds)
            yield times
        # Existing dashboards name this one so, without a prefix.
        bandwidth = GaugeMetricFamily(
            "memory_bandwidth_bytes",
            "Memory bandwidth, bytes per second.",
            labels=("source", "model_name"),
        )
        bandwidth.add_metric(("engine", self._model_name), self._bytes_per_s)
        yield bandwidth

    def render(self) -> str:
        """Return the engine's samples as Prometheus text."""
        return generate_latest(self.registry).decode()
