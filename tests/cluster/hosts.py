"""Several hosts on one machine: network namespaces on a bridge, each a Ray node of the product.

::

    the tests ── bridge 10.x.y.254 ─┬─ veth ── namespace "head"  10.x.y.1   own /tmp, own processes
                                    ├─ veth ── namespace "one"   10.x.y.2
                                    └─ veth ── namespace "two"   10.x.y.3

A node is started by `xeray cluster node start`, what `xeray cluster up` runs over SSH. Everything
is ended by namespace and pid; names of processes count only within a namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.cli.cluster.node_spec import NodeSpec
from serve_app.deployments.cluster_resources import ARC_GPU, XEON_CORES

GCS_PORT = 6379
HTTP_PORT = 8000
OBJECT_STORE_BYTES = 80 << 20


def why_not() -> str:
    """Return why hosts cannot be made here, "" where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    name = f"xrp{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    try:
        bind = ["unshare", "--mount", "mount", "--bind", "/tmp", "/tmp"]
        link = ["ip", "link", "add", f"{name}v", "type", "veth", "peer", "name", f"{name}w"]
        for command in (["ip", "netns", "exec", name, *bind], link):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return f"not allowed here: {' '.join(command[:4])}: {done.stderr.strip()}"
        _run("ip", "link", "del", f"{name}v")
    finally:
        _run("ip", "netns", "del", name)
    return ""


@dataclass
class Host:
    """One namespace: its address, its folder (which is its /tmp), and its node."""

    name: str
    netns: str
    link: str
    address: str
    folder: Path
    spec: NodeSpec
    token: str

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` on this host."""
        script = f'mount --bind {self.folder} /tmp && exec "$@"'
        inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        return ["ip", "netns", "exec", self.netns, *inside, *words]

    def run(self, *words: str, stdin: str = "", timeout_s: float = 120.0) -> str:
        """Run a program here and return what it printed. Raises AssertionError where it fails."""
        done = subprocess.run(
            self.command(*words),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=_environment(),
        )
        assert done.returncode == 0, f"{self.name}: {words[:6]}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self) -> None:
        """Start the node with the product's command and wait until it has joined."""
        self.node("start")

    def node(self, action: str, *words: str, timeout_s: float = 120.0) -> str:
        """Run `xeray cluster node ACTION` here."""
        request = json.dumps({"spec": self.spec.model_dump(mode="json"), "token": self.token})
        program = (sys.executable, "-m", "serve_app.cli.main", "cluster", "node", action)
        return self.run(*program, *words, stdin=request, timeout_s=timeout_s)

    def pids(self) -> list[int]:
        """Return the processes of this host."""
        listed = _run("ip", "netns", "pids", self.netns, check=False)
        return [int(word) for word in listed.split()]

    def find(self, *parts: str) -> list[int]:
        """Return the processes here whose command line has all of `parts`."""
        return [pid for pid in self.pids() if all(part in command_line(pid) for part in parts)]

    def kill(self, *parts: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the processes here that `find` finds; return how many there were."""
        found = self.find(*parts)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return len(found)

    def cut(self) -> None:
        """Pull the network cable."""
        _run("ip", "link", "set", self.link, "down")

    def join(self) -> None:
        """Plug it in again."""
        _run("ip", "link", "set", self.link, "up")

    @property
    def url(self) -> str:
        """Where its proxy answers."""
        return f"http://{self.address}:{HTTP_PORT}"


class Hosts:
    """A bridge with hosts on it; the first is the head. `close()` leaves nothing behind."""

    def __init__(
        self, num_workers: int, *, cards: int = 1, proxy: str = "python", disk_mb: int = 0
    ) -> None:
        self._disk_mb = disk_mb
        self._tag = f"xr{os.getpid()}"
        self._prefix = f"10.213.{os.getpid() % 250}"
        self.folder = Path(tempfile.mkdtemp(prefix="xrh", dir="/tmp"))
        self.hosts: list[Host] = []
        self._token = secrets.token_hex(32)
        try:
            _run("ip", "link", "add", self._tag, "type", "bridge")
            _run("ip", "addr", "add", f"{self._prefix}.254/24", "dev", self._tag)
            _run("ip", "link", "set", self._tag, "up")
            for number in range(num_workers + 1):
                self.hosts.append(self._add(number, 0 if number == 0 else cards, proxy))
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> Host:
        """The host with the control service, without cards."""
        return self.hosts[0]

    @property
    def workers(self) -> list[Host]:
        """The others."""
        return self.hosts[1:]

    def start(self) -> None:
        """Start all nodes, the head first."""
        for host in self.hosts:
            host.start()

    def deploy(self, args: dict[str, Any], timeout_s: float = 120.0) -> None:
        """Serve an application on all hosts' port HTTP_PORT; returns when it is ready."""
        document = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "0.0.0.0", "port": HTTP_PORT, "request_timeout_s": None},
            "applications": [
                {
                    "name": "xeray",
                    "route_prefix": "/",
                    "import_path": "serve_app:build_app",
                    "args": args,
                }
            ],
        }
        (self.head.folder / "serve.yaml").write_text(yaml.safe_dump(document))
        script = (
            "import os; from serve_app.deployments.launch import launch;"
            f"launch('/tmp/serve.yaml', address='{self.head.spec.head}', timeout_s={timeout_s});"
            "os._exit(0)"  # Serve stays
        )
        words = ("exec", "--", sys.executable, "-c", script)
        self.head.node(*words, timeout_s=timeout_s + 60)

    def close(self) -> None:
        """End every process of every namespace by its pid, then the namespaces and the bridge."""
        for _ in range(5):
            alive = [pid for host in self.hosts for pid in host.pids()]
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not alive:
                break
            time.sleep(0.2)
        for host in self.hosts:
            _run("ip", "link", "del", host.link, check=False)
            _run("ip", "netns", "del", host.netns, check=False)
            if self._disk_mb:
                _run("umount", "-l", str(host.folder), check=False)
        _run("ip", "link", "del", self._tag, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _add(self, number: int, cards: int, proxy: str) -> Host:
        name = "head" if number == 0 else f"worker{number}"
        netns, link = f"{self._tag}n{number}", f"{self._tag}v{number}"
        address = f"{self._prefix}.{number + 1}"
        folder = self.folder / name
        folder.mkdir()
        if self._disk_mb:  # a disk of its own, that can be full
            size = f"size={self._disk_mb}m"
            _run("mount", "-t", "tmpfs", "-o", size, "xeray-test", str(folder))
        (folder / "locks").mkdir()
        spec = NodeSpec(
            name=name,
            cluster="hosts",
            role="head" if number == 0 else "worker",
            address=address,
            head=f"{self._prefix}.1:{GCS_PORT}",
            # Named apart though each is alone in its /tmp: the mark of a node's processes.
            folder=f"/tmp/{netns}",
            resources={ARC_GPU: cards, XEON_CORES: min(cards, 1)},
            num_cpus=4 if cards else 0,
            proxy=proxy,
            environment={
                "XERAY_SIMULATED_ARC_CARDS": str(cards),
                "XERAY_LOCK_DIR": "/tmp/locks",
                "RAY_TMPDIR": "/tmp",
            },
            ray_args=(
                f"--object-store-memory={OBJECT_STORE_BYTES}",
                *(("--include-dashboard=false",) if number == 0 else ()),
            ),
        )
        _run("ip", "netns", "add", netns)
        host = Host(name, netns, link, address, folder, spec, self._token)
        inside = f"{self._tag}w{number}"
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", inside, "netns", netns)
        _run("ip", "link", "set", link, "master", self._tag, "up")
        in_netns = ("ip", "-n", netns)
        _run(*in_netns, "addr", "add", f"{address}/24", "dev", inside)
        _run(*in_netns, "link", "set", inside, "up")
        _run(*in_netns, "link", "set", "lo", "up")
        _run(*in_netns, "route", "add", "default", "via", f"{self._prefix}.254")
        return host


@contextlib.contextmanager
def running_hosts(num_workers: int, **options: Any) -> Iterator[Hosts]:
    """Make hosts, start their nodes, and end everything afterwards."""
    hosts = Hosts(num_workers, **options)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.close()


def command_line(pid: int) -> str:
    """Return a process's command line, "" where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _environment() -> dict[str, str]:
    """Return ours less what belongs to a test session's own Ray."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "XERAY_"))}
    return {**kept, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout
