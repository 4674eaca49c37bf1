"""XeRay's own engine: continuous batching over a paged KV cache."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch

from serve_app.config.schema import EngineSection
from serve_app.core.errors import EngineError, ErrorInfo
from serve_app.core.events import (
    BatchingOptions,
    EngineInfo,
    EngineStats,
    FinishReason,
    TokenEvent,
)
from serve_app.core.sampling import SamplingParams
from serve_app.engine.block_manager import BlockManager
from serve_app.engine.constraint import Constraints
from serve_app.engine.devices import (
    copy_bandwidth,
    is_device_lost,
    release_cached_memory,
)
from serve_app.engine.graphs import StepGraphs, create_graphs
from serve_app.engine.model_runner import ModelRunner, RunnerConfig
from serve_app.engine.native_info import describe_engine
from serve_app.engine.prompt_lookup import LookupOptions, PromptLookup
from serve_app.engine.row_costs import RowCosts
from serve_app.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import Sequence
from serve_app.engine.sizing import fit_kv_cache
from serve_app.engine.step_counters import StepCounters
from serve_app.engine.step_output import StepOutput
from serve_app.engine.tensor_parallel_group import RankLostError
from serve_app.engine.validation import check_request
from serve_app.engine.warm_up import Progress, warm_up
from serve_app.models.interface import LoadedModel

_LOG = logging.getLogger(__name__)

INVARIANT_CHUNK = 64
"""Prefill chunk length of `batch_invariant` (or the block size, where that is larger)."""

_MAX_FAILED_STEPS = 3


class NativeEngine:
    """Schedules, runs and postprocesses steps of one loaded network.

    On accelerators a step is queued before the last one's ids are read: ids stay on the device as
    the next input, stop conditions are seen one step later, and the surplus token is dropped.

    Args:
        model: the network on its device.
        section: limits and toggles.
        max_model_len: longest prompt + answer; None is what the model was made for.
        load_s: seconds that loading took, for `info.startup_s`.
        on_progress: told the name of each stage of the warm-up.
        graphs: how decode steps are captured; None chooses by device and section.
        on_close: called by `close`, after the network is dropped.
    """

    def __init__(
        self,
        model: LoadedModel,
        section: EngineSection,
        *,
        max_model_len: int | None = None,
        load_s: float = 0.0,
        on_progress: Progress = lambda stage: None,
        graphs: StepGraphs | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        network = model.network
        block_size = section.block_size
        # measured before memory is full
        is_card = network.device.type != "cpu"
        bandwidth_limit = copy_bandwidth(network.device) if is_card else 0.0
        wanted_len = min(max_model_len or network.max_position, network.max_position)
        num_blocks = fit_kv_cache(network, section, wanted_len)
        # A sequence that fits nowhere could never finish: the cache bounds the context.
        self._max_model_len = min(wanted_len, num_blocks * block_size)
        chunk = max(INVARIANT_CHUNK, block_size) if section.batch_invariant else None
        self._lookup = LookupOptions.of(section.speculative)
        sizes = self._runner_config(section, num_blocks)
        graphs = graphs or create_graphs(network.device, section.capture_graphs)
        self._runner = ModelRunner(network, sizes, graphs)
        started = time.perf_counter()
        budget = warm_up(self._runner, section, longest_chunk=chunk, on_progress=on_progress)
        self._blocks = BlockManager(
            num_blocks,
            block_size,
            enable_prefix_caching=section.enable_prefix_caching,
            alignment=chunk,
        )
        self._scheduler = self._make_scheduler(section, sizes, budget, chunk)
        warmup_s = time.perf_counter() - started
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[StepOutput] = deque()
        self._depth = 0 if network.device.type == "cpu" else 1
        self._events: list[TokenEvent] = []
        self._counters = StepCounters(
            model.read_bytes, network.kv_spec.bytes_per_token, bandwidth_limit
        )
        self._num_arrived = 0
        self._drafts = True
        self._is_paused = False
        self._dead: EngineError | None = None
        self._constraints: Constraints | None = None
        self._on_close = on_close
        self._info = describe_engine(
            model,
            section,
            max_model_len=self._max_model_len,
            max_num_batched_tokens=self._scheduler.max_num_batched_tokens,
            num_blocks=num_blocks,
            startup_s={"load_s": load_s, "warmup_s": warmup_s},
        )

    def _runner_config(self, section: EngineSection, num_blocks: int) -> RunnerConfig:
        max_decode_rows = section.max_num_seqs
        if self._lookup is not None:  # a lone sequence's draft has room in any case
            max_decode_rows = max(max_decode_rows, 1 + self._lookup.num_tokens)
        return RunnerConfig(
            num_blocks,
            section.block_size,
            section.max_num_seqs,
            self._max_model_len,
            section.batch_invariant,
            max_decode_rows,
        )

    def _make_scheduler(
        self, section: EngineSection, sizes: RunnerConfig, budget: int, chunk: int | None
    ) -> Scheduler:
        """The scheduler, and, where it drafts, what a row costs: measured with the warm-up."""
        is_measured = self._lookup is not None and section.warmup
        return Scheduler(
            self._blocks,
            max_num_seqs=section.max_num_seqs,
            max_num_batched_tokens=budget,
            prefill_chunk=chunk,
            max_decode_rows=sizes.max_decode_rows,
            row_costs=RowCosts(self._runner.time_decodes() if is_measured else {}),
        )

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._info

    def use_constraints(self, constraints: Constraints) -> None:
        """Follow grammars and limits on thinking from now on."""
        self._constraints = constraints
        able = replace(
            self._info.capabilities,
            structured_output=constraints.has_grammars,
            thinking_budget=True,
        )
        self._info = replace(self._info, capabilities=able)

    @property
    def has_captured_steps(self) -> bool:
        """Whether decode steps are replayed from captured graphs."""
        return self._runner.has_graphs

    def replay_steps(self, is_on: bool) -> None:
        """Replay captured decode steps (the usual), or run each anew, as a profile compares."""
        self._runner.is_replaying = is_on and self._runner.has_graphs

    def speculate(self, is_on: bool) -> None:
        """Draft for sequences submitted from now on (the usual, where configured), or do not."""
        self._drafts = is_on

    def submit(
        self, request_id: str, prompt_token_ids: SequenceOf[int], sampling: SamplingParams
    ) -> None:
        """Queue a sequence. Raises ClientError as `check_request` does."""
        check_request(self._info, prompt_token_ids, sampling)
        assert request_id not in self._sequences, f"request {request_id} runs already"
        room = self._max_model_len - len(prompt_token_ids)
        if sampling.max_tokens > room:
            sampling = replace(sampling, max_tokens=room)
        sequence = Sequence(request_id, prompt_token_ids, sampling, self._num_arrived)
        if sampling.constraint is not None and self._constraints is not None:
            sequence.constraint = self._constraints.start(sampling.constraint)
        if self._lookup is not None and self._drafts:
            sequence.lookup = PromptLookup(self._lookup)
        self._num_arrived += 1
        self._sequences[request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a sequence: its blocks are free at once, its last event comes with the next step."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._counters.num_aborted += 1
            self._events.append(self._end(sequence, FinishReason.ABORTED))

    def configure(self, batching: BatchingOptions) -> None:
        """Change the toggles from the next step on. Raises ConfigError beyond the limits."""
        self._scheduler.configure(batching)

    def pause(self) -> None:
        """Stop stepping; sequences keep their place."""
        self._is_paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._is_paused = False

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        if self._events or self._dead:
            return True
        return not self._is_paused and bool(self._in_flight or self._scheduler.has_work())

    def step(self) -> list[TokenEvent]:
        """Run one step. Raises EngineError once the device is lost."""
        if self._dead is not None:
            raise self._dead
        if self._is_paused:
            return self._take_events()
        started = time.perf_counter()
        batch = self._scheduler.schedule()
        self._queue(batch)
        self._postprocess(keep=self._depth if batch else 0)
        self._counters.count_step(batch, time.perf_counter() - started)
        return self._take_events()

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        return self._counters.stats(self._scheduler, is_paused=self._is_paused)

    def check_integrity(self) -> None:
        """Prove that each block is free, cached or held by a live sequence, else AssertionError."""
        self._blocks.check_integrity(self._scheduler.running)

    def close(self) -> None:
        """Drop the network, the cache and all sequences."""
        self._in_flight.clear()
        self._sequences.clear()
        del self._runner
        self._counters.forget_network()
        self._on_close()

    def _queue(self, batch: ScheduledBatch) -> None:
        if not batch:
            return
        try:
            self._in_flight.append(self._run(batch))
        except torch.OutOfMemoryError as error:
            self._shed(batch, error)
        except Exception as error:
            self._fail(batch, error)

    def _run(self, batch: ScheduledBatch) -> StepOutput:
        """Queue the step; with prompts in it once more after unused memory was given back."""
        try:
            return self._runner.run(batch)
        except torch.OutOfMemoryError:
            # giving memory back waits for the device: never in a step that only decodes
            if not batch.prefills:
                raise
        self._counters.num_cache_releases += 1
        release_cached_memory(self._runner.device)
        return self._runner.run(batch)

    def _shed(self, batch: ScheduledBatch, error: Exception) -> None:
        """End the step's youngest sequence for lack of memory; the others are computed again."""
        _LOG.error("a step of %d sequences needs more memory", len(batch.chunks), exc_info=error)
        self._postprocess(keep=0)
        alive = [chunk.sequence for chunk in batch.chunks if not chunk.sequence.is_finished]
        if not alive:
            return
        youngest = max(alive, key=lambda sequence: sequence.rank)
        for sequence in alive:
            if sequence is not youngest:
                self._scheduler.retry(sequence)
        self._counters.num_shed += 1
        info = EngineError("the device is out of memory for this request; try again later").info()
        self._events.append(self._end(youngest, FinishReason.ERROR, info))

    def _postprocess(self, keep: int) -> None:
        """Read the oldest steps until `keep` are in flight."""
        while len(self._in_flight) > keep:
            output = self._in_flight.popleft()
            try:
                output.wait()
            except Exception as error:
                self._fail(output.batch, error)
                continue
            self._counters.num_failed_in_a_row = 0
            self._read(output)

    def _read(self, output: StepOutput) -> None:
        token_ids = output.token_ids.tolist()
        for chunk, tensors in output.prompt_logprobs:
            values = tensors.read(chunk.sequence.sampling.prompt_logprobs or 0)
            chunk.sequence.prompt_logprobs[chunk.start + 1 : chunk.start + 1 + len(values)] = values
        for chunk, row in output.sampled:
            if not chunk.sequence.is_finished:
                rows = token_ids[row : row + 1 + len(chunk.draft)]
                self._take_tokens(chunk, rows, output, row)
        for chunk in output.batch.chunks:
            if chunk.samples or chunk.sequence.is_finished:
                continue
            self._scheduler.register_computed(chunk)
            # Only prompt log-probabilities were asked for, and no later chunk is in flight.
            if chunk.sequence.sampling.max_tokens == 0 and chunk.end == chunk.sequence.num_tokens:
                self._events.append(self._end(chunk.sequence, FinishReason.LENGTH))

    def _take_tokens(
        self, chunk: ScheduledChunk, token_ids: list[int], output: StepOutput, row: int
    ) -> None:
        """Take the token of a chunk and, as far as its draft holds, those of the draft's rows."""
        sequence = chunk.sequence
        if token_ids[0] < 0:
            message = "the model produced non-finite logits for this request"
            if sequence.constraint is not None and sequence.constraint.error is not None:
                message = sequence.constraint.error
            self._events.append(
                self._end(sequence, FinishReason.ERROR, EngineError(message).info())
            )
            return
        taken, reason = sequence.take(token_ids, chunk.draft)
        self._scheduler.register_computed(chunk, len(taken) - 1)
        self._counters.count_tokens(chunk, taken)
        if chunk.draft:
            self._runner.count_accepted(sequence, taken)
        num_top, logprobs = sequence.sampling.logprobs, None
        if num_top is not None:
            logprobs = tuple(output.read_logprob(row + i, num_top) for i in range(len(taken)))
        event = TokenEvent(sequence.request_id, taken, logprobs=logprobs)
        if reason is None:
            self._events.append(self._with_first_facts(sequence, event))
            return
        stop_token_id = taken[-1] if reason is FinishReason.STOP else None
        event = replace(event, finish_reason=reason, stop_token_id=stop_token_id)
        event = self._with_first_facts(sequence, event)
        self._end(sequence, reason)
        self._events.append(event)

    @staticmethod
    def _with_first_facts(sequence: Sequence, event: TokenEvent) -> TokenEvent:
        if sequence.has_reported:
            return event
        sequence.has_reported = True
        logprobs = sequence.prompt_logprobs
        return replace(
            event,
            num_cached_tokens=sequence.num_cached_tokens,
            prompt_logprobs=tuple(logprobs) if logprobs else None,
            queue_time_s=sequence.queue_time_s,
        )

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: ErrorInfo | None = None
    ) -> TokenEvent:
        """Take the sequence out and free its blocks; returns a terminal event without a token."""
        self._scheduler.finish(sequence)
        sequence.finish_reason = reason
        del self._sequences[sequence.request_id]
        event = TokenEvent(sequence.request_id, finish_reason=reason, error=error)
        if reason is FinishReason.LENGTH:
            event = self._with_first_facts(sequence, event)
        return event

    def _fail(self, batch: ScheduledBatch, error: Exception) -> None:
        """End the step's sequences with an error; the engine goes on unless the device is lost."""
        _LOG.error("a step of %d sequences failed", len(batch.chunks), exc_info=error)
        info = EngineError(f"the engine failed on this request ({type(error).__name__})").info()
        self._counters.num_failed_in_a_row += 1
        is_rank_lost = isinstance(error, RankLostError)
        has_failed_often = self._counters.num_failed_in_a_row >= _MAX_FAILED_STEPS
        is_lost = is_rank_lost or has_failed_often or is_device_lost(self._runner.device)
        affected = [chunk.sequence for chunk in batch.chunks]
        for sequence in list(self._sequences.values()) if is_lost else affected:
            if not sequence.is_finished:
                self._events.append(self._end(sequence, FinishReason.ERROR, info))
        if isinstance(error, RankLostError):
            self._dead = error
        elif is_lost:
            self._dead = EngineError(f"the device no longer answers ({type(error).__name__})")

    def _take_events(self) -> list[TokenEvent]:
        events, self._events = self._events, []
        return events
