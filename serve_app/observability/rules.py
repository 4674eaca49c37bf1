"""Recording rules and alerts: one definition, rendered into cluster/prometheus/rules.yml.

`xeray monitor --render cluster` writes the file; a test compares it with what this renders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

INFERENCE = '{endpoint=~"/v1/((chat/)?completions|responses)|/generate"}'
_SERVER_ERRORS = '{endpoint=~"/v1/((chat/)?completions|responses)|/generate",status=~"5.."}'
HOT_CELSIUS = 95
"""Arc cards hold their clock down from about 100 °C on."""
_HEADER = "# Made by `xeray monitor --render cluster`; change serve_app/observability/rules.py.\n"


@dataclass(frozen=True, slots=True)
class Windows:
    """Spans in Prometheus' notation: of rates, of what traffic is compared with, of alerts."""

    rate: str = "5m"
    baseline: str = "1h"
    hold: str = "2m"
    interval: str = "15s"


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert: `urgent` where requests fail or soon will."""

    name: str
    expr: str
    summary: str
    urgent: bool = False


def recording_rules(windows: Windows) -> dict[str, str]:
    """Return record → expression, each after those that it needs."""
    rate = windows.rate
    cost = f"sum by (currency) (rate(xeray_cost_total[{rate}]))"
    rules = {
        "xeray:http_requests:rate": f"sum(rate(xeray_http_requests_total{INFERENCE}[{rate}]))",
        "xeray:sequences:rate": f"sum(rate(xeray_request_success_total[{rate}]))",
        "xeray:errors:ratio": (
            f"(sum(rate(xeray_http_requests_total{_SERVER_ERRORS}[{rate}])) or vector(0))"
            " / xeray:http_requests:rate"
        ),
        "xeray:generation_tokens:rate": f"sum(rate(xeray_generation_tokens_total[{rate}]))",
        "xeray:goodput:rate": f"sum(rate(xeray_goodput_sequences_total[{rate}]))",
        "xeray:goodput:ratio": (
            f"xeray:goodput:rate / sum(rate(xeray_slo_sequences_total[{rate}]))"
        ),
        "xeray:power_watts:sum": "sum(xeray_power_watts)",
        "xeray:tokens_per_joule": (
            f"xeray:generation_tokens:rate / sum(rate(xeray_energy_joules_total[{rate}]))"
        ),
        "xeray:cost_per_hour": f"{cost} * 3600",
        "xeray:cost_per_1k_tokens": (
            f"1000 * {cost} / on () group_left () xeray:generation_tokens:rate"
        ),
        "xeray:cost_per_request": f"{cost} / on () group_left () xeray:sequences:rate",
        "xeray:prefix_cache_hits:ratio": (
            f"sum(rate(xeray_prefix_cache_hits_total[{rate}]))"
            f" / sum(rate(xeray_prefix_cache_queries_total[{rate}]))"
        ),
    }
    for name in (
        "time_to_first_token_seconds",
        "request_time_per_output_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
    ):
        for percent in (50, 95, 99):
            rules[f"xeray:{name}:p{percent}"] = (
                f"histogram_quantile({percent / 100},"
                f" sum by (le) (rate(xeray_{name}_bucket[{rate}])))"
            )
    return rules


def alerts(windows: Windows) -> tuple[Alert, ...]:
    """Return all alerts."""
    return (*_service_alerts(windows), *_host_alerts())


def _service_alerts(windows: Windows) -> tuple[Alert, ...]:
    """Return what requests and replicas tell."""
    rate, baseline = windows.rate, windows.baseline
    traffic = f"avg_over_time(xeray:http_requests:rate[{baseline}] offset {rate})"
    return (
        Alert(
            "XeRayLatencyHigh",
            "xeray:time_to_first_token_seconds:p99"
            ' > scalar(max(xeray_slo_limit_seconds{kind="ttft"}))',
            "p99 time to first token is {{ $value | humanizeDuration }}, over slo.ttft_ms.",
        ),
        Alert(
            "XeRayTrafficCollapsed",
            f"xeray:http_requests:rate < 0.2 * {traffic} and {traffic} > 0.1",
            f"Requests fell to {{{{ $value | humanize }}}} /s, under a fifth of the last"
            f" {baseline}: is something in front of the service down?",
            urgent=True,
        ),
        Alert(
            "XeRayReplicaWedged",
            'max by (replica) (xeray_replica_state{state=~"stuck|dead"}) == 1 or'
            " (max by (replica) (xeray_num_requests_running) > 0 and"
            f" max by (replica) (rate(xeray_engine_steps_total[{rate}])) == 0)",
            "Replica {{ $labels.replica }} holds requests and makes no progress.",
            urgent=True,
        ),
        Alert(
            "XeRayNoReplica",
            'max(xeray_replicas{state="ready"}) == 0',
            "No model replica is ready.",
            urgent=True,
        ),
        Alert(
            "XeRayErrorsHigh",
            "xeray:errors:ratio > 0.05",
            "{{ $value | humanizePercentage }} of the inference requests fail with 5xx.",
            urgent=True,
        ),
        Alert(
            "XeRayKVCacheFull",
            "max by (replica) (xeray_kv_cache_usage_perc) > 0.95",
            "The KV cache of replica {{ $labels.replica }} is full: requests wait.",
        ),
    )


def _host_alerts() -> tuple[Alert, ...]:
    """Return what cards, costs and scrapes tell."""
    return (
        Alert(
            "XeRayCardThrottled",
            "max by (instance, card, name) (xeray_gpu_throttled) == 1",
            "{{ $labels.name }} ({{ $labels.card }} on {{ $labels.instance }}) is held down.",
        ),
        Alert(
            "XeRayCardHot",
            "max by (instance, card, name, sensor) (xeray_gpu_temperature_celsius)"
            f" > {HOT_CELSIUS}",
            "{{ $labels.name }} ({{ $labels.card }} on {{ $labels.instance }}) is at"
            " {{ $value }} °C ({{ $labels.sensor }}).",
        ),
        Alert(
            "XeRayCostOverBudget",
            "xeray:cost_per_hour > on (currency) max by (currency) (xeray_cost_budget_per_hour)",
            "An hour costs {{ $value | humanize }} {{ $labels.currency }}, over"
            " cost.budget_per_hour.",
        ),
        Alert(
            "XeRayTargetDown",
            'up{job=~"xeray.*"} == 0',
            "{{ $labels.instance }} ({{ $labels.job }}) does not answer scrapes.",
            urgent=True,
        ),
    )


def rules_document(windows: Windows = Windows()) -> dict[str, Any]:
    """Return the rule file's content."""
    recorded = [{"record": name, "expr": expr} for name, expr in recording_rules(windows).items()]
    fired = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": windows.hold,
            "labels": {"severity": "critical" if alert.urgent else "warning"},
            "annotations": {"summary": alert.summary},
        }
        for alert in alerts(windows)
    ]
    return {
        "groups": [
            {"name": "xeray", "interval": windows.interval, "rules": recorded},
            {"name": "xeray-alerts", "interval": windows.interval, "rules": fired},
        ]
    }


def render_rules(windows: Windows = Windows()) -> str:
    """Return the rule file's text."""
    return _HEADER + yaml.safe_dump(
        rules_document(windows), sort_keys=False, allow_unicode=True, width=1000
    )
