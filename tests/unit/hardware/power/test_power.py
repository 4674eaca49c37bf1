import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve_app.core.errors import ConfigError
from serve_app.hardware.cards import list_cards
from serve_app.hardware.power.caps import CapFile, frequency_caps, power_cap
from serve_app.hardware.power.guard import CapGuard, restore_left_over
from serve_app.hardware.power.meter import EnergyMeter

_HOLDER = """
import sys
from pathlib import Path
from serve_app.hardware.power.caps import CapFile
from serve_app.hardware.power.guard import CapGuard
cap = CapFile(Path(sys.argv[1]), "clock", "MHz", 2850, 400, 2850)
with CapGuard([cap], Path(sys.argv[2])) as guard:
    guard.set([(cap, 1000)])
    print("set", guard._guardian.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def cap(tmp_path: Path) -> CapFile:
    path = tmp_path / "max_freq"
    path.write_text("2850\n")
    return CapFile(path, "clock", "MHz", 2850, 400, 2850)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "power-caps.json"


@pytest.fixture(autouse=True)
def lock_folder(journal: Path) -> None:
    journal.parent.mkdir()


def write(root: Path, name: str, value: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def fake_card(root: Path, driver: str) -> None:
    pci = "sys/bus/pci/devices/0000:03:00.0"
    for name, value in (("vendor", "0x8086"), ("device", "0x56a0"), ("class", "0x030000")):
        write(root, f"{pci}/{name}", value)
    (root / "drivers" / driver).mkdir(parents=True)
    (root / pci / "driver").symlink_to(root / "drivers" / driver)
    (root / "sys/class/drm/card0").mkdir(parents=True)
    (root / "sys/class/drm/card0/device").symlink_to(root / pci)
    write(root, f"{pci}/hwmon/hwmon0/name", driver)
    write(root, f"{pci}/hwmon/hwmon0/power1_max", 190_000_000)
    write(root, f"{pci}/hwmon/hwmon0/power1_rated_max", 225_000_000)
    write(root, f"{pci}/hwmon/hwmon0/energy1_input", 1_000_000)
    clock = f"{pci}/tile0/gt0/freq0" if driver == "xe" else f"{pci}/drm/card0/gt/gt0"
    names = {"xe": "{}_freq", "i915": "rps_{}_freq_mhz"}[driver]
    for part, value in (("max", 2400), ("rpn" if driver == "xe" else "RPn", 300)):
        write(root, f"{clock}/{names.format(part)}", value)
    write(root, f"{clock}/{names.format('rp0' if driver == 'xe' else 'RP0')}", 2400)


@pytest.mark.parametrize("driver", ["xe", "i915"])
def test_the_limits_of_a_card(tmp_path: Path, driver: str) -> None:
    fake_card(tmp_path, driver)
    (card,) = list_cards(tmp_path, {}).discrete
    (clock,) = frequency_caps(card, tmp_path)
    assert (clock.label, clock.value, clock.low, clock.high) == ("arc-0 gt0 clock", 2400, 300, 2400)
    power = power_cap(card, tmp_path)
    assert power is not None
    assert (power.value, power.high, power.raw(150)) == (190.0, 225.0, "150000000")
    with pytest.raises(ConfigError, match=r"arc-0 power: 10 W is not within 45 to 225 W"):
        power.raw(10)


def test_limits_are_back_after_the_block_and_after_an_error(cap: CapFile, journal: Path) -> None:
    with CapGuard([cap], journal) as guard:
        guard.set([(cap, 1500)])
        assert cap.path.read_text() == "1500"
        assert journal.exists()
    assert (cap.path.read_text(), journal.exists()) == ("2850", False)

    def fail() -> None:
        with CapGuard([cap], journal) as guard:
            guard.set([(cap, 1500)])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert cap.path.read_text() == "2850"


def test_only_one_process_changes_limits(cap: CapFile, journal: Path) -> None:
    with CapGuard([cap], journal), pytest.raises(ConfigError, match="another process"):
        CapGuard([cap], journal).__enter__()


def _hold(cap: CapFile, journal: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(cap.path), str(journal)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    word, guardian = process.stdout.readline().split()
    assert word == "set"
    return process, int(guardian)


def _close(process: subprocess.Popen[str]) -> None:
    process.wait(10)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def test_limits_are_back_after_sigkill(cap: CapFile, journal: Path) -> None:
    process, _ = _hold(cap, journal)
    assert cap.path.read_text() == "1000"
    process.kill()
    _close(process)
    deadline_s = time.monotonic() + 10
    while journal.exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert cap.path.read_text() == "2850"


def test_a_journal_that_both_deaths_left_is_restored_by_the_next(
    cap: CapFile, journal: Path
) -> None:
    process, guardian = _hold(cap, journal)
    os.kill(guardian, signal.SIGKILL)
    process.kill()
    _close(process)
    assert cap.path.read_text() == "1000"
    assert restore_left_over(journal) == [cap.path]
    assert (cap.path.read_text(), journal.exists()) == ("2850", False)
    assert restore_left_over(journal) == []


def test_a_damaged_journal_is_one_line(journal: Path) -> None:
    journal.write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        restore_left_over(journal)


def test_the_meter_counts_cards_packages_and_nvidia(tmp_path: Path) -> None:
    fake_card(tmp_path, "xe")
    rapl = "sys/class/powercap/intel-rapl:0"
    write(tmp_path, f"{rapl}/name", "package-0")
    write(tmp_path, f"{rapl}/energy_uj", 9_000_000)
    write(tmp_path, f"{rapl}/max_energy_range_uj", 10_000_000)
    times = iter(range(100))
    command = [sys.executable, "-c", "print('0, 300.0\\n0, 500.0\\n1, [N/A]', flush=True); input()"]
    with EnergyMeter(tmp_path, command, lambda: float(next(times))) as meter:
        write(tmp_path, "sys/bus/pci/devices/0000:03:00.0/hwmon/hwmon0/energy1_input", 51_000_000)
        write(tmp_path, f"{rapl}/energy_uj", 2_000_000)
        assert meter._nvidia._thread is not None
        meter._nvidia._thread.join(10)  # the program has printed, and ends without input
    assert meter.joules["arc-0"] == 50.0
    assert meter.joules["package-0"] == pytest.approx(3.0)
    # 300 to 500 W over one second, and the last second at 500 W.
    assert meter.joules["nvidia-0"] == pytest.approx(400.0 + 500.0)
    assert set(meter.joules) == {"arc-0", "package-0", "nvidia-0"}


def test_without_any_meter_nothing_is_told(tmp_path: Path) -> None:
    with EnergyMeter(tmp_path, ["no-such-program"]) as meter:
        pass
    assert meter.joules == {}


def test_the_journal_is_plain(cap: CapFile, journal: Path) -> None:
    with CapGuard([cap], journal):
        assert json.loads(journal.read_text()) == [[str(cap.path), "2850"]]
