"""Bytes that the memory controllers of the processor have moved, whoever asked for them.

The controllers (uncore IMC) count on Xeons in cache lines read and written (`cas_count_read`, on
newer ones per sub-channel: `cas_count_read_sch0`), on Core processors in requests (`data_reads` of
`uncore_imc`, `data_read` of `uncore_imc_free_running_0`). Which they have, and what one count is
worth, the kernel tells in /sys/bus/event_source/devices (its
Documentation/ABI/testing/sysfs-bus-event_source-devices-events). Guests of a hypervisor have none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from serve_app.hardware.cpu import parse_cpu_list
from serve_app.hardware.sysfs import read_int, read_text
from serve_app.hardware.telemetry.perf_counter import Counter, PerfCounter

_UNITS = "sys/bus/event_source/devices"
_LINES = re.compile(r"cas_count_(read|write)(_sch\d+)?")
_REQUESTS = re.compile(r"(?:data_)?(read|write)s?")
_MIB = 1 << 20

OpenCounter = Callable[[int, int, int], Counter]


@dataclass(frozen=True, slots=True)
class TrafficEvent:
    """An event of one controller: its unit's number, its code, and bytes for one count."""

    direction: str
    kind: int
    config: int
    cpus: tuple[int, ...]
    bytes_per_count: float


class MemoryTraffic:
    """Counts from the first `read` on; empty where no controller may be read.

    `root` is the folder under which `sys` lies; `open_counter` takes type, config and CPU.
    """

    def __init__(self, root: Path = Path("/"), open_counter: OpenCounter = PerfCounter) -> None:
        self._root = root
        self._open_counter = open_counter
        self._counters: list[tuple[TrafficEvent, Counter]] | None = None

    def read(self) -> Mapping[str, float]:
        """Bytes since the first call by direction (`read`, `write`) over all controllers."""
        if self._counters is None:
            self._counters = self._open_all()
        moved: dict[str, float] = {}
        for event, counter in self._counters:
            num_bytes = counter.read() * event.bytes_per_count
            moved[event.direction] = moved.get(event.direction, 0.0) + num_bytes
        return moved

    def close(self) -> None:
        """Give the counters back."""
        for _, counter in self._counters or ():
            counter.close()
        self._counters = []

    def _open_all(self) -> list[tuple[TrafficEvent, Counter]]:
        """All counters, or none: a part of the controllers would tell too little."""
        opened: list[tuple[TrafficEvent, Counter]] = []
        try:
            for event in traffic_events(self._root):
                for cpu in event.cpus:
                    opened.append((event, self._open_counter(event.kind, event.config, cpu)))
        except OSError:
            for _, counter in opened:
                counter.close()
            return []
        return opened


def traffic_events(root: Path = Path("/")) -> list[TrafficEvent]:
    """Return the events of all controllers that count bytes read and written."""
    units = sorted((root / _UNITS).glob("uncore_imc*"))
    # A Xeon has free-running counters beside these, of the same bytes.
    for pattern in (_LINES, _REQUESTS):
        events = [event for unit in units for event in _events_of(unit, pattern)]
        if events:
            return events
    return []


def _events_of(unit: Path, pattern: re.Pattern[str]) -> Iterator[TrafficEvent]:
    kind, cpus = read_int(unit / "type"), _cpus(read_text(unit / "cpumask"))
    for path in sorted((unit / "events").glob("*")):
        found = pattern.fullmatch(path.name)
        if found is None or kind is None:
            continue
        config = _config(read_text(path) or "", unit / "format")
        scale = _scale(path)
        if config is not None and scale is not None:
            yield TrafficEvent(found[1], kind, config, cpus, scale)


def _cpus(text: str | None) -> tuple[int, ...]:
    return tuple(sorted(parse_cpu_list(text))) if text else (0,)


def _scale(event: Path) -> float | None:
    """Bytes for one count; None where the kernel does not say."""
    if read_text(event.with_name(f"{event.name}.unit")) != "MiB":
        return None
    try:
        return float(read_text(event.with_name(f"{event.name}.scale")) or "") * _MIB
    except ValueError:
        return None


def _config(terms: str, formats: Path) -> int | None:
    """`event=0x05,umask=0xcf` by the fields' places in `config`; None where one lies elsewhere."""
    config = 0
    for term in terms.split(","):
        name, _, value = term.strip().partition("=")
        place = read_text(formats / name) or ""
        try:
            number = int(value, 0) if value else 1
        except ValueError:
            return None
        if not place.startswith("config:"):
            return None
        # A field may lie in pieces, `config:8-15,32-55`, its low bits first.
        for bit in parse_cpu_list(place.removeprefix("config:")):
            config |= (number & 1) << bit
            number >>= 1
        if number:
            return None
    return config
