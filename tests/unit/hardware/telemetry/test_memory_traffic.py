"""Memory controllers' counters: what sysfs names, what is opened, what is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.hardware.telemetry.memory_traffic import MemoryTraffic, traffic_events
from serve_app.hardware.telemetry.perf_counter import PerfCounter

UNITS = "sys/bus/event_source/devices"
LINE = 64  # bytes that one count of cas_count is worth: 6.103515625e-5 MiB
Write = Callable[[str, object], None]


class FakeCounters:
    """Stands for the kernel: hands out counters whose counts the test sets."""

    def __init__(self, num_allowed: int = 100) -> None:
        self.counts: dict[tuple[int, int, int], int] = {}
        self.num_open = 0
        self._num_allowed = num_allowed

    def __call__(self, kind: int, config: int, cpu: int) -> FakeCounter:
        if self.num_open == self._num_allowed:
            raise PermissionError(13, "Permission denied")
        self.num_open += 1
        self.counts[kind, config, cpu] = 0
        return FakeCounter(self, (kind, config, cpu))


class FakeCounter:
    def __init__(self, owner: FakeCounters, key: tuple[int, int, int]) -> None:
        self._owner, self._key = owner, key

    def read(self) -> int:
        return self._owner.counts[self._key]

    def close(self) -> None:
        self._owner.num_open -= 1


def add_unit(write: Write, name: str, kind: int, events: dict[str, str], **formats: str) -> None:
    folder = f"{UNITS}/{name}"
    write(f"{folder}/type", kind)
    for event, terms in events.items():
        write(f"{folder}/events/{event}", terms)
        write(f"{folder}/events/{event}.scale", "6.103515625e-5")
        write(f"{folder}/events/{event}.unit", "MiB")
    for field, place in formats.items():
        write(f"{folder}/format/{field}", place)


@pytest.fixture
def xeon(tmp_path: Path, write: Write) -> Path:
    """Two controllers of a Xeon with two sockets, and the free-running counters beside them."""
    events = {
        "cas_count_read": "event=0x05,umask=0xcf",
        "cas_count_write": "event=0x05,umask=0xf0",
        "clockticks": "event=0x01,umask=0x00",
    }
    for number in range(2):
        name = f"uncore_imc_{number}"
        add_unit(write, name, 30 + number, events, event="config:0-7", umask="config:8-15,32-55")
        write(f"{UNITS}/{name}/cpumask", "0,28")
    add_unit(
        write, "uncore_imc_free_running_0", 40, {"read": "event=0xff,umask=0x20"},
        event="config:0-7", umask="config:8-15",
    )  # fmt: skip
    return tmp_path


def test_a_xeon_s_controllers_are_summed_over_units_and_sockets(xeon: Path) -> None:
    counters = FakeCounters()
    traffic = MemoryTraffic(xeon, counters)
    assert traffic.read() == {"read": 0.0, "write": 0.0}
    assert set(counters.counts) == {
        (kind, config, cpu) for kind in (30, 31) for config in (0xCF05, 0xF005) for cpu in (0, 28)
    }
    counters.counts[30, 0xCF05, 0] = 1000
    counters.counts[31, 0xCF05, 28] = 500
    counters.counts[31, 0xF005, 0] = 10
    assert traffic.read() == {"read": 1500.0 * LINE, "write": 10.0 * LINE}
    traffic.close()
    assert counters.num_open == 0


def test_newer_xeons_count_by_sub_channel_and_core_processors_by_request(
    tmp_path: Path, write: Write
) -> None:
    add_unit(write, "uncore_imc_free_running_0", 7, {"data_read": "event=0xff,umask=0x20",
             "data_write": "event=0xff,umask=0x30", "data_total": "event=0xff,umask=0x10"},
             event="config:0-7", umask="config:8-15")  # fmt: skip
    core = traffic_events(tmp_path)
    assert [(each.direction, each.config, each.cpus) for each in core] == [
        ("read", 0x20FF, (0,)), ("write", 0x30FF, (0,))
    ]  # fmt: skip
    assert core[0].bytes_per_count == LINE
    add_unit(write, "uncore_imc_3", 9, {"cas_count_read_sch0": "event=0x05,umask=0xcf",
             "cas_count_read_sch1": "event=0x06,umask=0xcf"},
             event="config:0-7", umask="config:8-15")  # fmt: skip
    xeon = traffic_events(tmp_path)
    assert [(each.direction, each.config) for each in xeon] == [("read", 0xCF05), ("read", 0xCF06)]


def test_an_event_that_cannot_be_coded_or_scaled_is_left_out(tmp_path: Path, write: Write) -> None:
    events = {"cas_count_read": "event=0x105", "cas_count_write": "event=0x05,other=1"}
    add_unit(write, "uncore_imc_0", 3, events, event="config:0-7", other="config1:0-3")
    assert traffic_events(tmp_path) == [], "beyond its field, and outside of config"
    write(f"{UNITS}/uncore_imc_0/events/cas_count_read", "event=0x05")
    assert len(traffic_events(tmp_path)) == 1
    write(f"{UNITS}/uncore_imc_0/events/cas_count_read.unit", "Joules")
    assert traffic_events(tmp_path) == []


def test_without_the_right_nothing_is_read_and_nothing_stays_open(xeon: Path) -> None:
    counters = FakeCounters(num_allowed=3)
    traffic = MemoryTraffic(xeon, counters)
    assert traffic.read() == {}
    assert counters.num_open == 0
    assert MemoryTraffic(xeon / "proc", counters).read() == {}


def test_a_counter_of_the_kernel_counts() -> None:
    """The clock of a CPU (a software event, type 1): the one unit that every kernel has."""
    try:
        counter = PerfCounter(1, 0, 0)
    except OSError as error:
        pytest.skip(f"perf counters may not be opened here: {error}")
    try:
        before = counter.read()
        os.sched_yield()
        assert counter.read() > before
    finally:
        counter.close()
    with pytest.raises(OSError):  # noqa: PT011 - the number differs between kernels
        PerfCounter(1 << 30, 0, 0)
