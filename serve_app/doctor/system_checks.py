"""Checks of the software around the engine: versions, disk, clock, Ray's resources."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Iterator

from serve_app.doctor.host import Host
from serve_app.doctor.result import CheckResult, failed, passed, skipped, warned
from serve_app.hardware.cpu import read_cpu_info

_PACKAGES = (
    "torch",
    "ray",
    "transformers",
    "openvino-genai",
    "triton",
    "intel-extension-for-pytorch",
)
_LOW_DISK_BYTES = 5 << 30

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
