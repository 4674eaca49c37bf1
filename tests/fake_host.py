"""The sysfs and proc of a host with one B580 under xe, as far as telemetry reads them."""

from __future__ import annotations

from pathlib import Path

_PCI = "sys/bus/pci/devices/0000:83:00.0"


def write(root: Path, name: str, value: object) -> None:
    """Write `value` and a line feed, as the kernel does, into a file below `root`."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def write_host(root: Path, *, temperature_c: int, is_throttled: bool) -> Path:
    """Make the host below `root`, 40 GiB of its 64 free; return the card's folder."""
    for name, value in (("vendor", "0x8086"), ("device", "0xe20b"), ("class", "0x030000")):
        write(root, f"{_PCI}/{name}", value)
    driver = root / "sys/bus/pci/drivers/xe"
    driver.mkdir(parents=True)
    (root / _PCI / "driver").symlink_to(driver)
    (root / "sys/class/drm/card0").mkdir(parents=True)
    (root / "sys/class/drm/card0/device").symlink_to(root / _PCI)
    write(root, f"{_PCI}/hwmon/hwmon1/name", "xe")
    write(root, f"{_PCI}/hwmon/hwmon1/energy1_input", 1_000_000)
    write(root, f"{_PCI}/hwmon/hwmon1/temp2_input", temperature_c * 1000)
    write(root, f"{_PCI}/tile0/gt0/freq0/act_freq", 2000)
    write(root, f"{_PCI}/tile0/gt0/gtidle/idle_residency_ms", 0)
    write(root, f"{_PCI}/tile0/gt0/freq0/throttle/reason_thermal", int(is_throttled))
    write(root, "proc/stat", "cpu  1 0 0 9 0 0 0 0 0 0")
    write(root, "proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 41943040 kB")
    return root / _PCI
