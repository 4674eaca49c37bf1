"""An inventory whose machines are reached through sshd, and `xeray cluster` as an operator runs it.

Two forms of one interface: nodes on loopback addresses behind one sshd (here), which any user may
have, and hosts with a network, an sshd and a /tmp of their own (`hosts.py`), which need root.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from serve_app.cli.cluster.inventory import Inventory, parse_inventory
from serve_app.cli.cluster.node_spec import FOLDER_VARIABLE
from serve_app.cli.cluster.processes import find_marked

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""
XERAY = str(Path(sys.executable).parent / "xeray")
SSHD_TIMEOUT_S = 10.0


def why_no_sshd() -> str:
    """Return why sshd cannot be run here, "" where it can."""
    if SSHD and shutil.which("ssh") and shutil.which("ssh-keygen"):
        return ""
    return "no sshd here: it comes with Debian's package openssh-server"


@dataclass
class Lab:
    """An inventory (`document`, which a test may change) and the commands on it.

    `folder` holds the inventory and the keys, `roots` the machines' `cluster.folder` by name as
    this machine sees them.
    """

    folder: Path
    document: dict[str, Any]
    env: dict[str, str]
    roots: dict[str, Path] = field(default_factory=dict)

    def run(self, *arguments: str, timeout_s: float = 200.0) -> subprocess.CompletedProcess[str]:
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
            timeout=timeout_s,
        )

    def up(self, *names: str) -> subprocess.CompletedProcess[str]:
        """Start the machines of `names` (all without). Raises AssertionError where one fails."""
        done = self.run("up", *names)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def states(self, *arguments: str) -> dict[str, tuple[str, str]]:
        """Return name → (state, detail) of a command with --json."""
        done = self.run(*arguments, "--json")
        assert done.stdout, done.stderr
        return {row["name"]: (row["state"], row["detail"]) for row in json.loads(done.stdout)}

    def inventory(self) -> Inventory:
        """Return the inventory as it stands now."""
        return parse_inventory(yaml.safe_dump(self.document), "lab")

    @property
    def names(self) -> list[str]:
        """The machines' names, the head's first."""
        return [machine["name"] for machine in self.document["machines"]]

    def node_folder(self, name: str) -> Path:
        """Return where this machine sees a node's folder."""
        return self.roots[name] / str(self.document["cluster"]["name"]) / name

    def num_processes(self, name: str) -> int:
        """Return how many processes of a node run."""
        inventory = self.inventory()
        (machine,) = inventory.select((name,))
        return len(find_marked(FOLDER_VARIABLE, str(inventory.node_spec(machine).path)))


class Sshd:
    """An sshd at address:port that lets in the owner of the key `keys`/id, and nobody else.

    `folder` is for its files; `seen_as` what it calls that folder, where `prefix`, the command that
    runs it, gives it other ones. It is ended by `close()`.
    """

    def __init__(
        self,
        folder: Path,
        keys: Path,
        address: str,
        port: int,
        *,
        prefix: Callable[..., Sequence[str]] = lambda *words: words,
        seen_as: str | None = None,
    ) -> None:
        seen = seen_as or str(folder)
        shutil.copy(keys / "host", folder / "host")
        shutil.copy(keys / "id.pub", folder / "authorized")
        (folder / "sshd_config").write_text(
            f"ListenAddress {address}\nPort {port}\nHostKey {seen}/host\nPidFile none\n"
            f"AuthorizedKeysFile {seen}/authorized\nStrictModes no\nUsePAM no\nUseDNS no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.log = folder / "sshd.log"
        command = prefix(SSHD, "-f", f"{seen}/sshd_config", "-D", "-e")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log)

    def wait(self) -> None:
        """Wait until it listens. Raises RuntimeError with its log where it does not."""
        deadline_s = time.monotonic() + SSHD_TIMEOUT_S
        while "Server listening" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"sshd does not run: {self.log.read_text().strip()[-300:]}")
            time.sleep(0.02)

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(timeout=10)


def make_keys(folder: Path) -> None:
    """Make `host`, the machines' key, and `id`, the operator's."""
    for name in ("host", "id"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)


def ssh_section(folder: Path, port: int, addresses: Sequence[str]) -> dict[str, Any]:
    """Return the inventory's `ssh`: the key of `make_keys`, and the machines' known already."""
    host_key = " ".join((folder / "host.pub").read_text().split()[:2])
    known = "".join(f"[{address}]:{port} {host_key}\n" for address in addresses)
    (folder / "known").write_text(known)
    return {
        "user": getpass.getuser(),
        "port": port,
        "key": str(folder / "id"),
        "options": [f"UserKnownHostsFile={folder / 'known'}", "GlobalKnownHostsFile=/dev/null"],
    }


@contextlib.contextmanager
def loopback_lab(find_free_port: Callable[[], int], env: dict[str, str]) -> Iterator[Lab]:
    """Make a head and a worker with two simulated cards, on one machine; nothing is started."""
    folder = Path(tempfile.mkdtemp(prefix="xl", dir="/tmp"))  # short: sockets lie below it
    port = find_free_port()
    sshd = None
    try:
        make_keys(folder)
        document = _loopback_document(folder, find_free_port)
        document["ssh"] = ssh_section(folder, port, ["127.0.0.1"])
        lab = Lab(folder, document, env, dict.fromkeys(("head", "worker1"), folder))
        (folder / "sshd").mkdir()
        sshd = Sshd(folder / "sshd", folder, "127.0.0.1", port)
        sshd.wait()
        try:
            yield lab
        finally:
            lab.run("down")
    finally:
        if sshd is not None:
            sshd.close()
        shutil.rmtree(folder, ignore_errors=True)


def _loopback_document(folder: Path, find_free_port: Callable[[], int]) -> dict[str, Any]:
    # One network for all: ports that Ray has a fixed number for would clash.
    args = ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=80000000"]
    dashboard = f"--dashboard-port={find_free_port()}"
    agent = f"--dashboard-agent-listen-port={find_free_port()}"
    return {
        "cluster": {
            "name": "lab",
            "port": find_free_port(),
            "command": XERAY,
            "folder": str(folder),
            "proxy": "python",
            "environment": {"RAY_TMPDIR": str(folder / "t")},
        },
        "machines": [
            {
                "name": "head",
                "address": "127.0.0.1",
                "node_ip": "127.0.0.2",
                "role": "head",
                "num_cpus": 1,
                "ray_args": [*args, dashboard, "--include-dashboard=false"],
            },
            {
                "name": "worker1",
                "address": "127.0.0.1",
                "node_ip": "127.0.0.3",
                "cards": {"arc_gpu": 2, "xeon_cores": 1},
                "labels": {"room": "b12"},
                "environment": {"XERAY_SIMULATED_ARC_CARDS": "2"},
                "ray_args": [*args, agent],
            },
        ],
    }
