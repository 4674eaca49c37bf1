"""The host's processors: busy time, clocks, package energy (RAPL), memory, and the NPU.

Of the NPU the driver intel_vpu tells how long it was busy, its clock and the memory of its buffers
(newer kernels); it has no counter of the bytes that the NPU moves. Those are in the memory
controllers' (`memory_traffic`), with everybody else's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve_app.hardware.sysfs import read_int, read_text

_IDLE_COLUMNS = (3, 4)  # idle and iowait, of user nice system idle iowait irq softirq steal
_NUM_COLUMNS = 8  # guest times, which follow, are in user time already
_MICRO = 1e-6
_NPU = "sys/class/accel/accel0/device"


@dataclass(frozen=True, slots=True)
class HostReading:
    """One reading. Times in clock ticks, energy in joules by package (a counter), NPU in µs.

    `energy_range_j` is where each energy counter wraps. Memory in bytes.
    """

    busy_ticks: int = 0
    total_ticks: int = 0
    mean_mhz: float | None = None
    energy_j: Mapping[str, float] = field(default_factory=dict)
    energy_range_j: Mapping[str, float] = field(default_factory=dict)
    npu_busy_us: int | None = None
    npu_mhz: int | None = None
    npu_memory_bytes: int | None = None
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0


def read_host(root: Path = Path("/")) -> HostReading:
    """Read the host's counters; `root` is the folder under which `sys` and `proc` lie."""
    busy, total = _cpu_ticks(root)
    memory = _meminfo(root)
    zones = list(_rapl_packages(root))
    return HostReading(
        busy_ticks=busy,
        total_ticks=total,
        mean_mhz=_mean_mhz(root),
        energy_j={name: energy for name, energy, _ in zones},
        energy_range_j={name: limit for name, _, limit in zones},
        npu_busy_us=read_int(root / _NPU / "npu_busy_time_us"),
        npu_mhz=read_int(root / _NPU / "npu_current_frequency_mhz"),
        npu_memory_bytes=read_int(root / _NPU / "npu_memory_utilization"),
        memory_total_bytes=memory.get("MemTotal", 0),
        memory_available_bytes=memory.get("MemAvailable", 0),
    )


def _cpu_ticks(root: Path) -> tuple[int, int]:
    lines = (read_text(root / "proc/stat") or "").splitlines()
    if not lines or not lines[0].startswith("cpu "):
        return 0, 0
    columns = [int(value) for value in lines[0].split()[1 : 1 + _NUM_COLUMNS]]
    total = sum(columns)
    return total - sum(columns[i] for i in _IDLE_COLUMNS if i < len(columns)), total


def _mean_mhz(root: Path) -> float | None:
    paths = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    clocks = [khz for path in paths if (khz := read_int(path)) is not None]
    return sum(clocks) / len(clocks) / 1000 if clocks else None


def _rapl_packages(root: Path) -> list[tuple[str, float, float]]:
    """Return (package, joules, joules at which the counter wraps); empty where root may read it."""
    packages = []
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") != 1:  # a part of a package: cores, DRAM
            continue
        energy = read_int(folder / "energy_uj")
        limit = read_int(folder / "max_energy_range_uj")
        if energy is not None:
            name = read_text(folder / "name") or folder.name
            packages.append((name, energy * _MICRO, (limit or 0) * _MICRO))
    return packages


def _meminfo(root: Path) -> dict[str, int]:
    found = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        number = rest.split()[0] if rest.split() else ""
        if number.isdigit():
            found[name] = int(number) * 1024
    return found
