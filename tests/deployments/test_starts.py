"""Starting and ending: `serve run`, a Ray of one's own, and `launch`; each in a process of its own.

Four more Ray starts than the session's, and one in test_haproxy, no more.
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
from typing import IO, Any

import httpx
import psutil
import pytest
import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BIN = Path(sys.executable).parent

LAUNCH = """
import json, signal, sys
from serve_app.deployments.launch import launch
stages = []
launched = launch(sys.argv[1], overrides=["engine.fixed_rate_tokens_per_s=100"],
                  proxy_mode="python",
                  on_progress=lambda stage: stages.append((stage.name, stage.seconds)))
print(json.dumps([launched.url, launched.proxy_mode, stages]), flush=True)
signal.sigwait([signal.SIGTERM])
launched.stop()
launched.stop()
print("stopped", flush=True)
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
    """Plain Ray's environment: none of our settings, a folder and a mark of this test's own."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir=ray_folder))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "XERAY_"))}
    return kept | {
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
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


def read_line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


@pytest.mark.usefixtures("cleaned")
def test_launch_listens_on_loopback_only_and_ends_all(
    tmp_path: Path, env: dict[str, str], port: int
) -> None:
    config = write_config(tmp_path, "local", port)
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(config)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    line = read_line(process.stdout)
    assert line, "it ended before it was ready"
    url, proxy_mode, stages = json.loads(line)

    assert (url, proxy_mode) == (f"http://127.0.0.1:{port}", "python")
    done = {name: seconds for name, seconds in stages if seconds is not None}
    assert {"ray", "serve", "preprocessor", "ingress", "model"} <= set(done)
    body = {"prompt": "Hello", "max_tokens": 4}
    assert httpx.post(f"{url}/generate", json=body, timeout=30).status_code == 200
    addresses = listening_addresses({p.pid for p in processes_of(env)})
    assert len(addresses) > 5, "Ray's own servers are among them"
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    second = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(config)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 1
    assert f"http_options.port: 127.0.0.1:{port} cannot be used" in second.stderr

    process.send_signal(signal.SIGTERM)
    assert read_line(process.stdout).strip() == "stopped"
    assert process.wait(30) == 0
    assert process.stdout is not None
    process.stdout.close()
    assert wait_gone(env, 15) == []


@pytest.mark.usefixtures("cleaned")
def test_serve_run_without_the_resources_ends_with_the_command(
    tmp_path: Path, env: dict[str, str], port: int
) -> None:
    config = write_config(tmp_path, "arc2", port)
    process = subprocess.Popen(
        [BIN / "serve", "run", str(config)],
        env=env | {"XERAY_SIMULATED_ARC_CARDS": "2", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started_s = time.monotonic()
    lines, submitted_s = [], started_s
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if "Submitted deploy config" in line:
            submitted_s = time.monotonic()
    process.stdout.close()

    assert process.wait(60) != 0
    ended_s = time.monotonic()
    output = "".join(lines)
    last = output.strip().splitlines()[-1]
    assert last == (
        "xeray: this Ray lacks what the config asks for: 2 xeon_cores (declared: 0), 1 arc_gpu"
        " (declared: 0); start Ray with:"
        """ ray start --head --resources='{"xeon_cores": 2, "arc_gpu": 2}'"""
    )
    assert "Traceback" not in output
    # Ray and Serve start first, and how long that takes is the measure of how busy the machine is.
    assert submitted_s > started_s, "Serve says when it has the file"
    refused_s = ended_s - submitted_s
    assert refused_s < max(10.0, submitted_s - started_s), refused_s
    assert wait_gone(env, 15) == []


@pytest.mark.usefixtures("cleaned")
def test_a_ray_started_by_hand_with_plain_ray(
    tmp_path: Path, env: dict[str, str], port: int
) -> None:
    """The command that the line above prints, none of our environment: cards by lock alone.

    Before it a file with a misspelt builder, on the same Ray: one line and an end.
    """
    env = env | {"XERAY_SIMULATED_ARC_CARDS": "2"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gcs_port = probe.getsockname()[1]
    head = [BIN / "ray", "start", "--head", "--block", f"--port={gcs_port}"]
    head += ["--num-cpus=4", "--include-dashboard=false", "--object-store-memory=80000000"]
    head += ['--resources={"arc_gpu": 2, "xeon_cores": 2}']
    config = write_config(
        tmp_path, "arc2", port, model_replica={"autoscaling": None, "num_replicas": 2}
    )
    with subprocess.Popen(head, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        serve = [BIN / "serve", "run", "--address", f"127.0.0.1:{gcs_port}", str(config)]
        wait_for_port(gcs_port)
        refused = run_misspelt(serve[:-1], config, env)
        with subprocess.Popen(serve, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT):
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

    assert refused.returncode != 0
    assert refused.stderr.strip().splitlines()[-1] == (
        "xeray: import_path: serve_app:bulid_app does not exist; write serve_app:build_app"
    )
    assert answer.status_code == 200
    assert {replica["state"] for replica in replicas} == {"ready"}
    pids = {json.loads(path.read_text())["pid"] for path in holders}
    assert [path.name for path in holders] == ["arc-0.lock", "arc-1.lock"]
    assert len(pids) == 2, "each card has a holder of its own"


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
