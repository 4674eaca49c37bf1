"""Checks of the software around the engine: versions, ports, disk, clock, Ray's resources."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

from serve_app.doctor.host import Host
from serve_app.doctor.result import CheckResult, failed, passed, skipped, warned
from serve_app.hardware.cpu import read_cpu_info
from serve_app.hardware.sysfs import read_text

_PACKAGES = (
    "torch",
    "ray",
    "transformers",
    "openvino-genai",
    "triton",
    "intel-extension-for-pytorch",
)
_LISTEN = "0A"  # the kernel's state number of a listening TCP socket
_LOW_DISK_BYTES = 5 << 30
_OUR_PORTS = {
    6379: "Ray GCS",
    8000: "the API",
    8265: "Ray dashboard",
    8404: "HAProxy statistics",
    9101: "HAProxy metrics",
    10001: "Ray client",
}
_REPLICA_PORTS = range(30000, 31001)

# Runs in a process of its own: Ray leaves threads and handlers behind in the one that asks.
_RAY_QUERY = """
import json, ray
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
nodes = [{"name": n["NodeManagerHostname"], "resources": n["Resources"]}
         for n in ray.nodes() if n["Alive"]]
print("xeray-nodes " + json.dumps(nodes))
"""


def check_versions(host: Host) -> Iterator[CheckResult]:
    """The version matrix; Python must be one that the project supports."""
    versions = [f"Python {platform.python_version()}", f"kernel {platform.release()}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    evidence = ", ".join(versions)
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        yield passed("versions", evidence)
    else:
        yield failed(
            "versions", evidence, "use Python 3.11 or 3.12: make install PYTHON=python3.11"
        )


def check_listening(host: Host) -> Iterator[CheckResult]:
    """Ports of ours that answer beyond loopback; the API asks for keys only where they are set."""
    open_ports = sorted({port for address, port in _listeners(host) if not address.is_loopback})
    ours = [port for port in open_ports if port in _OUR_PORTS or port in _REPLICA_PORTS]
    name = "ports beyond loopback"
    if ours:
        listed = ", ".join(f"{port} ({_OUR_PORTS.get(port, 'a replica')})" for port in ours)
        yield warned(
            name,
            listed,
            "bind to 127.0.0.1 (`http_options.host`), or firewall them and set keys",
        )
    else:
        others = ", ".join(map(str, open_ports)) or "none"
        yield passed(name, f"none of ours; others: {others}")


def _listeners(host: Host) -> Iterator[tuple[IPv4Address | IPv6Address, int]]:
    for table in ("tcp", "tcp6"):
        lines = (read_text(host.root / "proc/net" / table) or "").splitlines()
        for line in lines[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[3] == _LISTEN:
                address, _, port = fields[1].partition(":")
                yield _address(address), int(port, 16)


def _address(text: str) -> IPv4Address | IPv6Address:
    """Decode /proc/net's form: each 32-bit word in hexadecimal, in the byte order of x86."""
    words = (bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    raw = b"".join(words)
    if len(raw) == 4:
        return IPv4Address(raw)
    address = IPv6Address(raw)
    return address.ipv4_mapped or address


def check_disk(host: Host) -> Iterator[CheckResult]:
    """Room for logs, caches and Ray's spilled objects."""
    for path in ("/tmp", "/var/log"):
        folder = host.root / path.lstrip("/")
        if not folder.is_dir():
            continue
        free = shutil.disk_usage(folder).free
        evidence = f"{free / 2**30:.1f} GiB free"
        if free < _LOW_DISK_BYTES:
            yield warned(
                f"disk {path}", evidence, f"make room below {path}, or move Ray: RAY_TMPDIR"
            )
        else:
            yield passed(f"disk {path}", evidence)


def check_clock(host: Host) -> Iterator[CheckResult]:
    """Nodes whose clocks differ confuse logs, traces and certificates."""
    output = host.run("timedatectl", "show", "-p", "NTPSynchronized", "--value")
    if output is None or output.returncode != 0:
        yield skipped("clock", "timedatectl does not answer here")
    elif output.text.strip() == "yes":
        yield passed("clock", "synchronised")
    else:
        yield warned("clock", "not synchronised", "sudo timedatectl set-ntp true")


def check_ray_resources(host: Host) -> Iterator[CheckResult]:
    """What this node declares to Ray against what it has."""
    name = "Ray resources"
    if not (host.root / "tmp/ray/ray_current_cluster").exists():
        yield skipped(name, "no Ray runs on this machine")
        return
    output = host.run(sys.executable, "-c", _RAY_QUERY, timeout_s=60.0)
    line = next(
        (line for line in (output.text if output else "").splitlines() if "xeray-nodes " in line),
        "",
    )
    if not line:
        yield skipped(name, "a Ray is recorded, but it does not answer")
        return
    nodes = json.loads(line.partition("xeray-nodes ")[2])
    here = next((node for node in nodes if node["name"] == platform.node()), nodes[0])
    yield _compare_resources(name, host, here["resources"])


def _compare_resources(name: str, host: Host, declared: dict[str, float]) -> CheckResult:
    cards = [card for card in host.cards() if not card.is_integrated]
    cores = read_cpu_info(host.root).num_physical_cores
    arc = int(declared.get("arc_gpu", 0))
    xeon = int(declared.get("xeon_cores", 0))
    evidence = f"arc_gpu {arc} of {len(cards)} card(s), xeon_cores {xeon} of {cores} core(s)"
    if arc > len(cards) and "XERAY_SIMULATED_ARC_CARDS" not in host.env:
        return failed(
            name, evidence, f"restart Ray with --resources='{{\"arc_gpu\": {len(cards)}}}'"
        )
    if xeon > cores:
        return failed(name, evidence, f"restart Ray with --resources='{{\"xeon_cores\": {cores}}}'")
    if arc < len(cards):
        return warned(
            name, evidence, "cards that Ray does not know stay idle: xeray cluster render"
        )
    return passed(name, evidence)
