"""Hardware telemetry as Prometheus samples: one collector per node.

Two names are fixed by existing dashboards and have no prefix: `intel_gpu_utilization` (0 to 1 per
card and engine) and `memory_bandwidth_bytes`, which has the source `imc` here (the processor's
memory controllers) and `engine` where an engine tells what it reads. No kernel tells the bandwidth
of a card's own memory or of an NPU: for a card the engine's reads are the measure.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve_app.hardware.telemetry.cpu import HostReading
from serve_app.hardware.telemetry.sampler import GpuRates, HardwareSampler, HostRates
from serve_app.observability.metrics import PREFIX

_GPU = f"{PREFIX}gpu_"
_HOST = f"{PREFIX}host_"
_CARD_LABELS = ("card", "name", "pci_address")
_MHZ = 1e6


class HardwareCollector(Collector):
    """Samples the hardware once per scrape; rates are over the time since the scrape before."""

    def __init__(self, sampler: HardwareSampler) -> None:
        self._sampler = sampler
        self._lock = threading.Lock()
        sampler.sample()  # so that the first scrape has rates

    def describe(self) -> Iterable[Metric]:
        """Return no families: which exist depends on what the kernel offers."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all families."""
        with self._lock:
            rates = self._sampler.sample()
        yield from _host_families(rates)
        yield from _gpu_families(rates.gpus)


def _host_families(rates: HostRates) -> Iterator[Metric]:
    reading = rates.reading
    if rates.cpu_utilization is not None:
        yield GaugeMetricFamily(
            f"{_HOST}cpu_utilization", "Share of CPU time in use.", rates.cpu_utilization
        )
    if reading.mean_mhz is not None:
        yield GaugeMetricFamily(
            f"{_HOST}cpu_frequency_hertz", "Mean clock of the cores.", reading.mean_mhz * _MHZ
        )
    power = GaugeMetricFamily(f"{_HOST}cpu_power_watts", "Power by package.", labels=("package",))
    for package, watts in rates.cpu_power_w.items():
        power.add_metric((package,), watts)
    energy = CounterMetricFamily(
        f"{_HOST}cpu_energy_joules", "Energy by package.", labels=("package",)
    )
    for package, joules in reading.energy_j.items():
        energy.add_metric((package,), joules)
    yield from (power, energy)
    if rates.npu_utilization is not None:
        yield GaugeMetricFamily(
            f"{_HOST}npu_utilization",
            "Share of time in which the NPU was busy.",
            rates.npu_utilization,
        )
    yield from _npu_families(reading)
    yield from _traffic_families(rates)
    yield GaugeMetricFamily(
        f"{_HOST}memory_total_bytes", "Memory of the host.", reading.memory_total_bytes
    )
    yield GaugeMetricFamily(
        f"{_HOST}memory_available_bytes",
        "Memory that may be used without swapping.",
        reading.memory_available_bytes,
    )


def _npu_families(reading: HostReading) -> Iterator[Metric]:
    if reading.npu_mhz is not None:
        yield GaugeMetricFamily(
            f"{_HOST}npu_frequency_hertz", "Clock of the NPU.", reading.npu_mhz * _MHZ
        )
    if reading.npu_memory_bytes is not None:
        yield GaugeMetricFamily(
            f"{_HOST}npu_memory_used_bytes",
            "Memory of the host that holds the NPU's buffers.",
            reading.npu_memory_bytes,
        )


def _traffic_families(rates: HostRates) -> Iterator[Metric]:
    """What the memory controllers moved; nothing where none may be read, rather than a zero."""
    if rates.memory_moved_bytes:
        moved = CounterMetricFamily(
            f"{_HOST}memory_moved_bytes",
            "Bytes that the memory controllers moved since the exporter's start.",
            labels=("direction",),
        )
        for direction, num_bytes in rates.memory_moved_bytes.items():
            moved.add_metric((direction,), num_bytes)
        yield moved
    if rates.memory_bytes_per_s:
        bandwidth = GaugeMetricFamily(
            "memory_bandwidth_bytes", "Memory bandwidth, bytes per second.", labels=("source",)
        )
        bandwidth.add_metric(("imc",), sum(rates.memory_bytes_per_s.values()))
        yield bandwidth


class _GpuFamilies:
    """The families of all cards; each has its samples added card by card."""

    def __init__(self) -> None:
        def gauge(name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, help_text, labels=(*_CARD_LABELS, *labels))

        self.busy = gauge(
            "intel_gpu_utilization", "Share of busy time by engine; `any` is not asleep.", "engine"
        )
        self.power = gauge(f"{_GPU}power_watts", "Power drawn.")
        self.limit = gauge(f"{_GPU}power_limit_watts", "Sustained power limit.")
        self.temperature = gauge(f"{_GPU}temperature_celsius", "Temperature.", "sensor")
        self.fan = gauge(f"{_GPU}fan_rpm", "Fan speed, turns per minute.", "fan")
        self.clock = gauge(f"{_GPU}frequency_hertz", "Clock; actual 0 is asleep.", "gt", "kind")
        self.throttled = gauge(f"{_GPU}throttled", "1 where anything holds the clock down.", "gt")
        self.reason = gauge(
            f"{_GPU}throttle_reason", "1 for each reason that holds the clock down.", "gt", "reason"
        )
        self.used = gauge(f"{_GPU}memory_used_bytes", "Memory of the processes that may be seen.")
        self.total = gauge(f"{_GPU}memory_total_bytes", "Memory of the card.")
        self.energy = CounterMetricFamily(
            f"{_GPU}energy_joules", "Energy drawn since the driver was loaded.", labels=_CARD_LABELS
        )

    def __iter__(self) -> Iterator[Metric]:
        return iter(vars(self).values())

    def add(self, rates: GpuRates) -> None:
        """Add the samples of one card; what its driver does not tell is left out."""
        card, reading = rates.card, rates.reading
        labels = (card.lock_name, card.name, card.pci_address)
        for engine, share in rates.engines.items():
            self.busy.add_metric((*labels, engine), share)
        if rates.utilization is not None:
            self.busy.add_metric((*labels, "any"), rates.utilization)
        if rates.power_w is not None:
            self.power.add_metric(labels, rates.power_w)
        limit_w = reading.power_limit_w or reading.rated_power_w
        if limit_w is not None:
            self.limit.add_metric(labels, limit_w)
        if reading.energy_j is not None:
            self.energy.add_metric(labels, reading.energy_j)
        for sensor, degrees in reading.temperatures_c.items():
            self.temperature.add_metric((*labels, sensor), degrees)
        for fan, rpm in reading.fans_rpm.items():
            self.fan.add_metric((*labels, fan), rpm)
        self.used.add_metric(labels, rates.memory_used_bytes)
        if card.memory_bytes:
            self.total.add_metric(labels, card.memory_bytes)
        self._add_clocks(rates, labels)

    def _add_clocks(self, rates: GpuRates, labels: tuple[str, ...]) -> None:
        for gt in rates.reading.gts:
            kinds = (
                ("actual", gt.actual_mhz),
                ("requested", gt.requested_mhz),
                ("min", gt.min_mhz),
                ("max", gt.max_mhz),
            )
            for kind, mhz in kinds:
                if mhz is not None:
                    self.clock.add_metric((*labels, gt.name, kind), mhz * _MHZ)
            self.throttled.add_metric((*labels, gt.name), float(bool(gt.throttle)))
            for reason in gt.throttle:
                self.reason.add_metric((*labels, gt.name, reason), 1.0)


def _gpu_families(gpus: Iterable[GpuRates]) -> Iterator[Metric]:
    families = _GpuFamilies()
    for rates in gpus:
        families.add(rates)
    yield from families
