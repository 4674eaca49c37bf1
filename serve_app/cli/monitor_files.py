"""Files of `xeray monitor`: what it renders into cluster/, and what Prometheus and Grafana read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from string import Template

from serve_app.config.resources import data_folder
from serve_app.core.errors import ConfigError
from serve_app.observability.dashboards import DASHBOARDS, render_dashboard
from serve_app.observability.rules import render_rules


@dataclass(frozen=True, slots=True)
class Targets:
    """What is scraped, each as host:port. `key` is the API key for /metrics, where it asks one."""

    api: tuple[str, ...]
    exporters: tuple[str, ...]
    ray_file: str
    key: str = ""


def rendered_files() -> dict[str, str]:
    """Return path below cluster/ → text of every file that is made from code."""
    dashboards = {
        f"grafana/dashboards/{dashboard.name}.json": render_dashboard(dashboard)
        for dashboard in DASHBOARDS
    }
    return {"prometheus/rules.yml": render_rules(), **dashboards}


def write_rendered(folder: Path) -> list[Path]:
    """Write `rendered_files` below `folder`; returns their paths."""
    written = []
    for name, text in rendered_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def write_prometheus_config(
    folder: Path, targets: Targets, scrape_interval_s: int, rules: Path | None = None
) -> Path:
    """Write prometheus.yml below `folder`, from the template that travels; returns its path."""
    authorization = ""
    if targets.key:
        key_file = folder / "metrics.key"
        _write_secret(key_file, targets.key)
        credentials = json.dumps(str(key_file))
        authorization = f"authorization: {{type: Bearer, credentials_file: {credentials}}}"
    rules = (rules or data_folder("cluster") / "prometheus" / "rules.yml").resolve()
    text = _filled(
        "prometheus/prometheus.yml",
        # JSON is YAML: quoted as it has to be, whatever a path holds.
        scrape_interval=f"{scrape_interval_s}s",
        scrape_timeout=f"{min(10, scrape_interval_s)}s",
        rules_file=json.dumps(str(rules)),
        authorization=authorization,
        api_targets=json.dumps(list(targets.api)),
        exporter_targets=json.dumps(list(targets.exporters)),
        ray_targets_file=json.dumps(targets.ray_file),
    )
    path = folder / "prometheus.yml"
    path.write_text(text, encoding="utf-8")
    return path


def write_grafana_provisioning(folder: Path, prometheus_url: str, scrape_interval_s: int) -> Path:
    """Write Grafana's provisioning below `folder`; returns the folder to name to Grafana."""
    values = {
        "prometheus_url": json.dumps(prometheus_url),
        "scrape_interval": f"{scrape_interval_s}s",
        "dashboards": json.dumps(str(data_folder("cluster") / "grafana" / "dashboards")),
    }
    provisioning = folder / "provisioning"
    for name in ("datasources/prometheus.yml", "dashboards/xeray.yml"):
        path = provisioning / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled(f"grafana/provisioning/{name}", **values), encoding="utf-8")
    return provisioning


def _filled(name: str, **values: str) -> str:
    path = data_folder("cluster") / name
    try:
        template = Template(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    lines = [line for line in template.template.splitlines() if not line.lstrip().startswith("#")]
    return Template("\n".join(lines) + "\n").substitute(values)


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
