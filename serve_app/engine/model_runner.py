"""Runs a scheduled batch on the device: inputs, forward, sampling; captured where it can be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from serve_app.core.errors import ConfigError
from serve_app.core.sampling import SamplingParams
from serve_app.engine.block_tables import BlockTables
from serve_app.engine.constraint import new_rows
from serve_app.engine.graphs import StepGraphs
from serve_app.engine.sampler import (
    DraftHistory,
    Sampler,
    SamplerOutput,
    SamplingPlan,
    compute_logprobs,
    unpack_mask,
)
from serve_app.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from serve_app.engine.sequence import Sequence, SequenceStatus
from serve_app.engine.step_inputs import InputPacker, StepInputs, StepShape
from serve_app.engine.step_output import LogprobTensors, StepOutput, sampler_logprobs, to_host
from serve_app.engine.transfers import Uploads
from serve_app.models.interface import CausalLM
from serve_app.models.kernels._triton import has_kernel

_PROMPT_LOGPROBS_ROWS = 256
_SMALLEST_CONTEXT = 256
_CHECKED_TOKENS = 64
_TIMED_STEPS = 3


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Sizes of a ModelRunner; `num_blocks` does not count the scratch block.

    max_decode_rows: most rows of decodes and their drafts; at least `max_num_seqs`.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    batch_invariant: bool = False
    max_decode_rows: int = 0


def batch_buckets(max_rows: int) -> list[int]:
    """Padded numbers of decode rows: 1, 2, 4, 8, then steps of 8 to 64, 16 to 256, 32 beyond."""
    buckets = [1, 2, 4, 8]
    while buckets[-1] < max_rows:
        last = buckets[-1]
        buckets.append(last + (8 if last < 64 else 16 if last < 256 else 32))
    return sorted({min(bucket, max_rows) for bucket in buckets})


def context_buckets(max_model_len: int) -> list[int]:
    """Padded context lengths of captured decode steps: powers of two up to `max_model_len`."""
    buckets = [min(_SMALLEST_CONTEXT, max_model_len)]
    while buckets[-1] < max_model_len:
        buckets.append(min(2 * buckets[-1], max_model_len))
    return buckets


@dataclass(slots=True)
class _CapturedDecode:
    """A decode step over static buffers: `forward` yields logits, `samplers` ids, per plan."""

    inputs: StepInputs
    forward: Callable[[], torch.Tensor]
    logits: torch.Tensor
    samplers: dict[SamplingPlan, Callable[[], torch.Tensor]]


class ModelRunner:
    """Owns the KV cache, the sampler's tables and the static buffers; steps run as queued.

    `run` only queues work; `StepOutput.wait` is where the host meets the device. Forward and
    sampler are captured apart, so that a mask made on the host can come between them.
    """

    def __init__(self, network: CausalLM, config: RunnerConfig, graphs: StepGraphs) -> None:
        self.network = network
        self.config = config
        self.device = network.device
        self._uploads = Uploads(network.device)
        self.kv_cache = network.allocate_kv_cache(config.num_blocks + 1, config.block_size)
        self.sampler = Sampler(network.vocab_size, config.max_num_seqs, self.device)
        self._packer = InputPacker(config.block_size, self.sampler.scratch_slot)
        self._graphs = graphs
        self.is_replaying = graphs.is_capturing
        self._captured: dict[tuple[int, int], _CapturedDecode] = {}
        self._batch_buckets = batch_buckets(max(config.max_num_seqs, config.max_decode_rows))
        # Attention on the CPU groups rows by their own length; elsewhere one length holds for all
        # rows, and must not depend on who else is in the batch.
        self._has_fixed_context = config.batch_invariant and self.device.type != "cpu"
        # The paged kernel reads each row's own length: one captured step serves every context.
        is_paged = has_kernel("paged_decode", self.kv_cache)
        self._context_buckets = (
            [config.max_model_len]
            if self._has_fixed_context or is_paged
            else context_buckets(config.max_model_len)
        )
        self._tables: BlockTables | None = None
        if graphs.is_capturing:
            width = self._packer.num_blocks(config.max_model_len)
            num_slots = self.sampler.scratch_slot + 1
            self._tables = BlockTables(num_slots, width, config.block_size, self.device)

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps were captured; `is_replaying` switches between them and none."""
        return self._graphs.is_capturing

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Queue one step: rows of `batch` computed, K/V written, next tokens sampled."""
        for sequence in batch.admitted:
            self.sampler.load(sequence)
            if self._tables is not None:
                blocks = torch.tensor(sequence.block_table, dtype=torch.int64)
                self._tables.load(sequence.slot, self._to_device(blocks))
        plan = SamplingPlan.of([chunk.sequence for chunk in batch.chunks if chunk.samples])
        if self.is_replaying and not batch.prefills:
            return self._queue_read(batch, self._run_captured(batch, plan), [])
        return self._queue_read(batch, *self._run_eager(batch, plan))

    @torch.inference_mode()
    def count_accepted(self, sequence: Sequence, token_ids: SequenceOf[int]) -> None:
        """Count for penalties what a draft's step has yielded; other steps count by themselves."""
        if sequence.status is SequenceStatus.RUNNING and sequence.sampling.has_penalties:
            self.sampler.count(sequence.slot, token_ids)

    @torch.inference_mode()
    def warm_up(self) -> Iterator[str]:
        """Run, and where possible capture, every decode bucket; yields a name for each."""
        contexts = self._context_buckets if self._graphs.is_capturing else [1]
        for num_decodes in reversed(self._batch_buckets):
            for context_len in reversed(contexts):
                self.run_dummy_decodes(num_decodes, context_len)
            yield f"decode batch {num_decodes}"

    def run_dummy_decodes(self, num_decodes: int, context_len: int = 1) -> None:
        """Run decode rows over blocks that nobody holds, greedy and then random, and wait."""
        for temperature in (0.0, 1.0):
            self.run(self._dummy_decodes(num_decodes, context_len, temperature)).wait()

    def time_decodes(self) -> dict[int, float]:
        """Seconds of a short greedy step for each padded number of rows: the best of a few."""
        seconds = {}
        for num_decodes in self._batch_buckets:
            batch = self._dummy_decodes(num_decodes, 1, temperature=0.0)
            self.run(batch).wait()
            batch.admitted.clear()  # their parameters are in the sampler's tables now
            times = []
            for _ in range(_TIMED_STEPS):
                started = time.perf_counter()
                self.run(batch).wait()
                times.append(time.perf_counter() - started)
            seconds[num_decodes] = min(times)
        return seconds

    def _dummy_decodes(
        self, num_decodes: int, context_len: int, temperature: float
    ) -> ScheduledBatch:
        params = SamplingParams(temperature=temperature, seed=0)
        batch = ScheduledBatch()
        for i in range(num_decodes):
            slot = min(i, self.config.max_num_seqs - 1)
            sequence = self._dummy_sequence(context_len, params, slot)
            batch.decodes.append(ScheduledChunk(sequence, context_len - 1, 1, samples=True))
            batch.admitted.append(sequence)
        return batch

    def run_dummy_prefill(self, num_tokens: int, longest: int) -> None:
        """Run prefill chunks of at most `longest`, `num_tokens` in all, and wait."""
        batch = ScheduledBatch()
        for start in range(0, num_tokens, longest):
            length = min(longest, num_tokens - start)
            slot = min(len(batch.prefills), self.config.max_num_seqs - 1)
            sequence = self._dummy_sequence(length, SamplingParams(temperature=0.0), slot)
            batch.prefills.append(ScheduledChunk(sequence, 0, length, samples=slot == 0))
            batch.admitted.append(sequence)
        self.run(batch).wait()

    @torch.inference_mode()
    def check_finite(self) -> None:
        """Raise ConfigError where logits of a few different tokens are not all finite numbers."""
        num_tokens = min(_CHECKED_TOKENS, self.config.max_model_len)
        sequence = self._dummy_sequence(num_tokens, SamplingParams(temperature=0.0), slot=0)
        vocab_size = self.network.vocab_size
        sequence.token_ids[:] = [i * vocab_size // num_tokens for i in range(num_tokens)]
        batch = ScheduledBatch()
        batch.prefills.append(ScheduledChunk(sequence, 0, num_tokens, samples=False))
        shape = self._packer.shape_of(batch, 0, width=0)
        inputs = StepInputs.over(self._to_device(self._packer.pack(batch, shape)), shape)
        logits = self.network.compute_logits(self._forward(inputs, batch.prefills, 1))
        if not bool(torch.isfinite(logits).all()):
            raise ConfigError(
                "model.path: the model computes logits that are no finite numbers: its weights are"
                " damaged, were left out when it was quantized, or overflow engine.dtype; convert"
                " it again, or set engine.dtype: bfloat16",
                param="model.path",
            )

    def _dummy_sequence(self, num_tokens: int, params: SamplingParams, slot: int) -> Sequence:
        sequence = Sequence("warm-up", [0] * num_tokens, params, arrival=slot)
        sequence.slot = slot
        num_blocks = self._packer.num_blocks(num_tokens)
        sequence.block_table = [1 + i % self.config.num_blocks for i in range(num_blocks)]
        return sequence

    def _run_eager(
        self, batch: ScheduledBatch, plan: SamplingPlan
    ) -> tuple[SamplerOutput, list[tuple[ScheduledChunk, LogprobTensors]]]:
        num_decodes = batch.num_decode_rows
        max_context_len = max((chunk.context_len for chunk in batch.decodes), default=1)
        if self._has_fixed_context:
            max_context_len = self.config.max_model_len
        width = 0 if self._tables else self._packer.num_blocks(max_context_len)
        shape = self._packer.shape_of(batch, num_decodes, width)
        inputs = StepInputs.over(self._to_device(self._packer.pack(batch, shape)), shape)
        hidden = self._forward(inputs, batch.prefills, max_context_len)
        prompt_logprobs = list(self._prompt_logprobs(batch, hidden))
        if shape.num_samples == 0:
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            return SamplerOutput(nothing), prompt_logprobs
        logits = self.network.compute_logits(hidden[inputs.sample_rows])
        mask, history = self._allowed_mask(batch, shape), self._draft_history(batch, shape)
        return self._sample(inputs, logits, plan, mask, history), prompt_logprobs

    def _run_captured(self, batch: ScheduledBatch, plan: SamplingPlan) -> SamplerOutput:
        num_decodes = next(b for b in self._batch_buckets if b >= batch.num_decode_rows)
        max_context_len = max(chunk.context_len for chunk in batch.decodes)
        context_len = next(c for c in self._context_buckets if c >= max_context_len)
        captured = self._captured.get((num_decodes, context_len))
        if captured is None:
            captured = self._capture(num_decodes, context_len)
            self._captured[num_decodes, context_len] = captured
        inputs = captured.inputs
        inputs.packed.copy_(self._uploads.send(self._packer.pack(batch, inputs.shape)))
        captured.forward()
        mask = self._allowed_mask(batch, inputs.shape)
        if mask is not None or not self._is_capturable(plan):
            history = self._draft_history(batch, inputs.shape)
            return self._sample(inputs, captured.logits, plan, mask, history)
        sample = captured.samplers.get(plan)
        if sample is None:
            sample = self._graphs.capture(
                lambda: self._sample(inputs, captured.logits, plan).token_ids
            )
            captured.samplers[plan] = sample
            # Capturing ran the sampler on the side, but tokens are a function of (seed, position).
        return SamplerOutput(sample())

    def _capture(self, num_decodes: int, context_len: int) -> _CapturedDecode:
        shape = StepShape(num_decodes, width=0, num_samples=num_decodes)
        idle = self._packer.pack(ScheduledBatch(), shape)
        inputs = StepInputs.over(self._to_device(idle), shape)
        forward = self._graphs.capture(
            lambda: self.network.compute_logits(self._forward(inputs, [], context_len))
        )
        return _CapturedDecode(inputs, forward, forward(), {})

    @staticmethod
    def _is_capturable(plan: SamplingPlan) -> bool:
        # Penalties count tokens, and lazily made tables may move: these parts run uncaptured.
        is_stateful = plan.has_penalties or plan.has_bias or plan.has_min_tokens
        return not is_stateful and plan.num_logprobs is None

    def _forward(
        self, inputs: StepInputs, prefills: list[ScheduledChunk], max_context_len: int
    ) -> torch.Tensor:
        token_ids = inputs.token_ids
        num_decodes = inputs.shape.num_decodes
        newest = self.sampler.last_token_ids[inputs.decode_slots]
        if num_decodes == inputs.shape.num_rows:
            token_ids = torch.where(token_ids < 0, newest, token_ids)
        elif num_decodes:
            decode_ids = torch.where(token_ids[:num_decodes] < 0, newest, token_ids[:num_decodes])
            token_ids = torch.cat([decode_ids, token_ids[num_decodes:]])
        metadata = self._packer.metadata(
            inputs, prefills, max_context_len, self.config.batch_invariant, self._tables
        )
        return self.network.forward(token_ids, inputs.positions, self.kv_cache, metadata)

    def _sample(
        self,
        inputs: StepInputs,
        logits: torch.Tensor,
        plan: SamplingPlan,
        allowed_mask: torch.Tensor | None = None,
        history: DraftHistory | None = None,
    ) -> SamplerOutput:
        slots, positions = inputs.sample_slots, inputs.sample_positions
        return self.sampler.sample(logits, slots, positions, plan, allowed_mask, history)

    def _allowed_mask(self, batch: ScheduledBatch, shape: StepShape) -> torch.Tensor | None:
        """Bool [S, V] of what constraints allow, made while the forward pass runs; None: all."""
        sampled = [(row, chunk) for row, chunk in batch.decode_rows() if chunk.samples]
        finished = (chunk for chunk in batch.prefills if chunk.samples)
        sampled += enumerate(finished, start=shape.num_decodes)
        if not any(chunk.sequence.constraint for _, chunk in sampled):
            return None
        rows = new_rows(shape.num_samples, self.sampler.vocab_size)
        is_restricted = False
        for row, chunk in sampled:
            constraint = chunk.sequence.constraint
            if constraint is not None:
                constraint.advance(chunk.sequence.output_token_ids)
                own = rows[row : row + 1 + len(chunk.draft)]
                is_restricted |= constraint.fill_rows(own, chunk.draft)
        if not is_restricted:
            return None
        packed = self._to_device(torch.from_numpy(rows))
        return unpack_mask(packed, self.sampler.vocab_size)

    def _draft_history(self, batch: ScheduledBatch, shape: StepShape) -> DraftHistory | None:
        """What penalties count of the drafts; None where no drafted sequence has penalties."""
        rows: list[int] = []
        token_ids: list[int] = []
        slots = [self.sampler.scratch_slot] * shape.num_samples
        for row, chunk in batch.decode_rows():
            has_penalties = chunk.sequence.sampling.has_penalties
            if has_penalties and chunk.samples and not chunk.draft:
                slots[row] = chunk.sequence.slot
            if has_penalties:
                for length in range(1, 1 + len(chunk.draft)):
                    rows += [row + length] * length
                    token_ids += chunk.draft[:length]
        if not rows:
            return None
        finished = [chunk.sequence.slot for chunk in batch.prefills if chunk.samples]
        slots[shape.num_decodes : shape.num_decodes + len(finished)] = finished
        packed = self._to_device(torch.tensor(rows + token_ids + slots, dtype=torch.int64))
        return DraftHistory(*torch.split(packed, [len(rows), len(rows), len(slots)]))

    def _prompt_logprobs(
        self, batch: ScheduledBatch, hidden: torch.Tensor
    ) -> Iterator[tuple[ScheduledChunk, LogprobTensors]]:
        row = batch.num_decode_rows
        for chunk in batch.prefills:
            sequence, first = chunk.sequence, chunk.start
            last = min(chunk.end, sequence.num_prompt_tokens - 1)
            if sequence.wants_prompt_logprobs and first < last:
                num_top = sequence.sampling.prompt_logprobs or 0
                targets = torch.tensor(sequence.token_ids[first + 1 : last + 1], dtype=torch.int64)
                rows = hidden[row : row + last - first]
                yield chunk, self._score(rows, targets, num_top)
            row += chunk.length

    def _score(self, hidden: torch.Tensor, targets: torch.Tensor, num_top: int) -> LogprobTensors:
        on_device = self._to_device(targets)
        pieces = [
            compute_logprobs(self.network.compute_logits(rows), ids, num_top)
            for rows, ids in zip(
                torch.split(hidden, _PROMPT_LOGPROBS_ROWS),
                torch.split(on_device, _PROMPT_LOGPROBS_ROWS),
                strict=True,
            )
        ]
        chosen, top_ids, top = (to_host(torch.cat(part)) for part in zip(*pieces, strict=True))
        return LogprobTensors(targets, chosen, top_ids, top)

    def _queue_read(
        self,
        batch: ScheduledBatch,
        output: SamplerOutput,
        prompt_logprobs: list[tuple[ScheduledChunk, LogprobTensors]],
    ) -> StepOutput:
        sampled = [(chunk, row) for row, chunk in batch.decode_rows() if chunk.samples]
        finished_prefills = [chunk for chunk in batch.prefills if chunk.samples]
        # With prefills in the batch decode rows are not padded: samples follow them directly.
        first = batch.num_decode_rows
        sampled += [(chunk, first + j) for j, chunk in enumerate(finished_prefills)]
        token_ids = to_host(output.token_ids)
        logprobs = sampler_logprobs(output, token_ids)
        event = None
        if self.device.type != "cpu":
            event = torch.Event(self.device)
            event.record()
        return StepOutput(batch, token_ids, sampled, logprobs, prompt_logprobs, event)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._uploads.send(tensor)
