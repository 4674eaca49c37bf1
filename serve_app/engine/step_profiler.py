"""Traces an engine's steps with PyTorch's profiler, inside the engine's process."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from serve_app.core.errors import EngineError
from serve_app.core.events import EngineStats
from serve_app.engine.protocol import Engine
from serve_app.engine.trace_summary import OPERATOR_PREFIX, STEP, summarise, without_idle_steps

_SETTLING_STEPS = 2


@runtime_checkable
class Replayable(Protocol):
    """An engine that captured its decode steps, and can run them uncaptured as well."""

    @property
    def has_captured_steps(self) -> bool:
        """Whether decode steps are replayed."""
        ...

    def replay_steps(self, is_on: bool) -> None:
        """Replay captured steps (the usual), or run each anew."""
        ...


@dataclass(slots=True)
class StepProfiler:
    """One profile: `num_steps` traced steps, then as many timed with and without capture.

    A step counts where the engine counts it: one that only tells of an aborted request, or waits
    for a batch to end, had nothing to compute.

    Make it when the command comes, call `before_step` and `after_step` around each step and
    `finish` when no more shall be waited for. `result` is there once `is_done`: figures, or an
    error where not one step ran or the trace could not be written.
    """

    engine: Engine
    num_steps: int
    path: Path
    result: dict[str, Any] | EngineError | None = None
    _profiler: Any = None
    _operators: Any = None
    _step: Any = None
    _has_computed: list[bool] = field(default_factory=list)
    _num_traced: int = 0
    _num_before: int = 0
    _before: EngineStats = field(default_factory=EngineStats)
    _started_s: float = 0.0
    _seconds: float = 0.0
    _read_bytes: int = 0
    _timed: dict[bool, list[float]] = field(default_factory=dict)
    _writer: threading.Thread | None = None

    @property
    def is_done(self) -> bool:
        """Whether `result` is there."""
        return self.result is not None

    def before_step(self) -> None:
        """Begin a step: traced, or one of those that only the clock sees."""
        if self._writer is None and self._num_traced < self.num_steps:
            if self._profiler is None:
                self._start()
            import torch

            self._step = torch.profiler.record_function(STEP)
            self._step.__enter__()
        self._num_before = self.engine.stats().num_steps_total
        self._started_s = time.perf_counter()

    def after_step(self) -> None:
        """End a step; the last one ends the profile."""
        seconds = time.perf_counter() - self._started_s
        has_computed = self.engine.stats().num_steps_total > self._num_before
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
            self._has_computed.append(has_computed)
            self._num_traced += has_computed
            self._seconds += seconds * has_computed
            if self._num_traced == self.num_steps:
                self._stop()
                self._compare_next()
        elif has_computed and self._timed:
            self._time(seconds)

    def finish(self) -> None:
        """End now with what there is; the trace is written on a thread of its own."""
        if self._writer is not None or self.is_done:
            return
        if self._num_traced == 0:
            if self._profiler is not None:
                self._stop()
            self.result = EngineError(
                "no step ran while it was profiled; send requests meanwhile, or wait longer"
            )
            return
        if self._num_traced < self.num_steps:
            self._stop()
        self._restore()
        self._writer = threading.Thread(target=self._write, name="trace-writer", daemon=True)
        self._writer.start()

    def _start(self) -> None:
        import torch

        from serve_app.models.kernels.shown import ShownOperators

        kind = self.engine.info.device.partition(":")[0]
        supported: Any = torch.profiler.supported_activities
        traced = {activity.name.lower() for activity in supported()}
        # torch.profiler.profile wraps this one for cycles of steps, of which torch 2.10 to 2.12
        # warn without any; with acc_events=True its end holds the engine up for seconds.
        self._profiler = torch.autograd.profiler.profile(
            use_kineto=True,
            use_device=kind if kind != "cpu" and kind in traced else None,
            record_shapes=True,
        )
        self._profiler.__enter__()
        self._operators = ShownOperators(OPERATOR_PREFIX)
        self._operators.show()
        self._before = self.engine.stats()

    def _stop(self) -> None:
        self._operators.hide()
        self._profiler.__exit__(None, None, None)
        after = self.engine.stats()
        self._read_bytes = sum(
            getattr(after, name) - getattr(self._before, name)
            for name in ("weight_bytes_read_total", "kv_bytes_read_total")
        )

    def _compare_next(self) -> None:
        """Time steps with capture, then without; ends at once where nothing is captured."""
        if isinstance(self.engine, Replayable) and self.engine.has_captured_steps:
            self._timed = {True: []}
        else:
            self.finish()

    def _time(self, seconds: float) -> None:
        is_captured = False not in self._timed
        times = self._timed[is_captured]
        times.append(seconds)
        if len(times) < self.num_steps + _SETTLING_STEPS:
            return
        if is_captured:
            self._timed[False] = []
            assert isinstance(self.engine, Replayable)
            self.engine.replay_steps(False)
        else:
            self.finish()

    def _restore(self) -> None:
        if self._timed and isinstance(self.engine, Replayable):
            self.engine.replay_steps(True)

    def _write(self) -> None:
        try:
            self._profiler.export_chrome_trace(str(self.path))
            events = json.loads(self.path.read_text())["traceEvents"]
            events = without_idle_steps(events, self._has_computed)
            self.result = {**summarise(events), **self._own_figures()}
        except (OSError, ValueError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.result = EngineError(f"the trace could not be written: {error}")

    def _own_figures(self) -> dict[str, Any]:
        limit = self._before.bandwidth_limit_bytes
        bytes_per_s = self._read_bytes / self._seconds if self._seconds else 0.0
        medians = {
            is_captured: sorted(times[_SETTLING_STEPS:])[len(times[_SETTLING_STEPS:]) // 2]
            for is_captured, times in self._timed.items()
            if len(times) > _SETTLING_STEPS
        }
        both = len(medians) == 2
        return {
            "trace": str(self.path),
            "read_bytes_per_s": bytes_per_s,
            "bandwidth_share": bytes_per_s / limit if limit else None,
            "captured_step_s": medians.get(True),
            "uncaptured_step_s": medians.get(False),
            "capture_speedup": medians[False] / medians[True] if both else None,
        }
