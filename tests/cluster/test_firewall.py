"""The rendered nftables rules, loaded in a network namespace: who reaches what."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve_app.cli.cluster.inventory import parse_inventory
from serve_app.cli.cluster.render.firewall import render
from serve_app.core.errors import ConfigError

API, GCS, SSH, EXPORTER, OTHER = 8000, 6379, 22, 9410, 7777
PORTS = (API, GCS, SSH, EXPORTER, OTHER)
NODE, CLIENT, PROMETHEUS, STRANGER = "10.214.7.2", "10.214.7.20", "10.214.7.30", "10.214.7.40"
SERVER = "10.214.7.1"
INVENTORY = f"""
machines:
  - {{name: head, address: {SERVER}, role: head}}
  - {{name: one, address: one.example.org, node_ip: {NODE}, port: 2222}}
firewall:
  clients: [{CLIENT}, "fd00::/64"]
  monitoring: [{PROMETHEUS}]
  allowed_tcp: [{OTHER}]
"""


def rules(inventory: str = INVENTORY) -> str:
    return render(parse_inventory(inventory, "test"))["xeray.nft"]


def test_a_machine_without_an_address_is_named() -> None:
    with pytest.raises(ConfigError, match=r"one: a firewall needs an address.*set node_ip"):
        rules(INVENTORY.replace(f", node_ip: {NODE}", ""))


def test_nobody_is_no_network_of_clients() -> None:
    with pytest.raises(ConfigError, match="nobody gets in"):
        rules(INVENTORY.replace(f'clients: [{CLIENT}, "fd00::/64"]', "clients: []"))


def test_by_default_the_api_and_sshd_are_open_and_nothing_else() -> None:
    text = rules(f"machines: [{{address: {SERVER}, role: head}}]")
    accepted = [line.strip() for line in text.splitlines() if line.rstrip().endswith("accept")]
    assert [line for line in accepted if "tcp dport" in line] == [
        "meta nfproto ipv4 tcp dport { 22 } accept",
        "meta nfproto ipv6 tcp dport { 22 } accept",
        "meta nfproto ipv4 tcp dport { 8000 } accept",
        "meta nfproto ipv6 tcp dport { 8000 } accept",
    ]
    assert "policy drop;" in text


@dataclass
class Guarded:
    """A namespace with the rules, and listeners on PORTS in it."""

    netns: str

    def reach(self, source: str) -> set[int]:
        """Return the ports that answer to `source`."""
        found = set()
        for port in PORTS:
            with socket.socket() as probe:
                probe.settimeout(0.15)
                probe.bind((source, 0))
                if probe.connect_ex((SERVER, port)) == 0:
                    found.add(port)
        return found


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr.strip()}"
    return done


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    """Made with one cable; our end has the addresses of everybody else."""
    nft = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin")
    if nft is None:
        pytest.skip("no nft: it comes with Debian's package nftables")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = f"xf{os.getpid()}"
    if run("ip", "netns", "add", tag, check=False).returncode != 0:
        pytest.skip("network namespaces are not allowed here")
    here, there = f"{tag}a", f"{tag}b"
    inside = ("ip", "netns", "exec", tag)
    listeners = None
    try:
        run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", tag)
        for address in (NODE, CLIENT, PROMETHEUS, STRANGER):
            run("ip", "addr", "add", f"{address}/24", "dev", here)
        run("ip", "link", "set", here, "up")
        run("ip", "-n", tag, "addr", "add", f"{SERVER}/24", "dev", there)
        run("ip", "-n", tag, "link", "set", there, "up")
        run("ip", "-n", tag, "link", "set", "lo", "up")
        path = tmp_path / "xeray.nft"
        path.write_text(rules())
        if run(*inside, nft, "list", "ruleset", check=False).returncode != 0:
            pytest.skip("this kernel has no nf_tables")
        for _ in range(2):  # loading twice changes nothing
            run(*inside, nft, "-f", str(path))
        script = (
            f"import socket, sys; held = [socket.create_server(('', p)) for p in {PORTS}];"
            " print('listening', flush=True); sys.stdin.read()"
        )
        listeners = subprocess.Popen(
            [*inside, "python3", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert listeners.stdout is not None
        assert listeners.stdout.readline() == b"listening\n"
        yield Guarded(tag)
    finally:
        if listeners is not None:
            listeners.communicate(timeout=10)
        with contextlib.suppress(AssertionError):
            run("ip", "link", "del", here)
        run("ip", "netns", "del", tag)


def test_who_reaches_what(guarded: Guarded) -> None:
    assert guarded.reach(NODE) == set(PORTS)  # Ray's own ports are random
    assert guarded.reach(CLIENT) == {API, SSH, OTHER}
    assert guarded.reach(PROMETHEUS) == {EXPORTER, SSH, OTHER}
    assert guarded.reach(STRANGER) == {SSH, OTHER}
    script = f"import socket; socket.create_connection(('127.0.0.1', {GCS}), 2)"
    run("ip", "netns", "exec", guarded.netns, "python3", "-c", script)
    listed = run("ip", "netns", "exec", guarded.netns, "/usr/sbin/nft", "list", "tables").stdout
    assert listed.split() == ["table", "inet", "xeray"]
