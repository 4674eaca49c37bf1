"""The committed files are what the code renders; each alert fires on its fault, and clears."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from serve_app.cli.monitor_files import rendered_files
from serve_app.observability.rules import Windows, alerts, recording_rules

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="needs promtool (Debian's package prometheus)"
)
FAULT = range(90, 110)
"""Minutes of the fault; an hour and a half of good times before, for the baseline."""
END = 140
At = Callable[[int], float]


@dataclass(frozen=True)
class Fault:
    """Series → value by minute, in which only the minutes FAULT are bad."""

    series: dict[str, At]


def gauge(good: float, bad: float) -> At:
    return lambda minute: bad if minute in FAULT else good


def counter(good: float, bad: float) -> At:
    """A counter that grows by `good`, in FAULT by `bad` a minute."""

    def at(minute: int) -> float:
        num_bad = len([m for m in FAULT if m < minute])
        return good * (minute - num_bad) + bad * num_bad

    return at


HTTP = 'xeray_http_requests_total{endpoint="/v1/chat/completions",status="%s"}'
TTFT = 'xeray_time_to_first_token_seconds_bucket{le="%s"}'
FAULTS = {
    "XeRayLatencyHigh": Fault(
        {
            TTFT % "0.5": counter(60, 0),
            TTFT % "5.0": counter(60, 60),
            TTFT % "+Inf": counter(60, 60),
            'xeray_slo_limit_seconds{kind="ttft"}': gauge(0.5, 0.5),
        }
    ),
    "XeRayTrafficCollapsed": Fault({HTTP % "200": counter(600, 6)}),
    "XeRayReplicaWedged": Fault(
        {
            'xeray_num_requests_running{replica="r1"}': gauge(4, 4),
            'xeray_engine_steps_total{replica="r1"}': counter(600, 0),
        }
    ),
    "XeRayNoReplica": Fault({'xeray_replicas{state="ready"}': gauge(2, 0)}),
    "XeRayErrorsHigh": Fault({HTTP % "200": counter(60, 50), HTTP % "500": counter(0, 10)}),
    "XeRayKVCacheFull": Fault({'xeray_kv_cache_usage_perc{replica="r1"}': gauge(0.6, 0.99)}),
    "XeRayCardThrottled": Fault({'xeray_gpu_throttled{card="arc-0",gt="gt0"}': gauge(0, 1)}),
    "XeRayCardHot": Fault(
        {'xeray_gpu_temperature_celsius{card="arc-0",sensor="pkg"}': gauge(70, 98)}
    ),
    "XeRayCostOverBudget": Fault(
        {
            'xeray_cost_total{currency="EUR",kind="energy"}': counter(0.001, 0.1),
            'xeray_cost_budget_per_hour{currency="EUR"}': gauge(1, 1),
        }
    ),
    "XeRayTargetDown": Fault({'up{job="xeray",instance="a"}': gauge(1, 0)}),
}
STUCK = Fault({'xeray_replica_state{replica="r1",state="stuck"}': gauge(0, 1)})


def test_the_committed_files_are_what_the_code_renders(repository: Path):
    for name, text in rendered_files().items():
        path = repository / "cluster" / name
        assert path.read_text() == text, f"{path}: run `xeray monitor --render cluster`"
    committed = {path.name for path in (repository / "cluster/grafana/dashboards").iterdir()}
    assert committed == {
        "overview.json",
        "cards.json",
        "latency.json",
        "autoscaling.json",
        "cost.json",
    }


def test_rules_come_after_those_they_need():
    known: set[str] = set()
    rules = recording_rules(Windows())
    for name, expr in rules.items():
        needed = {other for other in rules if other in expr}
        assert needed <= known, name
        known.add(name)


def test_each_alert_has_a_fault():
    assert set(FAULTS) == {alert.name for alert in alerts(Windows())}


@needs_promtool
@pytest.mark.parametrize(
    ("alert", "fault"),
    [*FAULTS.items(), ("XeRayReplicaWedged", STUCK)],
    ids=[*FAULTS, "XeRayReplicaWedged stuck"],
)
def test_alert_fires_on_its_fault_and_clears(
    repository: Path, tmp_path: Path, alert: str, fault: Fault
):
    firing = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
    expected = {FAULT.start - 1: 0, FAULT.start + 1: 0, FAULT.stop - 1: 1, END - 1: 0}
    document = {
        "rule_files": [str(repository / "cluster/prometheus/rules.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": series, "values": " ".join(f"{at(m):g}" for m in range(END))}
                    for series, at in fault.series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": firing,
                        "eval_time": f"{minute}m",
                        "exp_samples": [{"labels": "{}", "value": value}],
                    }
                    for minute, value in expected.items()
                ],
            }
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [str(PROMTOOL), "test", "rules", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_committed_rules(repository: Path):
    command = [str(PROMTOOL), "check", "rules", "cluster/prometheus/rules.yml"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
