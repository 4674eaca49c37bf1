"""An engine without a model: ids by the clock. For measuring overhead, and for tests of faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from serve_app.config.schema import EngineSection
from serve_app.core.clock import Clock, MonotonicClock
from serve_app.core.events import (
    BatchingOptions,
    EngineCapabilities,
    EngineInfo,
    EngineStats,
    FinishReason,
    TokenEvent,
)
from serve_app.core.sampling import SamplingParams
from serve_app.engine.admission import Admission
from serve_app.engine.validation import check_request

_LONGEST_SLEEP_S = 0.02


@dataclass(slots=True)
class _Stream:
    request_id: str
    sampling: SamplingParams
    last_id: int
    submitted_s: float
    num_generated: int = 0
    queue_time_s: float | None = None


class FixedRateEngine:
    """Emits `fixed_rate_tokens_per_s` ids per stream, all streams at the same ticks, like a batch.

    A late step emits what is due, so the rate holds on a busy machine. Each id follows from the one
    before (`token_id_at`): the same for the same prompt, and a prompt that ends in a part of the
    answer is answered by the rest. It computes nothing: whatever shapes a distribution is accepted
    and has no effect, apart from stop ids, which are never emitted.
    """

    def __init__(
        self,
        section: EngineSection,
        *,
        model: str,
        vocab_size: int,
        max_model_len: int,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        assert section.fixed_rate_tokens_per_s is not None, "chosen by fixed_rate_tokens_per_s"
        self._period_s = 1.0 / section.fixed_rate_tokens_per_s
        self._clock = clock or MonotonicClock()
        self._sleep = sleep
        self._admission: Admission[_Stream] = Admission(section.max_num_seqs)
        self._events: list[TokenEvent] = []
        self._next_tick_s = 0.0
        self._is_paused = False
        self._stats = EngineStats()
        self._info = EngineInfo(
            engine="fixed_rate",
            model=model,
            device="none",
            device_name="clock",
            dtype="none",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=section.max_num_seqs,
            max_num_batched_tokens=section.max_num_batched_tokens or section.max_num_seqs,
            block_size=section.block_size,
            num_blocks=0,
            capabilities=EngineCapabilities(
                logprobs=False, top_logprobs=False, prompt_logprobs=False
            ),
        )

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._info

    def submit(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        """Queue a stream. Raises ClientError as `check_request` does."""
        check_request(self._info, prompt_token_ids, sampling)
        room = self._info.max_model_len - len(prompt_token_ids)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        stream = _Stream(request_id, sampling, prompt_token_ids[-1], self._clock.now())
        self._admission.waiting[request_id] = stream
        self._count(num_prompt_tokens_total=len(prompt_token_ids))

    def abort(self, request_id: str) -> None:
        """End a stream; its terminal event comes with the next step."""
        if self._admission.remove(request_id) is not None:
            self._count(num_aborted_total=1)
            self._events.append(TokenEvent(request_id, finish_reason=FinishReason.ABORTED))

    def configure(self, batching: BatchingOptions) -> None:
        """Change the batching toggles."""
        self._admission.configure(batching)

    def pause(self) -> None:
        """Stop emitting."""
        self._is_paused = True

    def resume(self) -> None:
        """Go on; what fell due meanwhile is not made up for."""
        self._is_paused = False
        self._next_tick_s = self._clock.now() + self._period_s

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        admission = self._admission
        return bool(self._events) or (
            not self._is_paused and bool(admission.waiting or admission.running)
        )

    def step(self) -> list[TokenEvent]:
        """Emit what is due; waits at most 20 ms for the next tick."""
        events, self._events = self._events, []
        if self._is_paused:
            return events
        now = self._clock.now()
        if not self._admission.running:
            self._next_tick_s = now + self._period_s
        for stream in self._admission.admit():
            stream.queue_time_s = max(0.0, now - stream.submitted_s)
        if now < self._next_tick_s:
            self._sleep(min(self._next_tick_s - now, _LONGEST_SLEEP_S))
            now = self._clock.now()
        num_due = 0
        while self._next_tick_s <= now:
            self._next_tick_s += self._period_s
            num_due += 1
        if num_due == 0:
            return events
        self._count(num_steps_total=1)
        for stream in list(self._admission.running.values()):
            events.append(self._emit(stream, num_due))
        return events

    def stats(self) -> EngineStats:
        """Counters and gauges; there are no blocks."""
        admission = self._admission
        return replace(
            self._stats,
            num_running=len(admission.running),
            num_waiting=len(admission.waiting),
            max_num_running=admission.max_num_running,
            num_joins_total=admission.num_joins_total,
            mode=admission.mode.value,
            is_paused=self._is_paused,
        )

    def close(self) -> None:
        """Drop all streams."""
        self._admission.running.clear()
        self._admission.waiting.clear()

    def _emit(self, stream: _Stream, num_due: int) -> TokenEvent:
        first = stream.num_generated
        last = min(first + num_due, stream.sampling.max_tokens)
        ids = tuple(self._next_id(stream) for _ in range(first, last))
        stream.num_generated = last
        self._count(num_generation_tokens_total=len(ids), num_scheduled_tokens_total=len(ids))
        event = TokenEvent(
            stream.request_id, ids, queue_time_s=None if first else stream.queue_time_s
        )
        if last < stream.sampling.max_tokens:
            return event
        self._admission.remove(stream.request_id)
        return replace(event, finish_reason=FinishReason.LENGTH)

    def _next_id(self, stream: _Stream) -> int:
        token_id = token_id_at(stream.last_id, 0, self._info.vocab_size)
        while token_id in stream.sampling.stop_token_ids:
            token_id = (token_id + 1) % self._info.vocab_size
        stream.last_id = token_id
        return token_id

    def _count(self, **more: int) -> None:
        changed = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = replace(self._stats, **changed)


def token_id_at(last_prompt_id: int, place: int, vocab_size: int) -> int:
    """The id that a stream emits at `place` (0-based), where no stop id lies on the way."""
    return (last_prompt_id + (place + 1) * 7919) % vocab_size
