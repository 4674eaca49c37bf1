"""When a step counts as stuck: it has been silent for long, and not for want of a CPU."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

EngineState = Literal["loading", "ready", "stuck", "dead"]

_NUM_STEPS = 512
_P99_FACTOR = 10.0


class StepWatch:
    """Remembers the last sign of life (`last_s`) and how long steps take (the last 512).

    `interval_s` is how often to ask for `silent_s` while the engine has work.
    """

    def __init__(self, min_s: float) -> None:
        self._min_s = min_s
        self.interval_s = min_s / 4
        self._starvation = StarvationWatch(self.interval_s)
        self._steps: deque[float] = deque(maxlen=_NUM_STEPS)
        self.last_s = 0.0

    def touch(self, now_s: float) -> None:
        """Note a sign of life, or that waiting for one begins now."""
        self.last_s = now_s

    def add_step(self, seconds: float) -> None:
        """Note how long a step took."""
        self._steps.append(seconds)

    def age_s(self, now_s: float) -> float:
        """Seconds since the last sign of life."""
        return now_s - self.last_s

    def silent_s(self, now_s: float, pid: int) -> float:
        """Seconds since the last sign of life, less those in which process `pid` was starved."""
        return self.age_s(now_s) - self._starvation.since(self.last_s, now_s, pid)

    @property
    def limit_s(self) -> float:
        """Longest silence allowed while there is work: max(min_s, 10 × p99 of the step times)."""
        if not self._steps:
            return self._min_s
        ordered = sorted(self._steps)
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        return max(self._min_s, _P99_FACTOR * p99)


class StarvationWatch:
    """How much of an engine's silence its threads spent waiting for a CPU that others had.

    Beside other work on the machine a sound step can take many times its time; killing its engine
    would end every stream and make the machine busier still. A thread that hangs waits for no CPU.
    Nor is the engine held to time in which nobody looked: whatever kept the watchdog from its turn
    (a busy machine, a halted virtual one) may have kept the engine from its.

    interval_s: how often `since` is called while the engine has work.
    read_waits: returns the seconds that each thread of a process has waited for a CPU, by its id.
    """

    def __init__(
        self, interval_s: float, read_waits: Callable[[int], dict[str, float]] | None = None
    ) -> None:
        self._interval_s = interval_s
        self._read_waits = read_waits or thread_cpu_waits
        self._silence: tuple[float, int] | None = None
        self._looked_s = -math.inf
        self._waits: dict[str, float] = {}
        self._starved_s = 0.0

    def since(self, last_s: float, now_s: float, pid: int) -> float:
        """Return the seconds starved in the silence since `last_s`; both are monotonic seconds.

        Of the threads that wait, the one that waited most between two calls counts: the threads of
        an operator wait for each other.
        """
        if self._silence != (last_s, pid):
            self._silence, self._starved_s = (last_s, pid), 0.0
        unseen_s = now_s - max(last_s, self._looked_s)
        waits = self._read_waits(pid)
        grown = (wait - self._waits.get(thread, wait) for thread, wait in waits.items())
        starved_s = max(0.0, unseen_s - self._interval_s, max(grown, default=0.0))
        self._starved_s += min(unseen_s, starved_s)
        self._looked_s, self._waits = now_s, waits
        return self._starved_s


def thread_cpu_waits(pid: int) -> dict[str, float]:
    """Return the seconds that each thread of a process was ready to run and did not, by its id.

    Empty where the kernel does not tell (Documentation/scheduler/sched-stats.rst).
    """
    waits = {}
    for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            waits[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return waits
