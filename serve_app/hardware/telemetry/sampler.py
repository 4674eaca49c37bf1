"""Two readings make rates: shares of busy time and watts between them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve_app.hardware.cards import Card, list_cards
from serve_app.hardware.telemetry.cpu import HostReading, read_host
from serve_app.hardware.telemetry.fdinfo import DrmClient, EngineTime, read_clients
from serve_app.hardware.telemetry.gpu import GpuReading, read_gpu
from serve_app.hardware.telemetry.memory_traffic import MemoryTraffic


@dataclass(frozen=True, slots=True)
class GpuRates:
    """One card between two readings. Shares are 0 to 1; None where the driver does not tell.

    `engines` are shares of each engine class over all processes that may be seen (render apart
    from compute); `utilization` is the time in which the card was not asleep.
    """

    card: Card
    reading: GpuReading
    engines: Mapping[str, float] = field(default_factory=dict)
    utilization: float | None = None
    power_w: float | None = None
    memory_used_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HostRates:
    """The host between two readings.

    `memory_moved_bytes` is by direction, since the first sample; `memory_bytes_per_s` between the
    two. Both are empty where no memory controller may be read.
    """

    reading: HostReading
    cpu_utilization: float | None = None
    cpu_power_w: Mapping[str, float] = field(default_factory=dict)
    npu_utilization: float | None = None
    memory_moved_bytes: Mapping[str, float] = field(default_factory=dict)
    memory_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    gpus: tuple[GpuRates, ...] = ()


@dataclass(frozen=True, slots=True)
class _Snapshot:
    at_s: float
    host: HostReading
    gpus: Mapping[str, GpuReading]
    clients: Mapping[tuple[str, str], DrmClient]
    moved_bytes: Mapping[str, float]


class HardwareSampler:
    """Call `sample` once per interval; the first call has no rates yet.

    `root` is the folder under which `sys` and `proc` lie, `clock` returns monotonic seconds.
    `traffic` are the counters of the memory controllers, None: they are not read.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
        traffic: MemoryTraffic | None = None,
    ) -> None:
        self._root = root
        self._clock = clock
        self._traffic = traffic
        self._last: _Snapshot | None = None

    def sample(self) -> HostRates:
        """Read everything and return the rates since the last call."""
        found = list_cards(self._root, {})  # simulated cards have no sensors
        cards = [*found.discrete, *found.integrated]
        now = _Snapshot(
            self._clock(),
            read_host(self._root),
            {card.pci_address: read_gpu(card, self._root) for card in cards},
            read_clients(self._root),
            {} if self._traffic is None else self._traffic.read(),
        )
        last, self._last = self._last, now
        return HostRates(
            reading=now.host,
            cpu_utilization=_cpu_utilization(last, now),
            cpu_power_w=_cpu_power(last, now),
            npu_utilization=_npu_utilization(last, now),
            memory_moved_bytes=now.moved_bytes,
            memory_bytes_per_s=_memory_rates(last, now),
            gpus=tuple(_gpu_rates(card, last, now) for card in cards),
        )


def _gpu_rates(card: Card, last: _Snapshot | None, now: _Snapshot) -> GpuRates:
    address = card.pci_address
    reading = now.gpus[address]
    used = sum(c.resident_bytes for c in now.clients.values() if c.pci_address == address)
    if last is None or address not in last.gpus or now.at_s <= last.at_s:
        return GpuRates(card, reading, memory_used_bytes=used)
    before = last.gpus[address]
    return GpuRates(
        card,
        reading,
        engines=_engine_shares(address, last, now),
        utilization=_awake_share(before, reading, now.at_s - last.at_s),
        power_w=_watts(before.energy_j, reading.energy_j, now.at_s - last.at_s),
        memory_used_bytes=used,
    )


def _engine_shares(address: str, last: _Snapshot, now: _Snapshot) -> dict[str, float]:
    wall_ns = (now.at_s - last.at_s) * 1e9
    shares: defaultdict[str, float] = defaultdict(float)
    for key, client in now.clients.items():
        if client.pci_address != address:
            continue
        earlier = last.clients[key].engines if key in last.clients else {}
        for name, engine in client.engines.items():
            shares[name] += _engine_share(earlier.get(name), engine, wall_ns)
    return {name: min(1.0, share) for name, share in shares.items()}


def _engine_share(before: EngineTime | None, now: EngineTime, wall_ns: float) -> float:
    if before is None:  # a new client: what it did before it was seen belongs to no interval
        return 0.0
    busy = max(0, now.busy - before.busy)
    if now.total is None:
        return busy / wall_ns / now.capacity
    passed = now.total - (before.total or 0)
    return busy / passed / now.capacity if passed > 0 else 0.0


def _awake_share(before: GpuReading, now: GpuReading, seconds: float) -> float | None:
    """Return the largest share over the tiles of time not spent in the idle state."""
    earlier = {gt.name: gt.idle_ms for gt in before.gts}
    shares = [
        1.0 - (gt.idle_ms - idle_ms) / (seconds * 1000)
        for gt in now.gts
        if gt.idle_ms is not None and (idle_ms := earlier.get(gt.name)) is not None
    ]
    return min(1.0, max(0.0, *shares)) if shares else None


def _watts(before_j: float | None, now_j: float | None, seconds: float) -> float | None:
    # A counter that fell was reset or wrapped: this interval tells nothing.
    if before_j is None or now_j is None or now_j < before_j:
        return None
    return (now_j - before_j) / seconds


def _cpu_utilization(last: _Snapshot | None, now: _Snapshot) -> float | None:
    if last is None or now.host.total_ticks <= last.host.total_ticks:
        return None
    passed = now.host.total_ticks - last.host.total_ticks
    return (now.host.busy_ticks - last.host.busy_ticks) / passed


def _cpu_power(last: _Snapshot | None, now: _Snapshot) -> dict[str, float]:
    if last is None or now.at_s <= last.at_s:
        return {}
    power = {}
    for name, energy_j in now.host.energy_j.items():
        before_j = last.host.energy_j.get(name)
        if before_j is not None:
            if energy_j < before_j:  # wrapped at the range that the kernel tells
                energy_j += now.host.energy_range_j.get(name, 0.0)
            watts = _watts(before_j, energy_j, now.at_s - last.at_s)
            if watts is not None:
                power[name] = watts
    return power


def _npu_utilization(last: _Snapshot | None, now: _Snapshot) -> float | None:
    if last is None or last.host.npu_busy_us is None or now.host.npu_busy_us is None:
        return None
    busy_us = now.host.npu_busy_us - last.host.npu_busy_us
    return min(1.0, max(0.0, busy_us / ((now.at_s - last.at_s) * 1e6)))


def _memory_rates(last: _Snapshot | None, now: _Snapshot) -> dict[str, float]:
    if last is None or now.at_s <= last.at_s:
        return {}
    return {
        direction: (moved - last.moved_bytes[direction]) / (now.at_s - last.at_s)
        for direction, moved in now.moved_bytes.items()
        if direction in last.moved_bytes
    }
