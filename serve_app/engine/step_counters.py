"""What the native engine has counted since it started, and the statistics that come of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field

from serve_app.core.events import BatchingMode, EngineStats
from serve_app.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from serve_app.engine.scheduler import Scheduler


@dataclass(slots=True)
class StepCounters:
    """Counters of one engine.

    Args:
        read_bytes: bytes of weights that a step with so many rows reads.
        kv_bytes_per_token: bytes of keys and values that a step reads for each token of a context.
        bandwidth_limit_bytes: bytes per second that a copy on the device reaches; 0: not measured.
    """

    read_bytes: InitVar[Callable[[int], int]]
    kv_bytes_per_token: int
    bandwidth_limit_bytes: float = 0.0
    num_steps: int = 0
    num_generation_tokens: int = 0
    num_aborted: int = 0
    step_time_s: float = 0.0
    last_step_time_s: float = 0.0
    num_failed_in_a_row: int = 0
    weight_bytes_read: int = 0
    kv_bytes_read: int = 0
    last_step_bytes: int = 0
    num_cache_releases: int = 0
    num_shed: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    _read_bytes: Callable[[int], int] = field(init=False)

    def __post_init__(self, read_bytes: Callable[[int], int]) -> None:
        self._read_bytes = functools.cache(read_bytes)

    def forget_network(self) -> None:
        """Let go of what `read_bytes` holds: the network. No step follows."""
        del self._read_bytes

    def count_step(self, batch: ScheduledBatch, seconds: float) -> None:
        """Count a step; one without tokens counts its time only."""
        if batch:
            self.num_steps += 1
            weights = self._read_bytes(batch.num_tokens)
            # Each row of a draft goes through the context by itself.
            num_tokens = sum(chunk.end * (1 + len(chunk.draft)) for chunk in batch.chunks)
            kv = self.kv_bytes_per_token * num_tokens
            self.weight_bytes_read += weights
            self.kv_bytes_read += kv
            self.last_step_bytes = weights + kv
        self.step_time_s += seconds
        self.last_step_time_s = seconds

    def count_tokens(self, chunk: ScheduledChunk, taken: tuple[int, ...]) -> None:
        """Count the tokens that `chunk` has yielded in the end, and how many of its draft held."""
        self.num_generation_tokens += len(taken)
        if chunk.draft:
            self.num_drafts += 1
            self.num_draft_tokens += len(chunk.draft)
            self.num_accepted_tokens += chunk.num_accepted(taken)

    def stats(self, scheduler: Scheduler, *, is_paused: bool) -> EngineStats:
        """Return the counters beside the scheduler's and the block manager's gauges."""
        blocks, totals = scheduler.block_manager, scheduler.counters
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free_blocks,
            num_cached_blocks=blocks.num_cached_blocks,
            num_used_blocks=blocks.num_used_blocks,
            max_num_running=totals.max_num_running,
            num_steps_total=self.num_steps,
            num_prompt_tokens_total=totals.num_prompt_tokens_total,
            num_generation_tokens_total=self.num_generation_tokens,
            num_scheduled_tokens_total=totals.num_scheduled_tokens_total,
            num_preemptions_total=totals.num_preemptions_total,
            num_joins_total=totals.num_joins_total,
            num_chunked_prefills_total=totals.num_chunked_prefills_total,
            num_aborted_total=self.num_aborted,
            num_prefix_queries_tokens_total=totals.num_prefix_queries_tokens_total,
            num_prefix_hit_tokens_total=totals.num_prefix_hit_tokens_total,
            step_time_s_total=self.step_time_s,
            last_step_time_s=self.last_step_time_s,
            weight_bytes_read_total=self.weight_bytes_read,
            kv_bytes_read_total=self.kv_bytes_read,
            last_step_bytes=self.last_step_bytes,
            bandwidth_limit_bytes=self.bandwidth_limit_bytes,
            num_cache_releases_total=self.num_cache_releases,
            num_shed_total=self.num_shed,
            num_drafts_total=self.num_drafts,
            num_draft_tokens_total=self.num_draft_tokens,
            num_accepted_tokens_total=self.num_accepted_tokens,
            mode=BatchingMode(scheduler.mode).value,
            is_paused=is_paused,
        )
