from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from string import Template

import pytest
import yaml

from serve_app.cli.main import main
from serve_app.cli.monitor import grafana_settings
from serve_app.cli.monitor_files import (
    Targets,
    rendered_files,
    write_grafana_provisioning,
    write_prometheus_config,
)

TARGETS = Targets(("127.0.0.1:8000",), ("a:9410", "[::1]:9410"), "/tmp/ray targets.json")


def scrapes(path: Path) -> dict[str, dict[str, object]]:
    document = yaml.safe_load(path.read_text())
    return {config["job_name"]: config for config in document["scrape_configs"]}


def test_prometheus_is_told_what_to_watch(tmp_path: Path):
    jobs = scrapes(write_prometheus_config(tmp_path, TARGETS, 5))
    assert jobs["xeray"]["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
    assert jobs["xeray-hardware"]["static_configs"] == [{"targets": ["a:9410", "[::1]:9410"]}]
    assert jobs["ray"]["file_sd_configs"][0]["files"] == ["/tmp/ray targets.json"]
    assert "authorization" not in jobs["xeray"]
    document = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    assert Path(document["rule_files"][0]).name == "rules.yml"
    assert document["global"]["scrape_interval"] == "5s"


def test_the_key_lies_in_a_file_that_its_owner_alone_reads(tmp_path: Path):
    targets = Targets(TARGETS.api, (), TARGETS.ray_file, key="a-secret-key")
    path = write_prometheus_config(tmp_path, targets, 5)
    assert "a-secret-key" not in path.read_text()
    key_file = Path(scrapes(path)["xeray"]["authorization"]["credentials_file"])
    assert key_file.read_text() == "a-secret-key"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    write_prometheus_config(tmp_path, targets, 5)  # again, over the file that is there


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_accepts_the_config(tmp_path: Path):
    path = write_prometheus_config(tmp_path, Targets(("a:1",), (), "/tmp/r.json", "k"), 1)
    command = ["promtool", "check", "config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_grafana_is_told_where_prometheus_and_the_dashboards_are(tmp_path: Path):
    folder = write_grafana_provisioning(tmp_path, "http://127.0.0.1:9090", 5)
    source = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"][0]
    assert (source["url"], source["uid"]) == ("http://127.0.0.1:9090", "xeray-prometheus")
    provider = yaml.safe_load((folder / "dashboards/xeray.yml").read_text())["providers"][0]
    names = {path.name for path in Path(provider["options"]["path"]).iterdir()}
    assert "overview.json" in names
    panel = json.loads(rendered_files()["grafana/dashboards/overview.json"])["panels"][0]
    assert panel["datasource"]["uid"] == source["uid"]


def test_grafana_stays_on_loopback_and_calls_nobody():
    settings = grafana_settings(Path("/data"), 3000, Path("/p"))
    assert settings["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert settings["GF_ANALYTICS_CHECK_FOR_UPDATES"] == "false"
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_render_writes_what_is_committed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["monitor", "--render", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [str(tmp_path / name) for name in rendered_files()]
    for name, text in rendered_files().items():
        assert (tmp_path / name).read_text() == text


def test_templates_have_no_place_that_is_not_filled(repository: Path):
    names = {"prometheus/prometheus.yml", "grafana/provisioning/datasources/prometheus.yml"}
    known = {
        *("scrape_interval", "scrape_timeout", "rules_file", "authorization", "api_targets"),
        *("exporter_targets", "ray_targets_file", "prometheus_url"),
    }
    for name in names:
        lines = (repository / "cluster" / name).read_text().splitlines()
        text = "\n".join(line for line in lines if not line.startswith("#"))
        assert set(Template(text).get_identifiers()) <= known


def test_a_missing_program_is_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["monitor"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "prometheus is not installed: apt-get install" in line


def fake_program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(body))
    path.chmod(0o755)


FAKE = """
    import http.server, json, os, pathlib, sys
    name = pathlib.Path(sys.argv[0]).name
    listen = [a for a in sys.argv if a.startswith("--web.listen-address=")]
    port = int(listen[0].rsplit(":", 1)[1]) if listen else int(os.environ["GF_SERVER_HTTP_PORT"])
    told = {"pid": os.getpid(), "argv": sys.argv[1:], "path": os.environ.get("GF_PATHS_DATA", "")}
    pathlib.Path(os.environ["TOLD"], name + ".json").write_text(json.dumps(told))

    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args):
            pass

    http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""


def test_starts_both_and_ends_both(tmp_path: Path, clean_environment: dict[str, str]):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("prometheus", "grafana-server"):
        fake_program(programs, name, FAKE)
    environment = {**clean_environment, "PATH": str(programs), "TOLD": str(tmp_path)}
    command = [sys.executable, "-m", "serve_app.cli.main", "monitor", "--port", "0"]
    command += ["--grafana-port", "0", "--data", str(tmp_path / "data"), "--exporter", "a:1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(2)]
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait(20)
    assert [line.split()[0] for line in lines] == ["Prometheus", "Grafana"]
    assert status == 0, "to be told to end is no failure"
    told = {
        name: json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("prometheus", "grafana-server")
    }
    assert told["grafana-server"]["path"] == str(tmp_path / "data/grafana")
    for entry in told.values():
        with pytest.raises(ProcessLookupError):
            os.kill(entry["pid"], 0)


def test_a_program_that_ends_is_told_with_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake_program(tmp_path, "prometheus", "import sys; sys.exit('the disk is full')")
    monkeypatch.setenv("PATH", str(tmp_path))
    data = tmp_path / "data"
    assert main(["monitor", "--port", "0", "--exporter", "a:1", "--data", str(data)]) == 1
    assert "prometheus did not start: the disk is full" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake_program(tmp_path, "prometheus", FAKE)
    monkeypatch.setenv("PATH", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        data = str(tmp_path / "data")
        assert main(["monitor", "--port", port, "--exporter", "a:1", "--data", data]) == 1
    assert f"--port: 127.0.0.1:{port} cannot be used" in capsys.readouterr().err


def test_exporters_come_from_the_inventory(tmp_path: Path):
    inventory = tmp_path / "inventory.yaml"
    machines = [{"address": "ws1", "role": "head"}, {"address": "10.0.0.2"}]
    inventory.write_text(yaml.safe_dump({"machines": machines}))
    programs = tmp_path / "bin"
    programs.mkdir()
    fake_program(programs, "prometheus", "import sys; sys.exit(1)")
    data = tmp_path / "data"
    command = [sys.executable, "-m", "serve_app.cli.main", "monitor", "--port", "0"]
    command += ["--inventory", str(inventory), "--data", str(data)]
    environment = {**os.environ, "PATH": str(programs)}
    subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    jobs = scrapes(data / "prometheus.yml")
    assert jobs["xeray-hardware"]["static_configs"] == [{"targets": ["ws1:9410", "10.0.0.2:9410"]}]
