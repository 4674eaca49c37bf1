"""A histogram that takes many equal observations at once, for code that runs per token.

Prometheus' own client takes two locks per observation. This one is for a single thread that counts
(an event loop, an engine's reader) and a scrape on any thread: adding is one bisect and three sums.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class WeightedHistogram(Collector):
    """Histogram `name` with ascending upper `buckets` (+Inf is added) and one set of labels."""

    def __init__(
        self,
        name: str,
        documentation: str,
        buckets: Sequence[float],
        labels: dict[str, str] | None = None,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(float(bound) for bound in buckets)
        self._labels = dict(labels or {})
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add `count` observations of `value`."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """Return the family without samples, so that registering never collects."""
        return [HistogramMetricFamily(self._name, self._documentation)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Yield the family with cumulative buckets."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=tuple(self._labels))
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), tuple(self._counts), strict=True):
            total += count
            buckets.append((_bound_label(bound), float(total)))
        family.add_metric(tuple(self._labels.values()), buckets=buckets, sum_value=self._sum)
        yield family


def _bound_label(bound: float) -> str:
    return "+Inf" if bound == float("inf") else repr(bound)
