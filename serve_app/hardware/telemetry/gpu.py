"""What an Intel GPU tells of itself in sysfs and hwmon, for the drivers xe and i915.

Files and units: Documentation/ABI/testing/sysfs-driver-intel-{xe,i915}-hwmon of the kernel, and
the sysfs pages of the two drivers. A value that a kernel does not offer is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve_app.hardware.cards import Card
from serve_app.hardware.sysfs import first_int, read_int, read_text

_HWMON_NAMES = ("xe", "i915")
_I915_THROTTLE = "throttle_reason_"
_XE_THROTTLE = "reason_"
_MICRO = 1e-6
_MILLI = 1e-3


@dataclass(frozen=True, slots=True)
class GtReading:
    """One graphics tile's clock: frequencies in MHz (`actual` 0: asleep), idle time in ms.

    `throttle` are the reasons that hold the clock down now, by the kernel's names.
    """

    name: str
    actual_mhz: int | None = None
    requested_mhz: int | None = None
    min_mhz: int | None = None
    max_mhz: int | None = None
    idle_ms: int | None = None
    throttle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One reading. Energy in joules (a counter), power limit in watts, temperatures in °C."""

    energy_j: float | None = None
    power_limit_w: float | None = None
    rated_power_w: float | None = None
    temperatures_c: Mapping[str, float] = field(default_factory=dict)
    fans_rpm: Mapping[str, int] = field(default_factory=dict)
    gts: tuple[GtReading, ...] = ()


def read_gpu(card: Card, root: Path = Path("/")) -> GpuReading:
    """Read a card's sensors; `root` is the folder under which `sys` lies."""
    device = root / "sys/bus/pci/devices" / card.pci_address
    sensors = _hwmon(device)
    gts = _xe_gts(device) if card.driver == "xe" else _i915_gts(device)
    if sensors is None:
        return GpuReading(gts=gts)
    return GpuReading(
        energy_j=_scaled(sensors / "energy1_input", _MICRO),
        # 0 means that the limit is switched off.
        power_limit_w=_scaled(sensors / "power1_max", _MICRO) or None,
        rated_power_w=_scaled(sensors / "power1_rated_max", _MICRO),
        temperatures_c=_temperatures(sensors),
        fans_rpm={
            path.name.removesuffix("_input"): rpm
            for path in sorted(sensors.glob("fan*_input"))
            if (rpm := read_int(path)) is not None
        },
        gts=gts,
    )


def _hwmon(device: Path) -> Path | None:
    for folder in sorted((device / "hwmon").glob("hwmon*")):
        # i915 also registers one per tile, "i915_gt0": energy of the tile only.
        if read_text(folder / "name") in _HWMON_NAMES:
            return folder
    return None


def _scaled(path: Path, factor: float) -> float | None:
    value = read_int(path)
    return None if value is None else value * factor


def _temperatures(sensors: Path) -> dict[str, float]:
    """Return sensor → °C. xe labels temp2 "pkg" and temp3 "vram"; i915 has temp1 alone."""
    default = {"temp1": "pkg", "temp2": "pkg", "temp3": "vram"}
    found = {}
    for path in sorted(sensors.glob("temp*_input")):
        number = path.name.removesuffix("_input")
        value = read_int(path)
        if value is not None:
            label = read_text(sensors / f"{number}_label") or default.get(number, number)
            found[label] = value * _MILLI
    return found


def _xe_gts(device: Path) -> tuple[GtReading, ...]:
    return tuple(
        GtReading(
            name=f"{folder.parent.name}/{folder.name}",
            actual_mhz=read_int(folder / "freq0/act_freq"),
            requested_mhz=read_int(folder / "freq0/cur_freq"),
            min_mhz=read_int(folder / "freq0/min_freq"),
            max_mhz=read_int(folder / "freq0/max_freq"),
            idle_ms=read_int(folder / "gtidle/idle_residency_ms"),
            throttle=_reasons(folder / "freq0/throttle", _XE_THROTTLE),
        )
        for folder in sorted(device.glob("tile*/gt*"))
        if (folder / "freq0").is_dir()
    )


def _i915_gts(device: Path) -> tuple[GtReading, ...]:
    readings = []
    for card in sorted((device / "drm").glob("card*")):
        for folder in sorted((card / "gt").glob("gt*")):
            readings.append(_i915_gt(card, folder))
    return tuple(readings)


def _i915_gt(card: Path, folder: Path) -> GtReading:
    def frequency(name: str) -> int | None:
        # Kernels before the per-tile folders have the same under the card itself.
        return first_int((folder / f"rps_{name}_freq_mhz", card / f"gt_{name}_freq_mhz"))

    return GtReading(
        name=folder.name,
        actual_mhz=frequency("act"),
        requested_mhz=frequency("cur"),
        min_mhz=frequency("min"),
        max_mhz=frequency("max"),
        idle_ms=read_int(folder / "rc6_residency_ms"),
        throttle=_reasons(folder, _I915_THROTTLE),
    )


def _reasons(folder: Path, prefix: str) -> tuple[str, ...]:
    names = (path.name for path in sorted(folder.glob(f"{prefix}*")) if read_int(path) == 1)
    return tuple(name.removeprefix(prefix) for name in names if not name.endswith("_status"))
