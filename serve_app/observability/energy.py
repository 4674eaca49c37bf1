"""Joules and cost of one model replica: from counters where they can be read, else configured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve_app.config.sections_cost import CostSection
from serve_app.hardware.cards import list_cards
from serve_app.hardware.telemetry.cpu import read_host
from serve_app.hardware.telemetry.gpu import read_gpu
from serve_app.observability.metrics import PREFIX

JOULES_PER_KWH = 3.6e6
CARD, PACKAGE, CONFIGURED = "card", "package", "configured"


class EnergyReader:
    """Joules of a replica's share of a host, as its counters tell them.

    card_names: lock names of the cards that the replica holds (`arc-0`); then the cards' counters
    count. Without cards the packages' (RAPL) count, times `cpu_share` (0 to 1) of the host's cores.
    """

    def __init__(
        self, card_names: Sequence[str] = (), cpu_share: float = 1.0, root: Path = Path("/")
    ) -> None:
        self._root = root
        self._cpu_share = cpu_share
        found = list_cards(root, {})  # simulated cards draw nothing
        self._cards = [
            card
            for card in (*found.discrete, *found.integrated)
            if card.lock_name in card_names and not card.is_simulated
        ]
        self._has_cards = bool(card_names)
        self._last: dict[str, float] = {}
        self._joules = 0.0
        self.source = CONFIGURED
        self.read()

    def read(self) -> float | None:
        """Return the joules since this reader began; None where no counter can be read."""
        if self._has_cards:
            readings = {card.lock_name: read_gpu(card, self._root).energy_j for card in self._cards}
            counters = {name: joules for name, joules in readings.items() if joules is not None}
            if not counters or len(counters) < len(readings):
                return None  # the sum over some of the cards would be no replica's
            self.source = CARD
            return self._advance(counters, {}, 1.0)
        host = read_host(self._root)
        if not host.energy_j:
            return None
        self.source = PACKAGE
        return self._advance(dict(host.energy_j), dict(host.energy_range_j), self._cpu_share)

    def _advance(self, counters: dict[str, float], ranges: dict[str, float], share: float) -> float:
        for name, now_j in counters.items():
            before_j = self._last.get(name, now_j)
            if now_j < before_j:  # RAPL wraps where the kernel says; a card's was reset
                now_j += ranges.get(name, before_j - now_j)
            self._joules += (now_j - before_j) * share
        self._last = counters
        return self._joules


class CostMetrics(Collector):
    """Counters of joules and cost, and the power now, with the label `model_name`.

    `update` is called with the engine's busy seconds so far, before each scrape.
    """

    def __init__(
        self,
        model_name: str,
        section: CostSection,
        reader: EnergyReader,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model_name = model_name
        self._section = section
        self._reader = reader
        self._clock = clock
        self._updated_s = clock()
        self._busy_s = 0.0
        self._read_joules = reader.read() or 0.0
        self._joules = 0.0
        self._watts = 0.0
        self._hardware_cost = 0.0

    def update(self, busy_s: float) -> None:
        """Count what passed since the last call; `busy_s` may fall when the engine restarts."""
        now_s = self._clock()
        passed_s = now_s - self._updated_s
        if passed_s <= 0:
            return
        section = self._section
        read_joules = self._reader.read()
        if read_joules is None:
            share = min(1.0, max(0.0, busy_s - self._busy_s) / passed_s)
            watts = section.idle_watts + share * max(0.0, section.busy_watts - section.idle_watts)
            joules = watts * passed_s
        else:
            joules = max(0.0, read_joules - self._read_joules)
            self._read_joules = read_joules
        joules += section.host_watts * passed_s
        self._watts = joules / passed_s
        self._joules += joules
        self._hardware_cost += section.hardware_price_per_s * passed_s
        self._busy_s, self._updated_s = busy_s, now_s

    def describe(self) -> Iterable[Metric]:
        """Return no families: names are checked by the tests, not at registration."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Yield joules and watts; cost only where prices are configured."""
        section = self._section
        if self._joules == 0.0 and self._reader.source == CONFIGURED and not section.has_prices:
            return  # nothing is known of this replica's power
        source = self._reader.source
        joules = CounterMetricFamily(
            f"{PREFIX}energy_joules",
            "Energy of the replica; source: card or package (read), or configured watts.",
            labels=("model_name", "source"),
        )
        joules.add_metric((self._model_name, source), self._joules)
        watts = GaugeMetricFamily(
            f"{PREFIX}power_watts",
            "Power of the replica since the scrape before.",
            labels=("model_name", "source"),
        )
        watts.add_metric((self._model_name, source), self._watts)
        yield from (joules, watts)
        if section.has_prices:
            yield from self._cost()

    def _cost(self) -> Iterable[Metric]:
        section = self._section
        cost = CounterMetricFamily(
            f"{PREFIX}cost",
            "Cost of the replica so far, by kind (energy, hardware), in the label's currency.",
            labels=("model_name", "currency", "kind"),
        )
        energy_cost = self._joules / JOULES_PER_KWH * section.electricity_price_per_kwh
        for kind, value in (("energy", energy_cost), ("hardware", self._hardware_cost)):
            cost.add_metric((self._model_name, section.currency, kind), value)
        yield cost
        if section.budget_per_hour is not None:
            budget = GaugeMetricFamily(
                f"{PREFIX}cost_budget_per_hour",
                "Configured cost of an hour from which on an alert fires.",
                labels=("currency",),
            )
            budget.add_metric((section.currency,), section.budget_per_hour)
            yield budget
