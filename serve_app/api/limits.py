"""Admission control of one ingress replica: how much it takes on, and whether it takes anything."""

from __future__ import annotations

from serve_app.core.errors import OverloadedError
from serve_app.observability.metrics import IngressMetrics

DRAIN_RETRY_AFTER_S = 5.0


class Admission:
    """Counts inference requests in flight. Used from one event loop only."""

    def __init__(self, max_ongoing_requests: int, metrics: IngressMetrics) -> None:
        self.max_ongoing_requests = max_ongoing_requests
        self.num_in_flight = 0
        self.is_draining = False
        self._metrics = metrics

    def enter(self) -> None:
        """Take a request on, or raise OverloadedError (draining, queue_full) and hold nothing."""
        if self.is_draining:
            raise OverloadedError(
                "The server is draining and takes no new requests.",
                code="draining",
                retry_after_s=DRAIN_RETRY_AFTER_S,
            )
        if self.num_in_flight >= self.max_ongoing_requests:
            raise OverloadedError("The server works on as many requests as it can; try again.")
        self.num_in_flight += 1
        self._metrics.set_in_flight(self.num_in_flight)

    def leave(self) -> None:
        """Give the place back."""
        self.num_in_flight -= 1
        self._metrics.set_in_flight(self.num_in_flight)

    def drain(self) -> None:
        """Take nothing more on; what runs goes on."""
        self.is_draining = True
