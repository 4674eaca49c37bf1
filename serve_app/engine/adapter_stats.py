"""Counters of an engine that schedules somewhere else, as `EngineStats` tells them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from serve_app.core.events import EngineInfo, EngineStats
from serve_app.engine.admission import Admission


class AdapterStats:
    """Counts since the start; the gauges come from the admission and the running requests."""

    def __init__(self) -> None:
        self._stats = EngineStats()

    def count(self, **more: float) -> None:
        """Add to the counters of these names."""
        changed: dict[str, Any] = {
            name: getattr(self._stats, name) + value for name, value in more.items()
        }
        self._stats = replace(self._stats, **changed)

    def count_step(self, seconds: float, **more: float) -> None:
        """Count a step that took `seconds`, and add to the counters of these names."""
        self.count(num_steps_total=1, step_time_s_total=seconds, **more)
        self._stats = replace(self._stats, last_step_time_s=seconds)

    def reset(self) -> None:
        """Forget everything, as after a warm-up."""
        self._stats = EngineStats()

    def snapshot(
        self,
        admission: Admission[Any],
        info: EngineInfo,
        lengths: Iterable[int],
        *,
        is_paused: bool,
    ) -> EngineStats:
        """Counters and gauges; used blocks are those that sequences of `lengths` tokens fill."""
        used = sum(-(-length // info.block_size) for length in lengths)
        used = min(used, info.num_blocks)
        return replace(
            self._stats,
            num_running=len(admission.running),
            num_waiting=len(admission.waiting),
            num_blocks=info.num_blocks,
            num_free_blocks=info.num_blocks - used,
            num_used_blocks=used,
            max_num_running=admission.max_num_running,
            num_joins_total=admission.num_joins_total,
            mode=admission.mode.value,
            is_paused=is_paused,
        )
