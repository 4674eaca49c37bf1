"""Panels and rules ask for metrics that the code really has."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from serve_app.config.sections_cost import CostSection
from serve_app.core.requests import ReplicaHealth
from serve_app.hardware.telemetry.sampler import HardwareSampler
from serve_app.observability.dashboards import DASHBOARDS, Dashboard, render_dashboard
from serve_app.observability.energy import EnergyReader
from serve_app.observability.engine_metrics import EngineMetrics
from serve_app.observability.hardware_metrics import HardwareCollector
from serve_app.observability.metrics import IngressMetrics
from serve_app.observability.replica_telemetry import ReplicaTelemetry
from serve_app.observability.rules import Windows, alerts, recording_rules

_METRIC = re.compile(
    r"(?<![\w:$\"{=])((?:xeray|ray_serve|intel_gpu|memory_bandwidth|inference_latency)[\w:]*)"
)

# Ids of grafana/grafana: packages/grafana-data/src/valueFormats/categories.ts.
GRAFANA_UNITS = frozenset(
    ("short", "none", "percentunit", "percent", "s", "reqps", "watt", "joule", "celsius", "bytes",
     "Bps", "binBps", "rotmhz", "hertz")
)  # fmt: skip


def sample_names(families: Iterable[Metric]) -> Iterator[str]:
    for family in families:
        if family.type == "counter":
            yield f"{family.name}_total"
        elif family.type == "histogram":
            yield from (f"{family.name}_{suffix}" for suffix in ("bucket", "sum", "count"))
        else:
            yield family.name


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of all samples that our registries have."""
    root = tmp_path_factory.mktemp("root")
    (root / "proc").mkdir()
    (root / "proc/stat").write_text("cpu 1 0 0 9 0 0 0 0\n")
    sampler = HardwareSampler(root)
    hardware = HardwareCollector(sampler)
    (root / "proc/stat").write_text("cpu 2 0 0 10 0 0 0 0\n")
    names = set(sample_names(hardware.collect()))
    engine = EngineMetrics("m")
    cost = CostSection(hardware_price=1000, budget_per_hour=1, busy_watts=100)
    telemetry = ReplicaTelemetry("m", cost, engine.registry, EnergyReader(("none-0",), root=root))
    telemetry.update(ReplicaHealth("r1", "ready"), 0.0)
    registries: list[CollectorRegistry] = [IngressMetrics("m").registry, engine.registry]
    for registry in registries:
        names.update(sample_names(registry.collect()))
    return names


def metrics_in(expr: str) -> set[str]:
    return set(_METRIC.findall(re.sub(r'"[^"]*"', '""', expr)))


def exprs(dashboard: Dashboard) -> list[str]:
    return [query.expr for panel in dashboard.panels for query in panel.queries]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_panels_ask_for_what_there_is(dashboard: Dashboard, known: set[str]):
    known = known | set(recording_rules(Windows()))
    for expr in exprs(dashboard):
        names = {name for name in metrics_in(expr) if not name.startswith("ray_")}
        assert names or "ray_" in expr, expr
        assert names <= known, (expr, names - known)


def test_rules_ask_for_what_there_is(known: set[str]):
    recorded = recording_rules(Windows())
    asked = [*recorded.values(), *(alert.expr for alert in alerts(Windows()))]
    for expr in asked:
        names = metrics_in(expr)
        assert names <= known | set(recorded), (expr, names - known)


def test_rays_metrics_are_rays():
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.submodule_search_locations is not None
    source = Path(found.submodule_search_locations[0]) / "serve/_private/deployment_state.py"
    names = {name for d in DASHBOARDS for e in exprs(d) for name in metrics_in(e)}
    rays = {name for name in names if name.startswith("ray_")}
    assert rays
    for name in rays:
        assert f'"{name.removeprefix("ray_")}"' in source.read_text(), name


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_panels_lie_side_by_side(dashboard: Dashboard):
    document = json.loads(render_dashboard(dashboard))
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in document["panels"]}) == len(dashboard.panels)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_grafanas_own_types_read_the_whole_dashboard(dashboard: Dashboard):
    """Through Grafana's model of a dashboard and back: what it does not know would be lost."""
    pytest.importorskip("grafana_foundation_sdk", reason="needs the extra test")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard as GrafanaDashboard

    register_default_plugins()
    written = json.loads(render_dashboard(dashboard))
    read = json.loads(JSONEncoder().encode(GrafanaDashboard.from_json(written)))
    assert list(lost(written, read)) == []


def lost(before: object, after: object, path: str = "") -> Iterator[str]:
    """Paths of what `before` has and `after` has not, or has otherwise."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in before.items():
            if name in after:
                yield from lost(value, after[name], f"{path}/{name}")
            else:
                yield f"{path}/{name}"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from lost(old, new, f"{path}/{place}")
    elif before != after:
        yield path


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_panels_and_queries_name_the_provisioned_datasource(dashboard: Dashboard):
    path = Path(__file__).parents[3] / "cluster/grafana/provisioning/datasources/prometheus.yml"
    (source,) = yaml.safe_load(path.read_text())["datasources"]
    wanted = {"type": source["type"], "uid": source["uid"]}
    document = json.loads(render_dashboard(dashboard))
    assert len(document["uid"]) <= 40, "Grafana's limit"
    for panel in document["panels"]:
        assert panel["datasource"] == wanted
        assert [target["datasource"] for target in panel["targets"]] == [wanted] * len(
            panel["targets"]
        )
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        assert panel["fieldConfig"]["defaults"]["unit"] in GRAFANA_UNITS
