"""GPU engine time and memory per process, from DRM's fdinfo.

Format: Documentation/gpu/drm-usage-stats.rst of the kernel. i915 counts nanoseconds per engine;
xe counts cycles beside the cycles that passed. A client (file descriptor of a render node) may be
seen through several descriptors and processes and counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve_app.hardware.sysfs import read_text

_NS = "drm-engine-"
_CAPACITY = "drm-engine-capacity-"
_CYCLES = "drm-cycles-"
_TOTAL_CYCLES = "drm-total-cycles-"
_RESIDENT = "drm-resident-"
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_LOCAL_REGIONS = ("vram", "local")

ENGINE_NAMES = {
    "rcs": "render",
    "ccs": "compute",
    "bcs": "copy",
    "vcs": "video",
    "vecs": "video-enhance",
}
"""xe's engine classes by i915's names, so that one dashboard serves both drivers."""


@dataclass(frozen=True, slots=True)
class EngineTime:
    """Busy time of one engine class: `busy` out of `total` (None: nanoseconds of wall clock)."""

    busy: int
    total: int | None
    capacity: int = 1


@dataclass(frozen=True, slots=True)
class DrmClient:
    """One client of a GPU. `resident_bytes` counts the card's own memory where it has some."""

    pci_address: str
    client_id: str
    pid: int
    engines: Mapping[str, EngineTime] = field(default_factory=dict)
    resident_bytes: int = 0


def read_clients(root: Path = Path("/")) -> dict[tuple[str, str], DrmClient]:
    """Return (PCI address, client id) → client of all processes whose fdinfo may be read."""
    clients: dict[tuple[str, str], DrmClient] = {}
    for pid, text in _fdinfo_texts(root / "proc"):
        client = parse_fdinfo(text, pid)
        if client is not None:
            clients.setdefault((client.pci_address, client.client_id), client)
    return clients


def _fdinfo_texts(proc: Path) -> Iterator[tuple[int, str]]:
    for process in proc.glob("[0-9]*"):
        try:
            descriptors = list((process / "fd").iterdir())
        except OSError:  # another user's process, or gone meanwhile
            continue
        for descriptor in descriptors:
            try:
                target = str(descriptor.readlink())
            except OSError:
                continue
            if target.startswith("/dev/dri/render"):
                text = read_text(process / "fdinfo" / descriptor.name)
                if text is not None:
                    yield int(process.name), text


def parse_fdinfo(text: str, pid: int) -> DrmClient | None:
    """Parse one fdinfo; None where it is not an Intel GPU's. Unknown keys are left alone."""
    values = {
        key.strip(): value.strip()
        for key, separator, value in (line.partition(":") for line in text.splitlines())
        if separator
    }
    if values.get("drm-driver") not in ("xe", "i915") or "drm-client-id" not in values:
        return None
    return DrmClient(
        pci_address=values.get("drm-pdev", ""),
        client_id=values["drm-client-id"],
        pid=pid,
        engines=dict(_engines(values)),
        resident_bytes=_resident_bytes(values),
    )


def _engines(values: Mapping[str, str]) -> Iterator[tuple[str, EngineTime]]:
    for key, value in values.items():
        if key.startswith(_CYCLES):
            name = key.removeprefix(_CYCLES)
            total = _number(values.get(_TOTAL_CYCLES + name, ""))
            if total is not None:
                yield (
                    ENGINE_NAMES.get(name, name),
                    EngineTime(_number(value) or 0, total, _capacity(values, name)),
                )
        elif key.startswith(_NS) and not key.startswith(_CAPACITY):
            name = key.removeprefix(_NS)
            yield name, EngineTime(_number(value) or 0, None, _capacity(values, name))


def _capacity(values: Mapping[str, str], name: str) -> int:
    return _number(values.get(_CAPACITY + name, "")) or 1


def _number(text: str) -> int | None:
    digits = text.split(" ", 1)[0]
    return int(digits) if digits.isdigit() else None


def _resident_bytes(values: Mapping[str, str]) -> int:
    """Sum the regions on the card; an integrated GPU has none and its share of RAM counts."""
    regions = {
        key.removeprefix(_RESIDENT): _bytes(value)
        for key, value in values.items()
        if key.startswith(_RESIDENT)
    }
    local = [size for name, size in regions.items() if name.startswith(_LOCAL_REGIONS)]
    return sum(local) if local else sum(regions.values())


def _bytes(text: str) -> int:
    number, _, unit = text.partition(" ")
    return int(number) * _UNITS.get(unit, 1) if number.isdigit() else 0
