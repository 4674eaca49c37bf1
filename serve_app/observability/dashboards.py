"""Grafana's dashboards: one definition, rendered into cluster/grafana/dashboards/*.json.

`xeray monitor --render cluster` writes the files; a test compares them with what this renders, and
each metric's name with what the code really exposes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from serve_app.observability.rules import INFERENCE

DATASOURCE = {"type": "prometheus", "uid": "xeray-prometheus"}
RATE_INTERVAL = "$__rate_interval"
_WIDTH = 24
_HEIGHT = 8
_STAT_HEIGHT = 4


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression, and the legend of its series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel; `unit` is one of Grafana's, `width` of 24 columns."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 12
    is_stat: bool = False
    max_value: float | None = None
    description: str = ""


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A dashboard; its `name` is its file's."""

    name: str
    title: str
    panels: tuple[Panel, ...]


def _rate(metric: str, by: str = "", labels: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{labels}[{RATE_INTERVAL}]))"


def _stat(title: str, expr: str, unit: str, description: str = "") -> Panel:
    return Panel(title, (Query(expr),), unit, 4, is_stat=True, description=description)


def _quantiles(title: str, metric: str) -> Panel:
    queries = tuple(Query(f"xeray:{metric}:p{p}", f"p{p}") for p in (50, 95, 99))
    return Panel(title, queries, "s")


OVERVIEW = Dashboard(
    "overview",
    "XeRay: overview",
    (
        _stat("Requests", "xeray:http_requests:rate", "reqps"),
        _stat("Generated tokens", "xeray:generation_tokens:rate", "short"),
        _stat("p99 first token", "xeray:time_to_first_token_seconds:p99", "s"),
        _stat("Goodput", "xeray:goodput:ratio", "percentunit", "Sequences that met the SLO."),
        _stat("Errors", "xeray:errors:ratio", "percentunit", "Inference requests with 5xx."),
        _stat("Ready replicas", 'max(xeray_replicas{state="ready"})', "short"),
        Panel(
            "Requests by status",
            (Query(_rate("xeray_http_requests_total", "status", INFERENCE), "{{status}}"),),
            "reqps",
        ),
        Panel(
            "Tokens",
            (
                Query(_rate("xeray_prompt_tokens_total"), "prompt"),
                Query(_rate("xeray_generation_tokens_total"), "generated"),
            ),
        ),
        Panel(
            "Sequences by finish reason",
            (
                Query(
                    _rate("xeray_request_success_total", "finished_reason"), "{{finished_reason}}"
                ),
            ),
        ),
        Panel(
            "Answered by", (Query(_rate("xeray_served_by_total", "served_by"), "{{served_by}}"),)
        ),
        Panel(
            "Running and waiting sequences",
            (
                Query("sum(xeray_num_requests_running)", "running"),
                Query("sum(xeray_num_requests_waiting)", "waiting"),
            ),
        ),
        Panel(
            "KV cache",
            (Query("max by (replica) (xeray_kv_cache_usage_perc)", "{{replica}}"),),
            "percentunit",
            max_value=1,
        ),
        Panel("Prefix cache hits", (Query("xeray:prefix_cache_hits:ratio"),), "percentunit"),
        Panel(
            "Tokens by key",
            (Query(_rate("xeray_key_tokens_total", "key, kind"), "{{key}} {{kind}}"),),
        ),
    ),
)

CARDS = Dashboard(
    "cards",
    "XeRay: cards and hosts",
    (
        Panel(
            "Busy by engine",
            (Query("intel_gpu_utilization", "{{instance}} {{card}} {{engine}}"),),
            "percentunit",
            max_value=1,
        ),
        Panel(
            "Memory",
            (Query("xeray_gpu_memory_used_bytes", "{{instance}} {{card}}"),),
            "bytes",
        ),
        Panel("Power", (Query("xeray_gpu_power_watts", "{{instance}} {{card}}"),), "watt"),
        Panel(
            "Temperature",
            (Query("xeray_gpu_temperature_celsius", "{{instance}} {{card}} {{sensor}}"),),
            "celsius",
        ),
        Panel(
            "Clock",
            (Query('xeray_gpu_frequency_hertz{kind="actual"}', "{{instance}} {{card}} {{gt}}"),),
            "hertz",
        ),
        Panel(
            "Held down",
            (Query("max by (instance, card) (xeray_gpu_throttled)", "{{instance}} {{card}}"),),
            max_value=1,
        ),
        Panel(
            "Memory bandwidth",
            (
                Query('memory_bandwidth_bytes{source="engine"}', "engine {{replica}}"),
                Query('memory_bandwidth_bytes{source="imc"}', "processor {{instance}}"),
            ),
            "Bps",
        ),
        Panel("Processors", (Query("xeray_host_cpu_utilization", "{{instance}}"),), "percentunit"),
        Panel(
            "Free memory of the host",
            (Query("xeray_host_memory_available_bytes", "{{instance}}"),),
            "bytes",
        ),
    ),
)

LATENCY = Dashboard(
    "latency",
    "XeRay: latency",
    (
        _quantiles("Time to first token", "time_to_first_token_seconds"),
        _quantiles("Time per output token", "request_time_per_output_token_seconds"),
        _quantiles("Time between tokens", "inter_token_latency_seconds"),
        _quantiles("End to end", "e2e_request_latency_seconds"),
        _quantiles("Waiting for the engine", "request_queue_time_seconds"),
        Panel(
            "Mean step of the engine",
            (
                Query(
                    f"{_rate('xeray_engine_step_seconds_total', 'replica')}"
                    f" / {_rate('xeray_engine_steps_total', 'replica')}",
                    "{{replica}}",
                ),
            ),
            "s",
        ),
        Panel(
            "Mean tokens per step",
            (
                Query(
                    f"{_rate('xeray_iteration_tokens_total_sum', 'replica')}"
                    f" / {_rate('xeray_iteration_tokens_total_count', 'replica')}",
                    "{{replica}}",
                ),
            ),
        ),
        Panel(
            "Preemptions",
            (Query(_rate("xeray_num_preemptions_total", "replica"), "{{replica}}"),),
        ),
        Panel(
            "First tokens within a time",
            (Query(_rate("xeray_time_to_first_token_seconds_bucket", "le"), "{{le}} s"),),
        ),
        Panel(
            "End to end, mean",
            (
                Query(
                    f"{_rate('inference_latency_seconds_sum')}"
                    f" / {_rate('inference_latency_seconds_count')}"
                ),
            ),
            "s",
        ),
        Panel(
            "Drafted tokens that held",
            (
                Query(
                    f"{_rate('xeray_spec_decode_num_accepted_tokens_total', 'replica')}"
                    f" / clamp_min({_rate('xeray_spec_decode_num_draft_tokens_total', 'replica')}"
                    ", 1e-9)",
                    "{{replica}}",
                ),
            ),
            "percentunit",
            max_value=1,
            description="Speculative decoding; 0 where engine.speculative is off.",
        ),
    ),
)

AUTOSCALING = Dashboard(
    "autoscaling",
    "XeRay: autoscaling",
    (
        Panel("Replicas by state", (Query("max by (state) (xeray_replicas)", "{{state}}"),)),
        Panel(
            "Replicas that Ray Serve aims at",
            (
                Query(
                    "max by (deployment) (ray_serve_autoscaling_target_replicas)", "{{deployment}}"
                ),
            ),
            description="From Ray's own metrics, for deployments with autoscaling.",
        ),
        Panel(
            "Waiting sequences per replica",
            (Query("max by (replica) (xeray_num_requests_waiting)", "{{replica}}"),),
        ),
        Panel(
            "Running sequences per replica",
            (Query("max by (replica) (xeray_num_requests_running)", "{{replica}}"),),
        ),
        Panel(
            "KV cache per replica",
            (Query("max by (replica) (xeray_kv_cache_usage_perc)", "{{replica}}"),),
            "percentunit",
            max_value=1,
        ),
        Panel("p95 first token", (Query("xeray:time_to_first_token_seconds:p95"),), "s"),
        Panel(
            "Requests in flight per ingress replica",
            (Query("max by (replica) (xeray_http_requests_in_flight)", "{{replica}}"),),
        ),
        Panel(
            "Since the engine's last progress",
            (Query("max by (replica) (xeray_replica_progress_age_seconds)", "{{replica}}"),),
            "s",
        ),
    ),
)

COST = Dashboard(
    "cost",
    "XeRay: energy and cost",
    (
        _stat("Per 1,000 generated tokens", "xeray:cost_per_1k_tokens", "short"),
        _stat("Per request", "xeray:cost_per_request", "short"),
        _stat("Per hour", "xeray:cost_per_hour", "short"),
        _stat("Tokens per joule", "xeray:tokens_per_joule", "short"),
        _stat("Power", "xeray:power_watts:sum", "watt"),
        _stat("Goodput", "xeray:goodput:rate", "short", "Sequences a second that met the SLO."),
        Panel(
            "Power by replica",
            (Query("max by (replica, source) (xeray_power_watts)", "{{replica}} ({{source}})"),),
            "watt",
            description="card and package are read from counters, configured from the config.",
        ),
        Panel(
            "Cost of an hour by kind",
            (
                Query(
                    f"{_rate('xeray_cost_total', 'kind, currency')} * 3600", "{{kind}} {{currency}}"
                ),
            ),
        ),
        Panel(
            "Cost per 1,000 generated tokens",
            (Query("xeray:cost_per_1k_tokens", "{{currency}}"),),
        ),
        Panel("Tokens per joule", (Query("xeray:tokens_per_joule"),)),
        Panel("Sequences by key", (Query(_rate("xeray_key_sequences_total", "key"), "{{key}}"),)),
        Panel(
            "Budget of an hour",
            (
                Query("xeray:cost_per_hour", "cost"),
                Query("max by (currency) (xeray_cost_budget_per_hour)", "budget"),
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, CARDS, LATENCY, AUTOSCALING, COST)


def render_dashboard(dashboard: Dashboard) -> str:
    """Return the dashboard as Grafana's JSON."""
    document: dict[str, Any] = {
        "uid": f"xeray-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["xeray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "title": "XeRay",
                "tags": ["xeray"],
                "asDropdown": True,
                "keepTime": True,
            }
        ],
        "panels": _place(dashboard.panels),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _place(panels: tuple[Panel, ...]) -> list[dict[str, Any]]:
    """Lay the panels out in rows, left to right."""
    placed, x, y, row = [], 0, 0, 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > _WIDTH:
            x, y = 0, y + row
        row = _STAT_HEIGHT if panel.is_stat else _HEIGHT
        position = {"x": x, "y": y, "w": panel.width, "h": row}
        placed.append(_panel(number, panel, position))
        x += panel.width
    return placed


def _panel(number: int, panel: Panel, position: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.max_value is not None:
        defaults["max"] = panel.max_value
    if not panel.is_stat:
        defaults["custom"] = {"fillOpacity": 8, "lineWidth": 1, "spanNulls": False}
    return {
        "id": number,
        "type": "stat" if panel.is_stat else "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {} if panel.is_stat else {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                "instant": panel.is_stat,
            }
            for place, query in enumerate(panel.queries)
        ],
    }
