"""`xeray monitor`: Prometheus, and Grafana where it is installed, with our rules and dashboards.

Both listen on loopback, keep their data in a folder of their own, and end with this command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

from serve_app.cli.cluster.inventory import bracketed, load_inventory
from serve_app.cli.exporter import DEFAULT_PORT as EXPORTER_PORT
from serve_app.cli.monitor_files import (
    Targets,
    write_grafana_provisioning,
    write_prometheus_config,
    write_rendered,
)
from serve_app.cli.units import port_or_free
from serve_app.config.cache_folder import cache_folder
from serve_app.core.errors import ConfigError

HOST = "127.0.0.1"
DEFAULT_API = f"{HOST}:8000"
RAY_TARGETS = "/tmp/ray/prom_metrics_service_discovery.json"
KEY_VARIABLE = "XERAY_METRICS_KEY"
_GRAFANA_HOMES = ("/usr/share/grafana", "/opt/grafana")
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 15.0
_POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xeray monitor`."""
    parser.add_argument(
        "--target",
        action="append",
        metavar="HOST:PORT",
        help=f"a service to watch, once for each service, not for each node ({DEFAULT_API})",
    )
    parser.add_argument("--inventory", type=Path, help="watch the exporters of these machines")
    parser.add_argument(
        "--exporter",
        action="append",
        metavar="HOST:PORT",
        help="an exporter to watch; without any, and no inventory, one is started for this machine",
    )
    parser.add_argument(
        "--ray-targets", default=RAY_TARGETS, help=f"Ray's list of its targets ({RAY_TARGETS})"
    )
    parser.add_argument("--port", type=port_or_free, default=9090, help="of Prometheus (9090)")
    parser.add_argument("--grafana-port", type=port_or_free, default=3000, help="(3000)")
    parser.add_argument("--no-grafana", action="store_true", help="start Prometheus alone")
    parser.add_argument("--data", type=Path, help="folder for their data (in the user's cache)")
    parser.add_argument("--rules", type=Path, help="rule file in place of ours")
    parser.add_argument("--json", action="store_true", help="print URLs, or files, as JSON")
    parser.add_argument("--keep", default="15d", help="how long samples are kept (15d)")
    parser.add_argument(
        "--interval", type=int, default=5, metavar="SECONDS", help="between two scrapes (5)"
    )
    parser.add_argument(
        "--render", type=Path, metavar="FOLDER", help="only write the rules and dashboards there"
    )
    parser.epilog = (
        f"Where the service asks a key for /metrics, set {KEY_VARIABLE} to one with the scope"
        " metrics. Port 0 takes a free one."
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run until told to end, which is no failure. Raises ConfigError, one line with the fix."""
    if options.render is not None:
        paths = [str(path) for path in write_rendered(options.render)]
        print(json.dumps({"files": paths}) if options.json else "\n".join(paths))
        return 0
    if options.interval < 1:
        raise ConfigError("--interval: expected at least 1 second", param="interval")
    program = require_program("prometheus")
    with contextlib.suppress(KeyboardInterrupt):
        _monitor(options, program)
    return 0


def _monitor(options: argparse.Namespace, program: str) -> None:
    """Start what is asked for and watch it; nothing of it is left when this ends."""
    data = (options.data or cache_folder("monitor")).expanduser().resolve()
    data.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        exporters = _exporters(options, stack)
        targets = Targets(
            api=tuple(options.target or (DEFAULT_API,)),
            exporters=exporters,
            ray_file=options.ray_targets,
            key=os.environ.get(KEY_VARIABLE, ""),
        )
        config = write_prometheus_config(data, targets, options.interval, options.rules)
        port = free_port(options.port, "--port")
        prometheus = _start_prometheus(stack, program, config, data, port, options.keep)
        url = f"http://{HOST}:{port}"
        say = _silence if options.json else _say
        say(f"Prometheus  {url}  watches {', '.join(targets.api)}")
        started, urls = {"prometheus": prometheus}, {"prometheus": url}
        grafana = None if options.no_grafana else _start_grafana(stack, data, options, url, say)
        if grafana is not None:
            started["grafana"], urls["grafana"] = grafana
        if options.json:
            _say(json.dumps(urls))
        _watch(started, data)


def _say(line: str) -> None:
    print(line, flush=True)


def _silence(_line: str) -> None:
    """Say nothing: one JSON line tells it all."""


def require_program(name: str) -> str:
    """Return the program's path. Raises ConfigError with the command that installs it."""
    path = shutil.which(name)
    if path is None:
        raise ConfigError(
            f"{name} is not installed: apt-get install --no-install-recommends {name}"
            f" && systemctl disable --now {name}"
        )
    return path


def free_port(port: int, option: str) -> int:
    """Return `port`, or a free one for 0. Raises ConfigError where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"{option}: {HOST}:{port} cannot be used ({error.strerror}); name a free one",
                param=option.lstrip("-"),
            ) from None
        return int(probe.getsockname()[1])


def _exporters(options: argparse.Namespace, stack: ExitStack) -> tuple[str, ...]:
    """Return the exporters to watch; starts one where none is named."""
    named = tuple(options.exporter or ())
    if options.inventory is not None:
        machines = load_inventory(options.inventory).machines
        named += tuple(f"{bracketed(m.ray_address)}:{EXPORTER_PORT}" for m in machines)
    return named or (_start_exporter(stack),)


def _start_exporter(stack: ExitStack) -> str:
    """Start this machine's exporter at a free port; returns its host:port."""
    command = [sys.executable, "-m", "serve_app.cli.main", "exporter", "--port", "0"]
    process = stack.enter_context(_child(command, stdout=subprocess.PIPE))
    assert process.stdout is not None, "piped"
    line = process.stdout.readline().decode()
    if "http://" not in line:
        raise ConfigError("the exporter of this machine did not start; see `xeray exporter`")
    return line.split("http://", 1)[1].split("/", 1)[0]


def _start_prometheus(
    stack: ExitStack, program: str, config: Path, data: Path, port: int, keep: str
) -> subprocess.Popen[bytes]:
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={data / 'prometheus'}",
        f"--storage.tsdb.retention.time={keep}",
        f"--web.listen-address={HOST}:{port}",
        "--log.level=warn",
    ]
    log = data / "prometheus.log"
    process = stack.enter_context(_logged(command, log))
    _wait_ready(process, f"http://{HOST}:{port}/-/ready", log)
    return process


def _start_grafana(
    stack: ExitStack,
    data: Path,
    options: argparse.Namespace,
    prometheus_url: str,
    say: Callable[[str], None],
) -> tuple[subprocess.Popen[bytes], str] | None:
    """Start Grafana, return it and its URL; None, and one line, where it is not installed."""
    command = _grafana_command()
    if command is None:
        say(
            "Grafana     is not installed (apt.grafana.com has it: apt-get install grafana);"
            " Prometheus has graphs of its own"
        )
        return None
    port = free_port(options.grafana_port, "--grafana-port")
    provisioning = write_grafana_provisioning(data, prometheus_url, options.interval)
    home = next((path for path in _GRAFANA_HOMES if Path(path).is_dir()), None)
    if home is not None:
        command += ["--homepath", home]
    log = data / "grafana.log"
    process = stack.enter_context(_logged(command, log, grafana_settings(data, port, provisioning)))
    _wait_ready(process, f"http://{HOST}:{port}/api/health", log)
    say(f"Grafana     http://{HOST}:{port}/d/xeray-overview")
    return process, f"http://{HOST}:{port}"


def _grafana_command() -> list[str] | None:
    if path := shutil.which("grafana-server"):
        return [path]
    if path := shutil.which("grafana"):
        return [path, "server"]
    return None


def grafana_settings(data: Path, port: int, provisioning: Path) -> dict[str, str]:
    """Return Grafana's settings: loopback, nobody logs in, everybody there may look, no calls out.

    grafana.com/docs/grafana/latest/setup-grafana/configure-grafana: GF_<SECTION>_<KEY>.
    """
    folder = data / "grafana"
    return {
        "GF_SERVER_HTTP_ADDR": HOST,
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_PATHS_DATA": str(folder),
        "GF_PATHS_LOGS": str(folder / "logs"),
        "GF_PATHS_PLUGINS": str(folder / "plugins"),
        "GF_PATHS_PROVISIONING": str(provisioning),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_AUTH_BASIC_ENABLED": "false",
        "GF_AUTH_DISABLE_LOGIN_FORM": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
        "GF_PLUGINS_PREINSTALL_DISABLED": "true",
        "GF_NEWS_NEWS_FEED_ENABLED": "false",
        "GF_SECURITY_DISABLE_GRAVATAR": "true",
    }


@contextlib.contextmanager
def _logged(
    command: Sequence[str], log: Path, settings: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file, _child(command, file, file, settings) as process:
        yield process


@contextlib.contextmanager
def _child(
    command: Sequence[str],
    stdout: object = subprocess.DEVNULL,
    stderr: object = subprocess.DEVNULL,
    settings: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a session of its own: Ctrl-C reaches it through us. Ends it by pid."""
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=stdout,  # type: ignore[call-overload]
        stderr=stderr,
        env={**os.environ, **(settings or {})},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until `url` answers 200. Raises ConfigError where the program ends or takes too long."""
    end_s = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < end_s:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, trust_env=False, timeout=2.0).status_code == 200:
                return
        time.sleep(_POLL_S)
    raise _failed(log, "did not start")


def _watch(
    started: Mapping[str, subprocess.Popen[bytes]],
    data: Path,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return never; KeyboardInterrupt ends it. Raises ConfigError where a program ends."""
    while True:
        for name, process in started.items():
            if process.poll() is not None:
                raise _failed(data / f"{name}.log", f"ended with {process.returncode}")
        sleep(1.0)


def _failed(log: Path, what: str) -> ConfigError:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return ConfigError(f"{log.stem} {what}{last} (all of it in {log})")
