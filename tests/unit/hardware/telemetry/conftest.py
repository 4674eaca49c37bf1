"""A fake sysfs: one A770 under i915, one B580 under xe, an integrated GPU without sensors."""

from collections.abc import Callable
from pathlib import Path

import pytest

XE = "0000:83:00.0"
I915 = "0000:03:00.0"
Write = Callable[[str, object], None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write `value` and a line feed, as the kernel does, into a file under the fake root."""

    def write_file(name: str, value: object) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")

    return write_file


@pytest.fixture
def fake_root(tmp_path: Path, write: Write) -> Path:
    gpus = (
        (0, XE, "0xe20b", "xe"),
        (1, I915, "0x56a0", "i915"),
        (2, "0000:00:02.0", "0x4680", "i915"),
    )
    for number, address, device, driver in gpus:
        pci = f"sys/bus/pci/devices/{address}"
        for name, value in (("vendor", "0x8086"), ("device", device), ("class", "0x030000")):
            write(f"{pci}/{name}", value)
        (tmp_path / pci / "drm" / f"card{number}").mkdir(parents=True)
        target = tmp_path / "sys/bus/pci/drivers" / driver
        target.mkdir(parents=True, exist_ok=True)
        (tmp_path / pci / "driver").symlink_to(target)
        link = tmp_path / f"sys/class/drm/card{number}"
        link.mkdir(parents=True)
        (link / "device").symlink_to(tmp_path / pci)
    _write_xe(write)
    _write_i915(write)
    write("proc/stat", "cpu  100 0 50 800 50 0 0 0 7 0\ncpu0 1 2 3 4")
    write("proc/meminfo", "MemTotal:  1000 kB\nMemAvailable:  400 kB\nHugePages_Total: 0")
    write("sys/class/powercap/intel-rapl:0/name", "package-0")
    write("sys/class/powercap/intel-rapl:0/energy_uj", 5_000_000)
    write("sys/class/powercap/intel-rapl:0/max_energy_range_uj", 10_000_000)
    write("sys/class/powercap/intel-rapl:0:0/energy_uj", 1)
    write("sys/class/accel/accel0/device/npu_busy_time_us", 1000)
    return tmp_path


def _write_xe(write: Write) -> None:
    pci = f"sys/bus/pci/devices/{XE}"
    sensors = f"{pci}/hwmon/hwmon4"
    write(f"{sensors}/name", "xe")
    values = (
        ("energy1_input", 7_000_000),
        ("power1_max", 190_000_000),
        ("temp2_input", 61_000),
        ("temp3_input", 70_500),
        ("fan1_input", 1234),
    )
    for name, value in values:
        write(f"{sensors}/{name}", value)
    gt = f"{pci}/tile0/gt0"
    for name, value in (("act", 2400), ("cur", 2850), ("min", 400), ("max", 2850)):
        write(f"{gt}/freq0/{name}_freq", value)
    write(f"{gt}/gtidle/idle_residency_ms", 10_000)
    for reason, value in (("status", 1), ("reason_pl1", 1), ("reason_thermal", 0)):
        write(f"{gt}/freq0/throttle/{reason}", value)


def _write_i915(write: Write) -> None:
    pci = f"sys/bus/pci/devices/{I915}"
    write(f"{pci}/hwmon/hwmon2/name", "i915_gt0")
    write(f"{pci}/hwmon/hwmon3/name", "i915")
    write(f"{pci}/hwmon/hwmon3/energy1_input", 3_000_000)
    write(f"{pci}/hwmon/hwmon3/power1_max", 0)
    write(f"{pci}/hwmon/hwmon3/power1_rated_max", 225_000_000)
    gt = f"{pci}/drm/card1/gt/gt0"
    write(f"{gt}/rps_act_freq_mhz", 0)
    write(f"{gt}/rc6_residency_ms", 500)
    write(f"{pci}/drm/card1/gt_max_freq_mhz", 2400)
    write(f"{gt}/throttle_reason_status", 1)
    write(f"{gt}/throttle_reason_thermal", 1)


@pytest.fixture
def add_client(tmp_path: Path) -> Callable[[int, str, str], None]:
    """Give process `pid` a render node descriptor whose fdinfo is `text`; replaces the last."""

    def add(pid: int, descriptor: str, text: str) -> None:
        folder = tmp_path / "proc" / str(pid)
        (folder / "fd").mkdir(parents=True, exist_ok=True)
        (folder / "fdinfo").mkdir(exist_ok=True)
        link = folder / "fd" / descriptor
        if not link.is_symlink():
            link.symlink_to("/dev/dri/renderD128")
        (folder / "fdinfo" / descriptor).write_text(text)

    return add
