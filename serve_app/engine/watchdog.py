"""When a step counts as stuck."""

from __future__ import annotations

from collections import deque
from typing import Literal

EngineState = Literal["loading", "ready", "stuck", "dead"]

_NUM_STEPS = 512
_P99_FACTOR = 10.0


class StepWatch:
    """Remembers the last sign of life and how long steps take (the last 512)."""

    def __init__(self, min_s: float) -> None:
        self._min_s = min_s
        self._steps: deque[float] = deque(maxlen=_NUM_STEPS)
        self._last_s = 0.0

    def touch(self, now_s: float) -> None:
        """Note a sign of life, or that waiting for one begins now."""
        self._last_s = now_s

    def add_step(self, seconds: float) -> None:
        """Note how long a step took."""
        self._steps.append(seconds)

    def age_s(self, now_s: float) -> float:
        """Seconds since the last sign of life."""
        return now_s - self._last_s

    @property
    def limit_s(self) -> float:
        """Longest silence allowed while there is work: max(min_s, 10 × p99 of the step times)."""
        if not self._steps:
            return self._min_s
        ordered = sorted(self._steps)
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        return max(self._min_s, _P99_FACTOR * p99)
