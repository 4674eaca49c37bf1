"""Merges the Prometheus texts of several replicas, told apart by a `replica` label.

Histograms are never summed here: with the label kept, the query sums them exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Sample

REPLICA_LABEL = "replica"


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = tuple(families)

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        return self._families


class RecentExpositions:
    """Replicas' last texts: Serve asks none while it changes its user_config, half a second each.

    A replica that is silent for longer than `keep_s` is left out. `now` is monotonic seconds.
    """

    def __init__(self, keep_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._keep_s = keep_s
        self._now = now
        self._seen: dict[str, tuple[float, str]] = {}

    def update(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Return `texts` (replica id → Prometheus text) and the last ones of those not in it."""
        now = self._now()
        self._seen |= {replica_id: (now, text) for replica_id, text in texts.items()}
        self._seen = {
            replica_id: seen
            for replica_id, seen in self._seen.items()
            if now - seen[0] < self._keep_s
        }
        return {replica_id: text for replica_id, (_, text) in self._seen.items()}


def merge_expositions(texts: Mapping[str, str]) -> str:
    """Return one valid exposition of `texts` (replica id → Prometheus text).

    A sample that lacks the label `replica` gets its text's id; one that has it keeps it, so merged
    texts merge again. Of samples with equal name and labels the first stays. Each family appears
    once, with the help and type seen first. Raises ValueError on a text that is no exposition.
    """
    families: dict[str, Metric] = {}
    seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    for replica_id, text in texts.items():
        for family in text_string_to_metric_families(text):
            merged = families.get(family.name)
            if merged is None:
                merged = families[family.name] = Metric(
                    family.name, family.documentation, family.type
                )
            for sample in family.samples:
                labels = dict(sample.labels)
                labels.setdefault(REPLICA_LABEL, replica_id)
                key = (sample.name, tuple(sorted(labels.items())))
                if key not in seen:
                    seen.add(key)
                    merged.samples.append(
                        Sample(sample.name, labels, sample.value, sample.timestamp)
                    )
    return _render(families.values())


def _render(families: Iterable[Metric]) -> str:
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry).decode()
