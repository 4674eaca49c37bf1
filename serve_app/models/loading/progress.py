"""How far loading is, as a line of text: a bar, bytes, and bytes per second."""

from __future__ import annotations

import time
from collections.abc import Callable

_BAR_CELLS = 20
_INTERVAL_S = 0.5


class LoadProgress:
    """A `progress` callback for `load_model` that tells a line, at most every half second.

    Args:
        tell: told the line.
        clock: seconds, from any point on.
    """

    def __init__(
        self, tell: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._started_s = self._told_s = clock()

    def __call__(self, read_bytes: int, total_bytes: int) -> None:
        """Take over the bytes read so far, of all."""
        now_s = self._clock()
        if now_s - self._told_s >= _INTERVAL_S:
            self._told_s = now_s
            self._tell(progress_line(read_bytes, total_bytes, now_s - self._started_s))


def progress_line(read_bytes: int, total_bytes: int, seconds: float) -> str:
    """`loading weights [#####...............] 25 %, 3.5 of 14.0 GB, 1.75 GB/s`."""
    share = read_bytes / total_bytes if total_bytes else 1.0
    cells = int(share * _BAR_CELLS)
    bar = "#" * cells + "." * (_BAR_CELLS - cells)
    rate = read_bytes / seconds if seconds > 0 else 0.0
    done = f"{read_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB"
    return f"loading weights [{bar}] {share:.0%}, {done}, {rate / 1e9:.2f} GB/s"
