"""What a model replica tells of its load: to routers at each poll, to the autoscaler's policy."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.core.events import EngineInfo, EngineStats
from serve_app.core.requests import ReplicaLoad

WINDOW_S = 15.0
"""Times to first token older than this say nothing of now."""

_MAX_SAMPLES = 512
_NEW_SHARE = 0.3
"""Weight of the newest measurement in the running means."""


class LoadedSequence:
    """One sequence as its replica's meter sees it."""

    def __init__(self, meter: LoadMeter, num_prompt_tokens: int, started_s: float) -> None:
        self._meter = meter
        self.num_waiting_tokens = num_prompt_tokens
        self.started_s = started_s

    def note_first_token(self) -> None:
        """End the wait; more calls do nothing."""
        if self.num_waiting_tokens:
            self._meter.end_wait(self)


class LoadMeter:
    """Counts one replica's streams and waiting prompt tokens, and times them.

    `now` is monotonic seconds. All calls come from one event loop.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=_MAX_SAMPLES)
        self._waiting: set[LoadedSequence] = set()
        self._mean_service_s = 0.0
        self._tokens_per_s = 0.0
        self._last_stats = EngineStats()
        self.num_streams = 0
        self.num_waiting_tokens = 0

    @contextmanager
    def sequence(self, num_prompt_tokens: int) -> Iterator[LoadedSequence]:
        """Count a sequence for as long as the block runs."""
        sequence = LoadedSequence(self, num_prompt_tokens, self._now())
        self.num_streams += 1
        self.num_waiting_tokens += num_prompt_tokens
        self._waiting.add(sequence)
        try:
            yield sequence
        finally:
            self.num_streams -= 1
            had_answer = not sequence.num_waiting_tokens
            self._leave(sequence)
            if had_answer:
                self._mean_service_s = _mixed(
                    self._mean_service_s, self._now() - sequence.started_s
                )

    def end_wait(self, sequence: LoadedSequence) -> None:
        """Take a sequence that has its first token off the waiting ones."""
        now = self._now()
        self._ttfts.append((now, now - sequence.started_s))
        self._leave(sequence)

    def load(self, stats: EngineStats, info: EngineInfo, max_num_seqs: int) -> ReplicaLoad:
        """Return the load now; `stats` may lie a step behind."""
        self._measure_prefill(stats)
        is_idle = self.num_streams == 0
        return ReplicaLoad(
            num_streams=self.num_streams,
            max_num_seqs=max_num_seqs,
            num_waiting_tokens=self.num_waiting_tokens,
            num_blocks=info.num_blocks,
            num_used_blocks=0 if is_idle else stats.num_used_blocks,
            block_size=info.block_size,
            prefill_tokens_per_s=self._tokens_per_s,
            mean_service_s=self._mean_service_s,
            ttft_p95_s=self.ttft_p95_s(),
            num_queued=0 if is_idle else stats.num_waiting,
        )

    def ttft_p95_s(self) -> float:
        """Return the p95 of the last WINDOW_S; who still waits counts with the wait so far."""
        now = self._now()
        while self._ttfts and now - self._ttfts[0][0] > WINDOW_S:
            self._ttfts.popleft()
        times = sorted(
            [ttft for _, ttft in self._ttfts]
            + [now - sequence.started_s for sequence in self._waiting]
        )
        return times[min(len(times) - 1, int(0.95 * len(times)))] if times else 0.0

    def _leave(self, sequence: LoadedSequence) -> None:
        self._waiting.discard(sequence)
        self.num_waiting_tokens -= sequence.num_waiting_tokens
        sequence.num_waiting_tokens = 0

    def _measure_prefill(self, stats: EngineStats) -> None:
        """Follow the engine's speed at prompts: from spans in which they are most of its work."""
        before, self._last_stats = self._last_stats, stats
        seconds = stats.step_time_s_total - before.step_time_s_total
        scheduled = stats.num_scheduled_tokens_total - before.num_scheduled_tokens_total
        generated = stats.num_generation_tokens_total - before.num_generation_tokens_total
        if seconds > 0 and scheduled > 0 and generated < scheduled / 2:
            self._tokens_per_s = _mixed(self._tokens_per_s, scheduled / seconds)


def autoscaling_stats(load: ReplicaLoad) -> dict[str, float]:
    """Return what `record_autoscaling_stats` hands to the policy in `autoscaling_policy`."""
    usage = load.num_used_blocks / load.num_blocks if load.num_blocks else 0.0
    return {
        "num_waiting_tokens": float(load.num_waiting_tokens),
        "kv_usage": usage,
        "ttft_p95_s": load.ttft_p95_s,
        "num_streams": float(load.num_streams),
    }


def _mixed(mean: float, new: float) -> float:
    return new if mean == 0.0 else (1.0 - _NEW_SHARE) * mean + _NEW_SHARE * new
