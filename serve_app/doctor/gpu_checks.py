"""Checks of Intel GPUs: driver, rights, runtime, memory window, link, resets, speed.

Paths and formats: the kernel's ABI documentation of i915, xe and PCI (see `hardware.telemetry`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from serve_app.doctor.host import Host
from serve_app.doctor.result import CheckResult, failed, passed, skipped, warned
from serve_app.hardware.cards import Card
from serve_app.hardware.sysfs import read_int, read_text

_SMALL_WINDOW_BYTES = 256 << 20
_RUNTIME_PACKAGES = ("libze1", "libze-intel-gpu1", "intel-level-zero-gpu", "intel-opencl-icd")
_OLDEST_RUNTIME = 24
"""Compute runtimes are numbered by year; older ones do not know Battlemage."""


def check_driver(host: Host) -> Iterator[CheckResult]:
    """Each Intel display device must have i915 or xe bound."""
    name = "GPU driver"
    unbound = [device for device in _display_devices(host) if not (device / "driver").exists()]
    for device in unbound:
        yield failed(
            name,
            f"{device.name} ({read_text(device / 'device')}) has no driver bound",
            "sudo modprobe xe; see `xeray doctor explain missing-kernel-module`",
            "missing-kernel-module",
        )
    for card in host.cards():
        yield passed(name, f"{card.name} at {card.pci_address} uses {card.driver}")
    if not unbound and not host.cards():
        yield skipped(name, "no Intel GPU on the PCI bus")


def check_device_nodes(host: Host) -> Iterator[CheckResult]:
    """The user who runs the service must be able to open each render node."""
    for card in host.cards():
        name = f"device node of {card.lock_name}"
        if card.render_node is None:
            yield failed(
                name,
                f"{card.pci_address} has no renderD node",
                "sudo modprobe -r xe && sudo modprobe xe; in a container: --device /dev/dri",
                "missing-kernel-module",
            )
            continue
        node = host.root / card.render_node.lstrip("/")
        if not node.exists():
            yield failed(
                name,
                f"{card.render_node} does not exist here",
                "in a container: --device /dev/dri; else check udev",
                "missing-kernel-module",
            )
        elif host.can_open(node):
            yield passed(name, f"{card.render_node} can be opened")
        else:
            yield failed(
                name,
                f"{card.render_node} may not be opened by this user",
                "sudo usermod -aG render $USER, then log in anew",
                "render-group",
            )


def check_runtime_packages(host: Host) -> Iterator[CheckResult]:
    """Level Zero's loader and driver, and the OpenCL driver, by Debian's package database."""
    name = "Level Zero and compute runtime"
    if not host.cards():
        yield skipped(name, "no Intel GPU")
        return
    versions = {package: _package_version(host, package) for package in _RUNTIME_PACKAGES}
    found = {package: version for package, version in versions.items() if version}
    driver = found.get("libze-intel-gpu1") or found.get("intel-level-zero-gpu")
    if "libze1" not in found or driver is None:
        yield failed(
            name,
            f"installed: {_listed(found)}",
            "sudo apt install libze1 libze-intel-gpu1 intel-opencl-icd",
            "xpu-not-available",
        )
        return
    year = re.match(r"(\d+)\.", driver)
    if year and int(year[1]) < _OLDEST_RUNTIME:
        yield warned(
            name,
            f"{_listed(found)}: older than {_OLDEST_RUNTIME}.x",
            "install the runtime of Intel's graphics repository for your distribution",
            "driver-rollback",
        )
    else:
        yield passed(name, _listed(found))


def check_torch_xpu(host: Host) -> Iterator[CheckResult]:
    """Walk the causes of "XPU not available"; the first that holds is the finding."""
    name = "torch.xpu"
    cards = host.cards()
    if not cards:
        yield skipped(name, "no Intel GPU")
        return
    torch = host.module("torch")
    if torch is None:
        yield failed(name, "torch cannot be imported", "make install TORCH_INDEX=xpu")
        return
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        yield passed(name, f"torch {torch.__version__} sees {xpu.device_count()} device(s)")
        return
    cause, fix, fault = _why_no_xpu(host, torch, cards)
    yield failed(name, f"torch {torch.__version__}: {cause}", fix, fault)


def _why_no_xpu(host: Host, torch: object, cards: tuple[Card, ...]) -> tuple[str, str, str]:
    xpu = getattr(torch, "xpu", None)
    is_compiled = getattr(xpu, "_is_compiled", lambda: False)
    if xpu is None or not is_compiled():
        return "not an XPU build", "make install TORCH_INDEX=xpu", "wrong-torch-build"
    nodes = [host.root / c.render_node.lstrip("/") for c in cards if c.render_node]
    if not any(host.can_open(node) for node in nodes):
        return (
            "no render node can be opened",
            "sudo usermod -aG render $USER, then log in anew",
            "render-group",
        )
    for variable in ("ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR"):
        if host.env.get(variable):
            value = host.env[variable]
            return f"{variable}={value} may hide it", f"unset {variable}", "xpu-not-available"
    if "oneapi" in host.env.get("LD_LIBRARY_PATH", ""):
        return "oneAPI's libraries come before torch's", "unset LD_LIBRARY_PATH", "sycl-clash"
    if _core_dumps(host):
        return "a card was reset and has not recovered", "restart the machine", "engine-reset"
    return (
        "the driver is bound, but the Level Zero runtime finds no device",
        "sudo apt install libze1 libze-intel-gpu1; xeray doctor explain xpu-not-available",
        "xpu-not-available",
    )


def check_memory_window(host: Host) -> Iterator[CheckResult]:
    """Resizable BAR and Above 4G decoding: BAR 2 should span the card's memory."""
    for card in host.cards():
        if card.is_integrated:
            continue
        name = f"Resizable BAR of {card.lock_name}"
        size = f"BAR 2 is {card.bar_bytes >> 20} MiB"
        fix = "enable Above 4G Decoding and Re-Size BAR Support in the firmware, CSM off"
        if card.bar_bytes == 0:
            evidence = "BAR 2 has no address: Above 4G decoding is off"
            yield failed(name, evidence, fix, "above-4g-decoding")
        elif card.bar_bytes <= _SMALL_WINDOW_BYTES:
            yield warned(name, size, fix, "above-4g-decoding")
        else:
            yield passed(name, size)


def check_link(host: Host) -> Iterator[CheckResult]:
    """PCIe width and speed, read at the bridge: the endpoint itself reports 2.5 GT/s x1."""
    for card in host.cards():
        if card.is_integrated:
            continue
        name = f"PCIe link of {card.lock_name}"
        device = (host.root / "sys/bus/pci/devices" / card.pci_address).resolve()
        # An Arc card is a switch of its own: card, downstream port, upstream port.
        bridge = device.parent.parent
        width, best = read_int(bridge / "current_link_width"), read_int(bridge / "max_link_width")
        speed = read_text(bridge / "current_link_speed")
        if width is None or best is None:
            yield skipped(name, "the bridge tells no link width")
        elif width < best:
            yield warned(
                name,
                f"x{width} of x{best} at {speed}",
                "move the card to a slot with all lanes; see the board's manual for shared slots",
            )
        else:
            yield passed(name, f"x{width} at {speed}")


def check_slots(host: Host) -> Iterator[CheckResult]:
    """Free PCIe slots, where the firmware describes them."""
    name = "PCIe slots"
    slots = sorted((host.root / "sys/bus/pci/slots").glob("*"))
    if not slots:
        yield skipped(name, "the firmware describes no slots")
        return
    devices = {path.name.rsplit(".", 1)[0] for path in _pci(host).glob("*")}
    free = [slot.name for slot in slots if read_text(slot / "address") not in devices]
    yield passed(name, f"{len(slots) - len(free)} of {len(slots)} in use; free: {_listed(free)}")


def check_core_dumps(host: Host) -> Iterator[CheckResult]:
    """A device core dump is what an engine reset leaves."""
    name = "GPU resets"
    dumps = _core_dumps(host)
    if dumps:
        yield failed(
            name,
            f"device core dumps: {_listed(dump.name for dump in dumps)}",
            "xeray doctor --bundle for a report, then restart the machine",
            "engine-reset",
        )
    elif host.cards():
        yield passed(name, "no device core dump")
    else:
        yield skipped(name, "no Intel GPU")


def _pci(host: Host) -> Path:
    return host.root / "sys/bus/pci/devices"


def _display_devices(host: Host) -> list[Path]:
    return [
        device
        for device in sorted(_pci(host).glob("*"))
        if read_text(device / "vendor") == "0x8086"
        and (read_text(device / "class") or "").startswith(("0x0300", "0x0380"))
    ]


def _core_dumps(host: Host) -> list[Path]:
    return sorted((host.root / "sys/class/devcoredump").glob("devcd*"))


def _package_version(host: Host, package: str) -> str:
    output = host.run("dpkg-query", "-W", "-f=${Version}", package)
    return output.text.strip() if output and output.returncode == 0 else ""


def _listed(found: object) -> str:
    if isinstance(found, dict):
        return ", ".join(f"{name} {version}" for name, version in found.items()) or "nothing"
    return ", ".join(str(item) for item in found) or "none"  # type: ignore[attr-defined]
