"""Which tokens the next step computes.

One rule: a step hands out a token budget until each sequence's `num_computed_tokens` reaches its
`num_tokens`. Chunked prefill, prefix hits and recomputation after preemption all follow from it.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from serve_app.core.errors import ConfigError
from serve_app.core.events import BatchingMode, BatchingOptions
from serve_app.engine.block_manager import BlockManager
from serve_app.engine.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens [start, start + length) of a sequence; `samples`: the last yields a new token."""

    sequence: Sequence
    start: int
    length: int
    samples: bool

    @property
    def end(self) -> int:
        """Tokens of the sequence that are computed once this chunk has run."""
        return self.start + self.length


@dataclass(slots=True)
class ScheduledBatch:
    """What one step computes: decode rows (one token each), then prefill chunks.

    `admitted` are the sequences that start running with this step; their slots are new.
    """

    decodes: list[ScheduledChunk] = field(default_factory=list)
    prefills: list[ScheduledChunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    num_preempted: int = 0

    @property
    def chunks(self) -> list[ScheduledChunk]:
        """All chunks in row order."""
        return self.decodes + self.prefills

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return len(self.decodes) + sum(chunk.length for chunk in self.prefills)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


@dataclass(slots=True)
class SchedulerCounters:
    """Counters since start; the names are those of `EngineStats`. `max_num_running` is a peak."""

    num_prompt_tokens_total: int = 0
    num_scheduled_tokens_total: int = 0
    num_preemptions_total: int = 0
    num_joins_total: int = 0
    num_chunked_prefills_total: int = 0
    num_prefix_queries_tokens_total: int = 0
    num_prefix_hit_tokens_total: int = 0
    max_num_running: int = 0


class Scheduler:
    """Decodes first, then prefill chunks, running before new ones; preempts the youngest first.

    Args:
        max_num_seqs: most running sequences, and the number of slots.
        max_num_batched_tokens: token budget of one step.
        prefill_chunk: None, or the length C that makes a sequence's arithmetic independent of its
            batch: prefill chunks end at multiples of C or the prompt's end and are scheduled whole,
            prefix hits are cut to C (the block manager's alignment), and whatever follows the
            prompt is computed one token per step, also after preemption.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefill_chunk: int | None = None,
    ) -> None:
        self.block_manager = block_manager
        self.max_num_seqs_limit = max_num_seqs
        self.prefill_chunk = prefill_chunk
        self.mode = BatchingMode.CONTINUOUS
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = self._effective_budget(max_num_batched_tokens)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.counters = SchedulerCounters()
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    @property
    def max_num_running(self) -> int:
        """Most sequences that may run under the present mode."""
        return 1 if self.mode is BatchingMode.OFF else self.max_num_seqs

    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def configure(self, options: BatchingOptions) -> None:
        """Change the toggles from the next step on; the peak `max_num_running` starts anew.

        Running sequences beyond a lower limit are preempted, and go on when there is room.
        Raises ConfigError for a limit beyond the engine's.
        """
        max_num_seqs = options.max_num_seqs or self.max_num_seqs
        if max_num_seqs > self.max_num_seqs_limit:
            raise ConfigError(
                f"batching.max_num_seqs: {max_num_seqs} is more than engine.max_num_seqs"
                f" ({self.max_num_seqs_limit})",
                param="batching.max_num_seqs",
            )
        self.mode = BatchingMode(options.mode)
        self.max_num_seqs = max_num_seqs
        if options.max_num_batched_tokens is not None:
            self.max_num_batched_tokens = self._effective_budget(options.max_num_batched_tokens)
        self.counters.max_num_running = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        insort(self.waiting, sequence, key=lambda s: s.rank)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its blocks are free for the next step at once.

        A step in flight may still write to them: steps run in order, so before anyone else does.
        """
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def retry(self, sequence: Sequence) -> None:
        """Put a running sequence back into the queue: its step never ran, none is in flight."""
        sequence.drop_placeholders()
        self._preempt(sequence, ScheduledBatch())

    def schedule(self) -> ScheduledBatch:
        """Choose the next step's tokens; empty when every sequence waits for a step in flight."""
        batch = ScheduledBatch()
        while len(self.running) > self.max_num_running:
            self._preempt(self.running[-1], batch)
        self._schedule_decodes(batch)
        self._admit(batch)
        self._schedule_prefills(batch)
        self.counters.num_scheduled_tokens_total += batch.num_tokens
        self.counters.max_num_running = max(self.counters.max_num_running, len(self.running))
        return batch

    def register_computed(self, chunk: ScheduledChunk) -> None:
        """Make the full blocks that `chunk` completed reusable, now that its ids are known."""
        sequence = chunk.sequence
        if sequence.status is not SequenceStatus.RUNNING:
            return
        num_tokens = chunk.end
        if self.prefill_chunk is not None:
            whole = sequence.num_prompt_tokens // self.prefill_chunk * self.prefill_chunk
            num_tokens = min(num_tokens, whole)
        self.block_manager.register(sequence, num_tokens)

    def _effective_budget(self, max_num_batched_tokens: int) -> int:
        if self.prefill_chunk is None:
            return max_num_batched_tokens
        return max(max_num_batched_tokens, self.prefill_chunk + self.max_num_seqs_limit)

    def _schedule_decodes(self, batch: ScheduledBatch) -> None:
        for sequence in tuple(self.running):
            if len(batch.decodes) >= self.max_num_batched_tokens:
                return
            if sequence.status is not SequenceStatus.RUNNING or not self._is_decode(sequence):
                continue
            if self._make_room(sequence, batch):
                self._add_chunk(batch.decodes, sequence, 1)

    def _is_decode(self, sequence: Sequence) -> bool:
        # What a constraint allows next follows from ids that the host knows.
        if sequence.is_saturated or (sequence.constraint and sequence.num_unresolved):
            return False
        if self.prefill_chunk is not None:
            return sequence.is_decoding and sequence.num_uncomputed_tokens > 0
        if sequence.wants_prompt_logprobs and not sequence.is_decoding:
            return False
        return sequence.num_uncomputed_tokens == 1 and sequence.num_computed_tokens > 0

    def _make_room(self, sequence: Sequence, batch: ScheduledBatch) -> bool:
        """Preempt from the youngest on until `sequence` can grow; False when it was the victim.

        Decodes are scheduled oldest first, so a victim never has tokens in this batch.
        """
        num_tokens = sequence.num_computed_tokens + 1
        while not self.block_manager.can_grow(sequence, num_tokens):
            victim = self.running[-1]
            self._preempt(victim, batch)
            if victim is sequence:
                return False
        self.block_manager.grow(sequence, num_tokens)
        return True

    def _preempt(self, sequence: Sequence, batch: ScheduledBatch) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.reset_for_recompute()
        self.add(sequence)
        batch.num_preempted += 1
        self.counters.num_preemptions_total += 1

    def _release(self, sequence: Sequence) -> None:
        self.block_manager.release(sequence)
        self._free_slots.append(sequence.slot)

    def _admit(self, batch: ScheduledBatch) -> None:
        # A step that preempts admits nobody: a victim would come back at once, its newest token
        # perhaps still in flight.
        if batch.num_preempted or (self.mode is BatchingMode.STATIC and self.running):
            return
        is_batch_decoding = any(sequence.is_decoding for sequence in self.running)
        budget = self.max_num_batched_tokens - len(batch.decodes)
        pending = sum(self._num_prefill_tokens(sequence) for sequence in self.running)
        while self.waiting and len(self.running) < self.max_num_running:
            if self.mode is not BatchingMode.STATIC and pending >= budget:
                return
            sequence = self.waiting[0]
            if not self._try_allocate(sequence):
                return
            self.waiting.pop(0)
            self._start(sequence)
            batch.admitted.append(sequence)
            pending += self._num_prefill_tokens(sequence)
            self.counters.num_joins_total += is_batch_decoding

    def _try_allocate(self, sequence: Sequence) -> bool:
        manager = self.block_manager
        is_first = sequence.num_preemptions == 0
        # At least one token is computed in any case: its logits are needed.
        limit = sequence.num_tokens - 1
        if self.prefill_chunk is not None:
            limit = sequence.num_prompt_tokens - 1
        prefix = [] if sequence.wants_prompt_logprobs else manager.match_prefix(sequence, limit)
        reserve = manager.num_blocks // 100 if self.running else 0
        if not manager.can_allocate(sequence.num_tokens, prefix, reserve):
            return False
        manager.allocate(sequence, prefix)
        sequence.num_computed_tokens = len(prefix) * manager.block_size
        if is_first:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.counters.num_prompt_tokens_total += sequence.num_prompt_tokens
            self.counters.num_prefix_queries_tokens_total += sequence.num_prompt_tokens
            self.counters.num_prefix_hit_tokens_total += sequence.num_computed_tokens
        return True

    def _start(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self._free_slots.pop()
        insort(self.running, sequence, key=lambda s: s.rank)

    def _num_prefill_tokens(self, sequence: Sequence) -> int:
        if sequence.is_saturated or self._is_decode(sequence):
            return 0
        return sequence.num_uncomputed_tokens

    def _schedule_prefills(self, batch: ScheduledBatch) -> None:
        scheduled = {id(chunk.sequence) for chunk in batch.decodes}
        budget = self.max_num_batched_tokens - len(batch.decodes)
        for sequence in self.running:
            if id(sequence) in scheduled:
                continue
            while length := self._chunk_length(sequence, budget):
                is_partial = sequence.num_computed_tokens + length < sequence.num_prompt_tokens
                self.counters.num_chunked_prefills_total += is_partial
                self._add_chunk(batch.prefills, sequence, length)
                budget -= length

    def _chunk_length(self, sequence: Sequence, budget: int) -> int:
        """Length of the next prefill chunk within `budget`; 0 for none."""
        if sequence.is_saturated or sequence.num_unresolved:
            return 0
        start = sequence.num_computed_tokens
        if self.prefill_chunk is None:
            return max(0, min(sequence.num_uncomputed_tokens, budget))
        if sequence.is_decoding:
            return 0
        end = min(
            (start // self.prefill_chunk + 1) * self.prefill_chunk, sequence.num_prompt_tokens
        )
        return end - start if end - start <= budget else 0

    def _add_chunk(self, chunks: list[ScheduledChunk], sequence: Sequence, length: int) -> None:
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens = end = start + length
        samples = end == sequence.num_tokens and sequence.sampling.max_tokens > 0
        chunks.append(ScheduledChunk(sequence, start, length, samples))
        if samples:
            sequence.append_placeholder()
