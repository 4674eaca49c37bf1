"""A real Prometheus, started by `xeray monitor`, over the application under a scripted load."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from serve_app.api.app import create_app
from serve_app.config.schema import AppConfig
from serve_app.core.events import EngineStats
from serve_app.core.requests import ReplicaHealth
from serve_app.hardware.telemetry.memory_traffic import MemoryTraffic
from serve_app.hardware.telemetry.sampler import HardwareSampler
from serve_app.observability.aggregate import merge_expositions
from serve_app.observability.dashboards import DASHBOARDS, RATE_INTERVAL
from serve_app.observability.energy import EnergyReader
from serve_app.observability.engine_metrics import EngineMetrics
from serve_app.observability.hardware_metrics import HardwareCollector
from serve_app.observability.replica_telemetry import ReplicaTelemetry
from serve_app.observability.rules import Windows, alerts, recording_rules, render_rules
from tests.fake_host import write, write_host

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs prometheus (Debian's package prometheus)"
)
FAST = Windows(rate="5s", baseline="10s", hold="2s", interval="1s")
KEY = "load"
_WAIT_S = 25.0


@dataclass
class SimulatedReplica:
    """A model replica's metrics: the real collectors over statistics that grow with each scrape."""

    stats: EngineStats
    metrics: EngineMetrics
    telemetry: ReplicaTelemetry

    @classmethod
    def begin(cls, config: AppConfig) -> SimulatedReplica:
        metrics = EngineMetrics("org/tiny")
        reader = EnergyReader(("none-0",))
        telemetry = ReplicaTelemetry("org/tiny", config.cost, metrics.registry, reader)
        return cls(EngineStats(num_blocks=100, num_used_blocks=40), metrics, telemetry)

    async def metrics_text(self) -> str:
        last = self.stats
        self.stats = replace(
            last,
            num_running=2,
            num_steps_total=last.num_steps_total + 10,
            num_scheduled_tokens_total=last.num_scheduled_tokens_total + 40,
            num_prompt_tokens_total=last.num_prompt_tokens_total + 30,
            num_generation_tokens_total=last.num_generation_tokens_total + 20,
            num_prefix_queries_tokens_total=last.num_prefix_queries_tokens_total + 30,
            num_prefix_hit_tokens_total=last.num_prefix_hit_tokens_total + 16,
            step_time_s_total=last.step_time_s_total + 0.5,
            weight_bytes_read_total=last.weight_bytes_read_total + 10**9,
        )
        self.metrics.update(self.stats)
        self.telemetry.update(ReplicaHealth("r1", "ready"), self.stats.step_time_s_total)
        return merge_expositions({"r1": self.metrics.render()})


@pytest.fixture
def fake_host(tmp_path: Path) -> Path:
    """A host with one card of each reading that xe tells, and a memory controller."""
    root = tmp_path / "root"
    write_host(root, temperature_c=55, is_throttled=False)
    unit = "sys/bus/event_source/devices/uncore_imc_0"
    for name, value in (("type", 30), ("format/event", "config:0-7")):
        write(root, f"{unit}/{name}", value)
    for name, value in (("", "event=0x05"), (".scale", "6.103515625e-5"), (".unit", "MiB")):
        write(root, f"{unit}/events/cas_count_read{name}", value)
    return root


class SimulatedCounter:
    """A memory controller's counter, as the kernel opens it: a thousand lines more at each look."""

    def __init__(self, kind: int, config: int, cpu: int) -> None:
        self._count = 0

    def read(self) -> int:
        self._count += 1000
        return self._count

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def exporter(fake_host: Path) -> Iterator[str]:
    registry = CollectorRegistry()
    sampler = HardwareSampler(fake_host, traffic=MemoryTraffic(fake_host, SimulatedCounter))
    registry.register(HardwareCollector(sampler))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def ray_targets(tmp_path: Path) -> Iterator[str]:
    """What Ray writes and exposes, as far as a panel asks for it."""
    registry = CollectorRegistry()
    name = "ray_serve_autoscaling_target_replicas"
    Gauge(name, "Target.", ("deployment",), registry=registry).labels("ModelReplica").set(2)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    path = tmp_path / "ray.json"
    entry = {"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{server.server_port}"]}
    path.write_text(json.dumps([entry]))
    yield str(path)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def service(
    backend: Any, fakes: dict[str, Any], tmp_path: Path, run_server: Callable[[Any], str]
) -> tuple[str, SimulatedReplica]:
    """The application with keys and prices; its URL, and the replica behind it."""
    entry = {"name": KEY, "sha256": hashlib.sha256(KEY.encode()).hexdigest()}
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump({"keys": [entry]}))
    config = AppConfig.model_validate(
        {
            "model": {"name": "org/tiny"},
            "auth": {"keys_file": str(keys)},
            "cost": {
                "electricity_price_per_kwh": 0.3,
                "hardware_price": 3000,
                "idle_watts": 40,
                "busy_watts": 190,
                "budget_per_hour": 5,
            },
        }
    )
    first, *rest = fakes["chunks"]("One ", "two ", "three")
    backend.script = [replace(first, queue_time_s=0.002, engine_ttft_s=0.01), *rest]
    replica = SimulatedReplica.begin(config)
    backend.metrics_text = replica.metrics_text
    return run_server(create_app(backend, config)), replica


@pytest.fixture
def load(service: tuple[str, SimulatedReplica], fake_host: Path) -> Iterator[None]:
    """Requests, and a processor whose ticks go on, until the test ends."""
    is_over = threading.Event()

    def run() -> None:
        ticks = 1
        body = {"model": "org/tiny", "prompt": "abc"}
        with httpx.Client(
            base_url=service[0], trust_env=False, headers={"Authorization": f"Bearer {KEY}"}
        ) as client:
            while not is_over.wait(0.1):
                client.post("/v1/completions", json=body).raise_for_status()
                ticks += 1
                write(fake_host, "proc/stat", f"cpu  {ticks} 0 0 {ticks * 9} 0 0 0 0 0 0")

    thread = threading.Thread(target=run)
    thread.start()
    yield
    is_over.set()
    thread.join()


@pytest.fixture
def prometheus(
    service: tuple[str, SimulatedReplica],
    load: None,
    exporter: str,
    ray_targets: str,
    tmp_path: Path,
    clean_environment: dict[str, str],
) -> Iterator[httpx.Client]:
    """`xeray monitor` with fast rules: a client of the Prometheus that it started."""
    rules = tmp_path / "rules.yml"
    rules.write_text(render_rules(FAST))
    command = [sys.executable, "-m", "serve_app.cli.main", "monitor", "--port", "0"]
    command += ["--target", service[0].removeprefix("http://"), "--exporter", exporter]
    command += ["--ray-targets", ray_targets, "--rules", str(rules), "--interval", "1"]
    command += ["--data", str(tmp_path / "data"), "--no-grafana"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=clean_environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("Prometheus"), line
            with httpx.Client(base_url=line.split()[1], trust_env=False) as client:
                yield client
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(line.split()[1], trust_env=False)


def finite(client: httpx.Client, expr: str) -> bool:
    answer = client.get("/api/v1/query", params={"query": expr}).json()
    assert answer["status"] == "success", (expr, answer)
    return any(math.isfinite(float(sample["value"][1])) for sample in answer["data"]["result"])


def wait_for(condition: Callable[[], object], what: Callable[[], str]) -> None:
    end = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.25)


def test_every_panel_and_rule_has_data_and_an_alert_comes_and_goes(
    prometheus: httpx.Client, service: tuple[str, SimulatedReplica]
):
    open_ = {
        f"{dashboard.name}: {panel.title}: {query.expr}": query.expr.replace(RATE_INTERVAL, "6s")
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for query in panel.queries
    }
    open_ |= {name: name for name in recording_rules(FAST)}

    def all_have_data() -> bool:
        for name, expr in list(open_.items()):
            if finite(prometheus, expr):
                del open_[name]
        return not open_

    wait_for(all_have_data, lambda: f"no finite sample: {sorted(open_)}")
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == {
        alert.name for alert in alerts(FAST)
    }
    assert all(rule["health"] == "ok" for rule in rules), [rule.get("lastError") for rule in rules]

    def firing() -> set[str]:
        found = prometheus.get("/api/v1/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}

    assert "XeRayKVCacheFull" not in firing()
    _, replica = service
    replica.stats = replace(replica.stats, num_used_blocks=99)
    wait_for(lambda: "XeRayKVCacheFull" in firing(), lambda: f"only {firing()} fires")
    replica.stats = replace(replica.stats, num_used_blocks=40)
    wait_for(lambda: "XeRayKVCacheFull" not in firing(), lambda: "the alert stays")
    assert not firing(), "no fault is left"
