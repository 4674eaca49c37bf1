"""`xeray cluster up|status|exec|down` through a real sshd: two nodes on loopback addresses."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli.cluster.node_spec import FOLDER_VARIABLE
from serve_app.cli.cluster.processes import find_marked

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
RAY_ARGS = ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=80000000"]
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        not (Path(SSHD).exists() and shutil.which("ssh")),
        reason="no sshd here: it comes with Debian's package openssh-server",
    ),
]


@dataclass
class Lab:
    """An inventory of two nodes behind one sshd."""

    folder: Path
    document: dict[str, Any]
    env: dict[str, str]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `xeray cluster` with the inventory as it stands now."""
        path = self.folder / "inventory.yaml"
        path.write_text(yaml.safe_dump(self.document))
        command = [sys.executable, "-m", "serve_app.cli.main", "cluster", arguments[0]]
        return subprocess.run(
            [*command, "-i", str(path), *arguments[1:]],
            check=False,
            capture_output=True,
            text=True,
            env=self.env,
            timeout=200,
        )

    def states(self, *arguments: str) -> dict[str, tuple[str, str]]:
        """Return name → (state, detail) of a command with --json."""
        done = self.run(*arguments, "--json")
        assert done.stdout, done.stderr
        return {row["name"]: (row["state"], row["detail"]) for row in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def lab(find_free_port: Callable[[], int], clean_environment: dict[str, str]) -> Iterator[Lab]:
    folder = Path(tempfile.mkdtemp(prefix="xl", dir="/tmp"))  # short: sockets lie below it
    port = find_free_port()
    for name in ("host", "id"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    host_key = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\n"
        f"AuthorizedKeysFile {folder}/id.pub\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    command = [SSHD, "-f", str(folder / "sshd_config"), "-D", "-e"]
    log = (folder / "sshd.log").open("w")
    sshd = subprocess.Popen(command, stderr=log)
    lab = Lab(folder, _inventory(folder, port, find_free_port), dict(clean_environment))
    try:
        _await_sshd(folder / "sshd.log", sshd)
        yield lab
    finally:
        lab.run("down")
        sshd.terminate()
        sshd.wait(timeout=10)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _inventory(folder: Path, port: int, find_free_port: Callable[[], int]) -> dict[str, Any]:
    dashboard = f"--dashboard-port={find_free_port()}"
    agent = f"--dashboard-agent-listen-port={find_free_port()}"
    return {
        "cluster": {
            "name": "lab",
            "port": find_free_port(),
            "command": str(Path(sys.executable).parent / "xeray"),
            "folder": str(folder),
            "proxy": "python",
            "environment": {"RAY_TMPDIR": str(folder / "t")},
        },
        "ssh": {
            "user": getpass.getuser(),
            "port": port,
            "key": str(folder / "id"),
            "options": [f"UserKnownHostsFile={folder / 'known'}", "GlobalKnownHostsFile=/dev/null"],
        },
        "machines": [
            {
                "name": "one",
                "address": "127.0.0.1",
                "node_ip": "127.0.0.2",
                "role": "head",
                "num_cpus": 1,
                "ray_args": [*RAY_ARGS, dashboard, "--include-dashboard=false"],
            },
            {
                "name": "two",
                "address": "127.0.0.1",
                "node_ip": "127.0.0.3",
                "cards": {"arc_gpu": 2, "xeon_cores": 1},
                "labels": {"room": "b12"},
                "environment": {"XERAY_SIMULATED_ARC_CARDS": "2"},
                "ray_args": [*RAY_ARGS, agent],
            },
        ],
    }


def _await_sshd(log: Path, sshd: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 10
    while "Server listening" not in log.read_text():
        if sshd.poll() is not None or time.monotonic() > deadline_s:
            pytest.skip(f"sshd does not run here: {log.read_text().strip()[-300:]}")
        time.sleep(0.05)


def _processes(lab: Lab, name: str) -> int:
    return len(find_marked(FOLDER_VARIABLE, str(lab.folder / "lab" / name)))


def test_machines_that_must_not_start_are_told_apart(lab: Lab) -> None:
    """A wrong path, too many cards and a closed port: one line each, nothing started, exit 1."""
    original = lab.document["machines"]
    bad = [
        {"name": "lost", "address": "127.0.0.1", "node_ip": "127.0.0.4", "port": 1},
        {"name": "bare", "address": "127.0.0.1", "node_ip": "127.0.0.5", "command": "/none"},
        {**original[1], "name": "poor", "node_ip": "127.0.0.6", "cards": {"arc_gpu": 3}},
    ]
    head = {**original[0], "command": "/none"}
    lab.document["machines"] = [head, *bad]
    try:
        done = lab.run("up")
    finally:
        lab.document["machines"] = original
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "no XeRay at /none" in lines["one"]
    assert "Connection refused" in lines["lost"]
    assert "no XeRay at /none" in lines["bare"]
    assert "3 arc_gpu in the inventory, 2 on the machine" in lines["poor"]


def test_an_unknown_host_key_is_refused_with_the_fix(lab: Lab) -> None:
    options = lab.document["ssh"]["options"]
    lab.document["ssh"]["options"] = [
        "UserKnownHostsFile=/dev/null", "GlobalKnownHostsFile=/dev/null",
        "StrictHostKeyChecking=yes",
    ]  # fmt: skip
    try:
        state, detail = lab.states("up")["one"]
    finally:
        lab.document["ssh"]["options"] = options
    assert state == "failed"
    assert "ssh-keyscan -p" in detail


def test_up_status_exec_down(lab: Lab) -> None:
    done = lab.run("up")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "started" in lines["one"]
    assert "2 arc_gpu, 1 xeon_cores (Simulated Arc card 0, cpu" in lines["two"]

    rows = json.loads(lab.run("status", "--json").stdout)
    nodes = {row["name"]: row["facts"]["node"] for row in rows}
    assert [row["state"] for row in rows] == ["alive", "alive"]
    assert nodes["two"]["resources"]["arc_gpu"] == 2
    assert nodes["two"]["labels"]["room"] == "b12"
    assert nodes["two"]["labels"]["xeray/card-driver"] == "cpu"
    assert "arc_gpu" not in nodes["one"]["resources"]
    _check_token(lab)
    _check_exec(lab)

    assert {state for state, _ in lab.states("up").values()} == {"runs already"}
    assert _processes(lab, "two") > 3
    down = lab.run("down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert (_processes(lab, "one"), _processes(lab, "two")) == (0, 0)
    status = lab.run("status")
    assert status.returncode == 1
    assert status.stdout.count("stopped") == 2


def _check_token(lab: Lab) -> None:
    """One token on both, for its owner only; without it Ray lets nobody in."""
    paths = [lab.folder / "lab" / name / "auth_token" for name in ("one", "two")]
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o600, 0o600]
    tokens = {path.read_text() for path in paths}
    assert len(tokens) == 1
    assert len(tokens.pop()) >= 32
    head = f"127.0.0.2:{lab.document['cluster']['port']}"
    done = subprocess.run(
        [Path(sys.executable).parent / "ray", "health-check", f"--address={head}"],
        check=False,
        capture_output=True,
        text=True,
        env={**lab.env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64},
        timeout=60,
    )
    assert done.returncode != 0


def _check_exec(lab: Lab) -> None:
    done = lab.run("exec", "--on", "two", "--", "sh", "-c", "echo $RAY_ADDRESS; exit 3")
    assert done.returncode == 1
    assert done.stdout == f"two: 127.0.0.2:{lab.document['cluster']['port']}\n"
    assert "status 3" in done.stderr
