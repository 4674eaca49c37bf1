"""What listens beyond loopback: each port of ours with whose it is, and how it is closed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from serve_app.doctor.host import Host
from serve_app.doctor.result import CheckResult, passed, warned
from serve_app.hardware.sysfs import read_text

FIREWALL_TABLE = ("nft", "list", "table", "inet", "xeray")
_LISTEN = "0A"  # the kernel's state number of a listening TCP socket
_FIREWALL = "close it to all but the nodes: `xeray cluster render firewall`"


@dataclass(frozen=True, slots=True)
class Service:
    """Something of ours that opens ports: those it always has, and programs that own others.

    `programs` are beginnings of a command line's first word, less its folder.
    """

    name: str
    fix: str
    ports: frozenset[int] = frozenset()
    programs: tuple[str, ...] = ()


SERVICES = (
    Service(
        "the API",
        "set keys (`auth.keys_file`) and put TLS before it (`xeray cluster render nginx`), or bind"
        " it to this machine: `http_options.host: 127.0.0.1`",
        frozenset({8000}),
    ),
    Service(
        "Serve's replicas",
        f"they ask for the API's keys too, but speak plain HTTP: {_FIREWALL}",
        frozenset({8500, *range(30000, 32001), *range(40000, 41001)}),
    ),
    Service(
        "HAProxy's statistics and metrics",
        f"nobody is asked for a key there: {_FIREWALL}; on a single machine `xeray serve` keeps"
        " them on loopback",
        frozenset({8404, 9101}),
        ("haproxy",),
    ),
    Service(
        "Ray",
        f"whoever has Ray's token runs programs here, and nothing is encrypted: {_FIREWALL}; on a"
        " single machine `xeray serve` keeps it on loopback",
        frozenset({6379, 8265, 10001, 52365}),
        ("raylet", "gcs_server", "ray::", "dashboard"),
    ),
    Service(
        "hardware metrics",
        "`xeray exporter --host 127.0.0.1`, or only Prometheus' host: `firewall.monitoring` of"
        " `xeray cluster render firewall`",
        frozenset({9410}),
    ),
)


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening TCP socket: its address, port, and inode, by which its owner is found."""

    address: IPv4Address | IPv6Address
    port: int
    inode: str


def check_listening(host: Host) -> Iterator[CheckResult]:
    """Ports that answer beyond loopback: a result for each service of ours that has some."""
    name = "ports beyond loopback"
    found = [listener for listener in _listeners(host) if not listener.address.is_loopback]
    owners = _owners(host, {listener.inode for listener in found})
    ports: dict[str, set[int]] = {}
    for listener in found:
        service = _service(listener.port, owners.get(listener.inode, ""))
        ports.setdefault(service.name if service else "", set()).add(listener.port)
    others = _listed(ports.pop("", ()))
    if not ports:
        yield passed(name, f"none of ours; others: {others or 'none'}")
        return
    is_closed = _is_guarded(host)
    for service in SERVICES:
        if service.name not in ports:
            continue
        evidence = f"{service.name} on {_listed(ports[service.name])}"
        if is_closed:
            yield passed(name, f"{evidence}, closed to strangers by nftables' table inet xeray")
        else:
            yield warned(name, evidence, service.fix)


def _service(port: int, owner: str) -> Service | None:
    by_owner = (service for service in SERVICES if owner and owner.startswith(service.programs))
    by_port = (service for service in SERVICES if port in service.ports)
    # A port that has a number of its own says more than the process: replicas belong to Ray too.
    return next(by_port, None) or next(by_owner, None)


def _is_guarded(host: Host) -> bool:
    """Whether the rendered firewall is loaded; False where that may not be read."""
    output = host.run(*FIREWALL_TABLE)
    return output is not None and output.returncode == 0 and "policy drop" in output.text


def _listed(ports: Iterable[int]) -> str:
    """Return `8000, 30000-30003`: neighbours in one piece."""
    pieces: list[list[int]] = []
    for port in sorted(ports):
        if pieces and port == pieces[-1][-1] + 1:
            pieces[-1].append(port)
        else:
            pieces.append([port])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in pieces)


def _listeners(host: Host) -> Iterator[Listener]:
    for table in ("tcp", "tcp6"):
        lines = (read_text(host.root / "proc/net" / table) or "").splitlines()
        for line in lines[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[3] == _LISTEN:
                address, _, port = fields[1].partition(":")
                inode = fields[9] if len(fields) > 9 else ""
                yield Listener(_address(address), int(port, 16), inode)


def _owners(host: Host, inodes: set[str]) -> Mapping[str, str]:
    """Return inode → first word of its process' command line, for processes that may be read."""
    owners: dict[str, str] = {}
    if not inodes:
        return owners
    for folder in (host.root / "proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for handle in (folder / "fd").iterdir():
                inode = os.readlink(handle).removeprefix("socket:[").removesuffix("]")
                if inode in inodes:
                    owners[inode] = _program(folder)
    return owners


def _program(folder: Path) -> str:
    words = (read_text(folder / "cmdline") or "").replace("\0", " ").split()
    if not words:
        return ""
    # Ray's Python processes: `python …/dashboard/agent.py`, or renamed to `ray::NAME`.
    script = next((word for word in words[1:3] if "/ray/dashboard/" in word), None)
    return "dashboard" if script else words[0].rpartition("/")[2] or words[0]


def _address(text: str) -> IPv4Address | IPv6Address:
    """Decode /proc/net's form: each 32-bit word in hexadecimal, in the byte order of x86."""
    words = (bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    raw = b"".join(words)
    if len(raw) == 4:
        return IPv4Address(raw)
    address = IPv6Address(raw)
    return address.ipv4_mapped or address
