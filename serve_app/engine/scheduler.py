"""Which tokens the next step computes.

One rule: a step hands out a token budget until each sequence's `num_computed_tokens` reaches its
`num_tokens`. Chunked prefill, prefix hits and recomputation after preemption all follow from it.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace

from serve_app.core.errors import ConfigError
from serve_app.core.events import BatchingMode, BatchingOptions
from serve_app.engine.block_manager import BlockManager
from serve_app.engine.row_costs import RowCosts
from serve_app.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from serve_app.engine.sequence import Sequence, SequenceStatus


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
        max_decode_rows: most rows of decodes with their drafts; None is `max_num_seqs`.
        row_costs: what a draft's rows cost; None is an estimate.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefill_chunk: int | None = None,
        max_decode_rows: int | None = None,
        row_costs: RowCosts | None = None,
    ) -> None:
        self.block_manager = block_manager
        self._row_costs = row_costs or RowCosts({})
        self.max_decode_rows = max_decode_rows or max_num_seqs
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
        self._schedule_drafts(batch)
        self.counters.num_scheduled_tokens_total += batch.num_tokens
        self.counters.max_num_running = max(self.counters.max_num_running, len(self.running))
        return batch

    def register_computed(self, chunk: ScheduledChunk, num_accepted: int = 0) -> None:
        """Make the full blocks that `chunk` completed reusable, now that its ids are known.

        `num_accepted` tokens of its draft have held; blocks that the others took are free again.
        """
        sequence = chunk.sequence
        if sequence.status is not SequenceStatus.RUNNING:
            return
        if chunk.draft:
            self.block_manager.shrink(sequence, sequence.num_computed_tokens)
        num_tokens = chunk.end + num_accepted
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
        if sequence.is_saturated or self._waits_for_ids(sequence):
            return False
        if self.prefill_chunk is not None:
            return sequence.is_decoding and sequence.num_uncomputed_tokens > 0
        if sequence.wants_prompt_logprobs and not sequence.is_decoding:
            return False
        return sequence.num_uncomputed_tokens == 1 and sequence.num_computed_tokens > 0

    def _waits_for_ids(self, sequence: Sequence) -> bool:
        """Whether its next step can only be chosen once the step in flight has been read."""
        if not sequence.num_unresolved:
            return False
        # What a constraint allows next follows from known ids, its place from what of a draft held.
        if sequence.constraint or sequence.num_drafted:
            return True
        lookup = sequence.lookup
        return lookup is not None and lookup.is_promising(
            sequence.token_ids, sequence.num_known_tokens
        )

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
            sequence.note_start()
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

    def _schedule_drafts(self, batch: ScheduledBatch) -> None:
        """Give decodes what the step has left: a draft never delays or preempts anybody.

        Rows stay within those that were captured and warmed up, and are shared out evenly; of a
        draft stays what is likely enough to be worth its rows.
        """
        room = self.max_decode_rows - len(batch.decodes)
        room = min(room, self.max_num_batched_tokens - batch.num_tokens)
        drafts: dict[int, tuple[int, ...]] = {}
        for i, chunk in enumerate(batch.decodes):
            if room <= 0:
                break
            share = -(-room // (len(batch.decodes) - i))
            if draft := self._foretold(chunk, share):
                drafts[i] = draft
                room -= len(draft)
        if not drafts:
            return
        num_drafted = sum(map(len, drafts.values()))
        break_even = self._row_costs.break_even(len(batch.decodes), num_drafted)
        for i, draft in drafts.items():
            batch.decodes[i] = self._with_draft(batch.decodes[i], draft, break_even)

    @staticmethod
    def _foretold(chunk: ScheduledChunk, limit: int) -> tuple[int, ...]:
        """Tokens that may follow the one that `chunk` computes."""
        sequence = chunk.sequence
        # With an older step in flight the newest known token is not the chunk's.
        if sequence.lookup is None or not chunk.samples or sequence.num_unresolved != 1:
            return ()
        limit = min(limit, sequence.sampling.max_tokens - sequence.num_output_tokens)
        return sequence.lookup.draft(sequence.token_ids, sequence.num_known_tokens, limit)

    def _with_draft(
        self, chunk: ScheduledChunk, draft: tuple[int, ...], break_even: float
    ) -> ScheduledChunk:
        """`chunk` with as much of `draft` as is worth its rows and has room for its K/V."""
        sequence, manager = chunk.sequence, self.block_manager
        assert sequence.lookup is not None
        length = min(len(draft), sequence.lookup.acceptance.longest(break_even))
        while length and not manager.can_grow(sequence, chunk.end + length):
            length -= 1
        if not length:
            return chunk
        manager.grow(sequence, chunk.end + length)
        sequence.num_drafted = length
        return replace(chunk, draft=draft[:length])

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
