"""What a service holds while it runs: memory, file descriptors, threads; and whether that grows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from serve_app.bench.processes import ProcessGroup

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_WARM_UP_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class Footprint:
    """All of a service's processes at one time (`at_s`, monotonic seconds)."""

    at_s: float
    rss_bytes: int = 0
    num_fds: int = 0
    num_threads: int = 0
    num_processes: int = 0


@dataclass(frozen=True, slots=True)
class Growth:
    """How much a figure grew over the judged span, by least squares, and how much it may."""

    name: str
    grew: float
    allowed: float
    begin: float

    @property
    def is_held(self) -> bool:
        """Whether it stayed within what is allowed."""
        return self.grew <= self.allowed


@dataclass(frozen=True, slots=True)
class GrowthLimits:
    """What may be gained after the warm-up: a share of the memory and some bytes; counts."""

    rss_share: float = 0.02
    rss_bytes: int = 24 << 20
    num_fds: int = 8
    num_threads: int = 8
    num_processes: int = 0

    def allowed(self, name: str, begin: float) -> float:
        """Return how much the figure `name` may grow from `begin`."""
        extra = self.rss_share * begin if name == "rss_bytes" else 0.0
        return float(getattr(self, name)) + extra


@dataclass(slots=True)
class FootprintWatch:
    """Reads a service's footprint every `period_s` for as long as `watching` lasts."""

    group: ProcessGroup
    period_s: float = 2.0
    proc: Path = Path("/proc")
    samples: list[Footprint] = field(default_factory=list)

    def read(self) -> Footprint:
        """Return the footprint now; processes that end meanwhile are left out."""
        return read_footprint(self.group.snapshot(), self.proc)

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            self.samples.append(await asyncio.to_thread(self.read))
            await asyncio.sleep(self.period_s)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Sample while the block runs, and once more at its end."""
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self.samples.append(await asyncio.to_thread(self.read))

    def growths(self, limits: GrowthLimits) -> list[Growth]:
        """Return each figure's growth after the warm-up."""
        return growths(self.samples, limits)


def read_footprint(pids: Iterable[int], proc: Path) -> Footprint:
    """Return the sums over `pids`, from /proc/PID/statm, fd and status (proc(5))."""
    rss = fds = threads = processes = 0
    for pid in pids:
        entry = proc / str(pid)
        try:
            pages = int((entry / "statm").read_text().split()[1])
            num_fds = len(os.listdir(entry / "fd"))
            status = (entry / "status").read_text()
        except (OSError, IndexError):
            continue
        rss += pages * _PAGE_BYTES
        fds += num_fds
        threads += int(status.split("Threads:")[1].split()[0])
        processes += 1
    return Footprint(time.monotonic(), rss, fds, threads, processes)


def growths(samples: Sequence[Footprint], limits: GrowthLimits) -> list[Growth]:
    """Return the growth of each figure over the samples after the first third: the warm-up.

    It is the slope of the least-squares line times the span, so that one high sample is no growth.
    """
    judged = samples[int(len(samples) * _WARM_UP_SHARE) :]
    names = [item.name for item in fields(Footprint) if item.name != "at_s"]
    found = []
    for name in names:
        values = [float(getattr(sample, name)) for sample in judged]
        times_s = [sample.at_s for sample in judged]
        begin = values[0] if values else 0.0
        grew = _slope(times_s, values) * (times_s[-1] - times_s[0]) if len(values) > 1 else 0.0
        found.append(Growth(name, grew, limits.allowed(name, begin), begin))
    return found


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if spread == 0.0:
        return 0.0
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
