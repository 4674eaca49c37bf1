"""What the logs lost, as a metric."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from serve_app.observability.logs import SteadyHandler


class LostLines(Collector):
    """`xeray_log_lines_lost_total`: lines of this process that could not be written."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the count."""
        yield CounterMetricFamily(
            "xeray_log_lines_lost",
            "Log lines that could not be written, as to a full disk.",
            value=SteadyHandler.num_lost_in_all,
        )
