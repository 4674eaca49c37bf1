"""Several hosts on one machine: network namespaces on a bridge, brought up by `xeray cluster up`.

::

    the tests ── bridge 10.x.y.254 ─┬─ veth ── namespace "head"     10.x.y.1   sshd, own /tmp
    (operator)                      ├─ veth ── namespace "worker1"  10.x.y.2   sshd, own /tmp
                                    └─ veth ── namespace "worker2"  10.x.y.3   sshd, own /tmp

What an operator does, over SSH and with an inventory, is done here. Everything is ended by
namespace and pid; names of processes count only within a namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from serve_app.cli.cluster.inventory import Inventory, Machine
from serve_app.cli.cluster.node_spec import NodeSpec
from serve_app.deployments.cluster_resources import ARC_GPU, XEON_CORES

from .lab import XERAY, Lab, Sshd, make_keys, ssh_section, why_no_sshd

GCS_PORT = 6379
HTTP_PORT = 8000
SSH_PORT = 2222
OBJECT_STORE_BYTES = 80 << 20


def why_not() -> str:
    """Return why hosts cannot be made here, "" where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    if reason := why_no_sshd():
        return reason
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


def _shown(folder: Path) -> str:
    """Shell that shows a checkout below /tmp in the host's own /tmp, which would hide it."""
    checkout = Path(__file__).resolve().parents[2]
    if Path("/tmp") not in checkout.parents:
        return ""
    place = folder / checkout.relative_to("/tmp")
    return f"mkdir -p {place} && mount --bind {checkout} {place} && "


@dataclass
class Host:
    """One namespace: its address, its folder (which is its /tmp), its sshd and its node."""

    name: str
    netns: str
    link: str
    address: str
    folder: Path
    spec: NodeSpec
    lab: Lab
    sshd: Sshd | None = field(default=None, repr=False)

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` on this host."""
        script = f'{_shown(self.folder)}mount --bind {self.folder} /tmp && exec "$@"'
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
        """Start the node with `xeray cluster up NAME` and wait until it has joined."""
        self.lab.up(self.name)

    def node(self, action: str, *words: str, timeout_s: float = 120.0) -> str:
        """Run `xeray cluster node ACTION` here, without SSH."""
        request = json.dumps({"spec": self.spec.model_dump(mode="json"), "token": self.token})
        program = (sys.executable, "-m", "serve_app.cli.main", "cluster", "node", action)
        return self.run(*program, *words, stdin=request, timeout_s=timeout_s)

    @property
    def token(self) -> str:
        """Ray's token, as `up` has put it here; "" before the first one."""
        path = self.lab.node_folder(self.name) / "auth_token"
        return path.read_text().strip() if path.exists() else ""

    def pids(self) -> list[int]:
        """Return the processes of this host, less its sshd: the operator's way in stays."""
        listed = _run("ip", "netns", "pids", self.netns, check=False)
        spared = None if self.sshd is None else self.sshd.process.pid
        return [pid for word in listed.split() if (pid := int(word)) != spared]

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
    """A bridge with hosts on it; the first is the head. `close()` leaves nothing behind.

    `lab` is the operator's view of them: the inventory, and `xeray cluster` with it.
    """

    def __init__(
        self, num_workers: int, *, cards: int = 1, proxy: str = "python", disk_mb: int = 0
    ) -> None:
        self._disk_mb = disk_mb
        self._tag = f"xr{os.getpid()}"
        self._prefix = f"10.213.{os.getpid() % 250}"
        self.folder = Path(tempfile.mkdtemp(prefix="xrh", dir="/tmp"))
        self.hosts: list[Host] = []
        try:
            self.lab = self._make_lab(num_workers, cards, proxy)
            _run("ip", "link", "add", self._tag, "type", "bridge")
            _run("ip", "addr", "add", f"{self._prefix}.254/24", "dev", self._tag)
            _run("ip", "link", "set", self._tag, "up")
            inventory = self.lab.inventory()
            for number, machine in enumerate(inventory.machines):
                self.hosts.append(self._add(number, machine, inventory))
            for host in self.hosts:
                host.sshd = self._start_sshd(host)
            for host in self.hosts:
                assert host.sshd is not None
                host.sshd.wait()
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
        """Start all nodes: one `xeray cluster up`."""
        self.lab.up()

    def deploy(
        self,
        args: dict[str, Any],
        timeout_s: float = 120.0,
        deployments: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Serve an application on all hosts' port HTTP_PORT; returns when it is ready.

        `deployments`: Serve's own options over those of `args`, which change without a restart.
        """
        document = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "0.0.0.0", "port": HTTP_PORT, "request_timeout_s": None},
            "applications": [
                {
                    "name": "xeray",
                    "route_prefix": "/",
                    "import_path": "serve_app:build_app",
                    "args": args,
                    "deployments": list(deployments),
                }
            ],
        }
        (self.head.folder / "serve.yaml").write_text(yaml.safe_dump(document))
        script = (
            "import os; from serve_app.deployments.launch import launch;"
            f"launch('/tmp/serve.yaml', address='{self.head.spec.head}', timeout_s={timeout_s});"
            "os._exit(0)"  # Serve stays
        )
        words = ("exec", "--on", self.head.name, "--", sys.executable, "-c", script)
        done = self.lab.run(*words, timeout_s=timeout_s + 60)
        assert done.returncode == 0, done.stdout + done.stderr

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
            if host.sshd is not None:
                host.sshd.close()
            _run("ip", "link", "del", host.link, check=False)
            _run("ip", "netns", "del", host.netns, check=False)
            if self._disk_mb:
                _run("umount", "-l", str(host.folder), check=False)
        _run("ip", "link", "del", self._tag, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_lab(self, num_workers: int, cards: int, proxy: str) -> Lab:
        """Return the inventory of hosts that are yet to be made."""
        machines = [self._machine(number, cards) for number in range(num_workers + 1)]
        make_keys(self.folder)
        document = {
            "cluster": {
                # In each node's folder, though each is alone in its /tmp: the processes' mark.
                "name": self._tag,
                "port": GCS_PORT,
                "command": XERAY,
                "folder": "/tmp",
                "proxy": proxy,
                "environment": {
                    "RAY_TMPDIR": "/tmp",
                    "XDG_CACHE_HOME": "/tmp/cache",
                    "XERAY_LOCK_DIR": "/tmp/locks",
                },
            },
            "ssh": ssh_section(self.folder, SSH_PORT, [m["address"] for m in machines]),
            "machines": machines,
        }
        roots = {machine["name"]: self.folder / machine["name"] for machine in machines}
        return Lab(self.folder, document, _environment(), roots)

    def _machine(self, number: int, cards: int) -> dict[str, Any]:
        store = f"--object-store-memory={OBJECT_STORE_BYTES}"
        machine = {"address": f"{self._prefix}.{number + 1}", "labels": {"room": "b12"}}
        if number == 0:
            return machine | {
                "name": "head",
                "role": "head",
                "num_cpus": 0,
                "cards": {ARC_GPU: 0, XEON_CORES: 0},
                "ray_args": [store, "--include-dashboard=false"],
            }
        return machine | {
            "name": f"worker{number}",
            "num_cpus": 4,
            "cards": {ARC_GPU: cards, XEON_CORES: min(cards, 1)},
            "environment": {"XERAY_SIMULATED_ARC_CARDS": str(cards)},
            "ray_args": [store],
        }

    def _add(self, number: int, machine: Machine, inventory: Inventory) -> Host:
        netns, link = f"{self._tag}n{number}", f"{self._tag}v{number}"
        folder = self.folder / machine.name
        folder.mkdir()
        if self._disk_mb:  # a disk of its own, that can be full
            size = f"size={self._disk_mb}m"
            _run("mount", "-t", "tmpfs", "-o", size, "xeray-test", str(folder))
        (folder / "locks").mkdir()
        _run("ip", "netns", "add", netns)
        spec = inventory.node_spec(machine)
        host = Host(machine.name, netns, link, machine.address, folder, spec, self.lab)
        inside = f"{self._tag}w{number}"
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", inside, "netns", netns)
        _run("ip", "link", "set", link, "master", self._tag, "up")
        in_netns = ("ip", "-n", netns)
        _run(*in_netns, "addr", "add", f"{machine.address}/24", "dev", inside)
        _run(*in_netns, "link", "set", inside, "up")
        _run(*in_netns, "link", "set", "lo", "up")
        _run(*in_netns, "route", "add", "default", "via", f"{self._prefix}.254")
        return host

    def _start_sshd(self, host: Host) -> Sshd:
        folder = host.folder / "sshd"
        folder.mkdir()
        return Sshd(
            folder, self.folder, host.address, SSH_PORT, prefix=host.command, seen_as="/tmp/sshd"
        )


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
