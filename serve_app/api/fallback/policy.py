"""When a request may leave for the upstream: latency, a circuit breaker, a budget per hour.

Plain arithmetic over a clock; used from one event loop.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from enum import StrEnum

from serve_app.config.schema import FallbackSection

_HOUR_S = 3600.0


class CircuitState(StrEnum):
    """closed: all goes. open: nothing goes. half_open: one request tries whether it goes again."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Opens after `threshold` failures in a row; lets one probe through every `open_s` seconds."""

    def __init__(self, threshold: int, open_s: float, clock: Callable[[], float]) -> None:
        self._threshold = threshold
        self._open_s = open_s
        self._clock = clock
        self._num_failures = 0
        self._opened_s = 0.0
        self._is_probing = False

    @property
    def state(self) -> CircuitState:
        """The state now."""
        if self._num_failures < self._threshold:
            return CircuitState.CLOSED
        if self._is_probing or self._clock() - self._opened_s >= self._open_s:
            return CircuitState.HALF_OPEN
        return CircuitState.OPEN

    def try_enter(self) -> bool:
        """Return whether a request may go now; a True while half open is the one probe."""
        state = self.state
        if state is CircuitState.HALF_OPEN:
            if self._is_probing:
                return False
            self._is_probing = True
        return state is not CircuitState.OPEN

    def succeeded(self) -> None:
        """Note an answer: the circuit is closed."""
        self._num_failures = 0
        self._is_probing = False

    def failed(self) -> None:
        """Note a failure; from the threshold on the circuit is open for `open_s`."""
        self._num_failures += 1
        self._is_probing = False
        self._opened_s = self._clock()

    def abandoned(self) -> None:
        """Note that a request ended without telling anything of the upstream: its client left."""
        self._is_probing = False


class SlidingLatency:
    """The p95 of the times to first token of the last `window_s` seconds."""

    def __init__(self, window_s: float, min_samples: int, clock: Callable[[], float]) -> None:
        self._window_s = window_s
        self._min_samples = min_samples
        self._clock = clock
        self._samples: deque[tuple[float, float]] = deque()

    def observe(self, seconds: float) -> None:
        """Add one time to first token."""
        self._samples.append((self._clock(), seconds))

    def p95_s(self) -> float | None:
        """Return the 95th percentile (nearest rank), None with too few samples to tell."""
        oldest_s = self._clock() - self._window_s
        while self._samples and self._samples[0][0] < oldest_s:
            self._samples.popleft()
        if len(self._samples) < self._min_samples:
            return None
        ordered = sorted(seconds for _, seconds in self._samples)
        return ordered[math.ceil(0.95 * len(ordered)) - 1]


class HourlyBudget:
    """Money spent in the last hour, in the unit of the configured price."""

    def __init__(
        self, limit: float | None, price_per_1k_tokens: float, clock: Callable[[], float]
    ) -> None:
        self._limit = limit
        self._price = price_per_1k_tokens / 1000.0
        self._clock = clock
        self._spent: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def has_room(self) -> bool:
        """Return whether anything is left of the last hour's budget."""
        return self._limit is None or self.spent() < self._limit

    def charge(self, num_tokens: int) -> None:
        """Note the tokens of one answer, prompt included."""
        cost = num_tokens * self._price
        self._spent.append((self._clock(), cost))
        self._sum += cost

    def spent(self) -> float:
        """Return what the last hour cost."""
        oldest_s = self._clock() - _HOUR_S
        while self._spent and self._spent[0][0] < oldest_s:
            self._sum -= self._spent.popleft()[1]
        return self._sum if self._spent else 0.0


class FallbackPolicy:
    """Decides for one ingress replica; `num_shares` replicas share the budget."""

    def __init__(
        self, section: FallbackSection, num_shares: int, clock: Callable[[], float]
    ) -> None:
        limit = section.budget_per_hour
        self.breaker = CircuitBreaker(section.failure_threshold, section.open_s, clock)
        self.latency = SlidingLatency(section.window_s, section.min_samples, clock)
        self.budget = HourlyBudget(
            None if limit is None else limit / num_shares, section.price_per_1k_tokens, clock
        )
        self._limit_s = section.ttft_p95_limit_ms / 1000.0

    def is_slow(self) -> bool:
        """Return whether the local p95 time to first token is past its limit."""
        p95_s = self.latency.p95_s()
        return p95_s is not None and p95_s > self._limit_s

    def try_enter(self) -> bool:
        """Return whether a request may go to the upstream now."""
        return self.budget.has_room() and self.breaker.try_enter()
