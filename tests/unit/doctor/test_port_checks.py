from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from serve_app.cli.exporter import DEFAULT_PORT as EXPORTER_PORT
from serve_app.doctor.host import CommandOutput, Host
from serve_app.doctor.port_checks import FIREWALL_TABLE, check_listening
from serve_app.doctor.result import CheckResult, Status

HEAD = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt uid timeout inode"
)
EVERYWHERE, LOOPBACK, LAN = "00000000", "0100007F", "0A00140A"
Listen = Callable[..., None]


@dataclass(frozen=True)
class FakeHost(Host):
    """A host whose programs are given."""

    outputs: Mapping[str, str] = field(default_factory=dict)

    def run(self, *command: str, timeout_s: float = 1.0) -> CommandOutput | None:
        text = self.outputs.get(" ".join(command))
        return None if text is None else CommandOutput(0, text)


@pytest.fixture
def listen(tmp_path: Path) -> Listen:
    """A function that lets a program listen on ports of an address, in /proc's form."""
    tables = tmp_path / "proc/net"
    tables.mkdir(parents=True)
    for table in ("tcp", "tcp6"):
        (tables / table).write_text(f"{HEAD}\n")

    def add(address: str, *ports: int, command: str = "", table: str = "tcp") -> None:
        for port in ports:
            inode = f"{port}{len(address)}"
            row = f"   0: {address}:{port:04X} {EVERYWHERE}:0000 0A 0:0 00:0 0 1000 0 {inode} 1\n"
            with (tables / table).open("a") as file:
                file.write(row)
            if command:
                folder = tmp_path / "proc" / inode
                (folder / "fd").mkdir(parents=True)
                (folder / "fd/3").symlink_to(f"socket:[{inode}]")
                (folder / "fd/4").symlink_to("/dev/null")
                (folder / "cmdline").write_text(command.replace(" ", "\0"))

    return add


def results(root: Path, **outputs: str) -> dict[str, CheckResult]:
    """Return the results by their evidence."""
    host = FakeHost(root, {}, {" ".join(FIREWALL_TABLE): text for text in outputs.values()})
    return {result.evidence: result for result in check_listening(host)}


def test_loopback_and_other_programs_are_no_fault(tmp_path: Path, listen: Listen) -> None:
    listen(LOOPBACK, 8000, 6379, command="/opt/xeray/bin/raylet")
    listen(EVERYWHERE, 22, 631, command="/usr/sbin/sshd")
    (result,) = results(tmp_path).values()
    assert (result.status, result.evidence) == (Status.PASS, "none of ours; others: 22, 631")


def test_each_service_is_named_with_its_ports_and_its_fix(tmp_path: Path, listen: Listen) -> None:
    listen("0" * 32, 8000, table="tcp6")
    listen(EVERYWHERE, 30000, 30001, 30002, command="ray::ServeReplica:xeray:Ingress")
    listen(EVERYWHERE, 8404, 9101)
    listen(LAN, 6379, command="/opt/xeray/lib/ray/core/src/ray/gcs/gcs_server --log")
    listen(EVERYWHERE, EXPORTER_PORT)
    found = results(tmp_path)
    fixes = {
        "the API on 8000": "http_options.host: 127.0.0.1",
        "Serve's replicas on 30000-30002": "xeray cluster render firewall",
        "HAProxy's statistics and metrics on 8404, 9101": "xeray cluster render firewall",
        "Ray on 6379": "xeray cluster render firewall",
        f"hardware metrics on {EXPORTER_PORT}": "--host 127.0.0.1",
    }
    assert set(found) == set(fixes)
    for evidence, fix in fixes.items():
        assert found[evidence].status is Status.WARN
        assert fix in found[evidence].fix


@pytest.mark.parametrize(
    "command",
    [
        "/opt/xeray/lib/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/ray",
        "ray::IDLE",
        "/opt/xeray/bin/python -u /opt/xeray/lib/ray/dashboard/agent.py --node-ip",
    ],
)
def test_rays_random_ports_are_known_by_their_owner(
    tmp_path: Path, listen: Listen, command: str
) -> None:
    listen(EVERYWHERE, 45137, command=command)
    assert list(results(tmp_path)) == ["Ray on 45137"]


def test_the_rendered_firewall_closes_them(tmp_path: Path, listen: Listen) -> None:
    listen(EVERYWHERE, 6379, 8000)
    table = "table inet xeray {\n chain input {\n  type filter hook input; policy drop;\n } }"
    found = results(tmp_path, table=table)
    assert {result.status for result in found.values()} == {Status.PASS}
    assert "Ray on 6379, closed to strangers by nftables' table inet xeray" in found
