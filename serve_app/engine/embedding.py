"""The embedding engine: prompts through the network, batched and paged, pooled to one vector each.

It shares the scheduler, the block manager and the step's inputs with the native engine, and has no
sampler: a prompt is done once all its tokens are computed. Prefix hits would leave out hidden
states that a mean needs, so there is no prefix cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch

from serve_app.config.schema import EngineSection
from serve_app.core.errors import EngineError
from serve_app.core.events import (
    BASIC_CAPABILITIES,
    BatchingOptions,
    EngineInfo,
    EngineStats,
    FinishReason,
    TokenEvent,
)
from serve_app.core.sampling import SamplingParams
from serve_app.engine.block_manager import BlockManager
from serve_app.engine.devices import device_name, is_device_lost, release_cached_memory
from serve_app.engine.native import INVARIANT_CHUNK
from serve_app.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import Sequence
from serve_app.engine.sizing import LARGEST_BUDGET, fit_kv_cache, measure_budget
from serve_app.engine.step_counters import StepCounters
from serve_app.engine.step_inputs import InputPacker, StepInputs
from serve_app.engine.transfers import Uploads
from serve_app.engine.validation import check_request
from serve_app.engine.warm_up import Progress
from serve_app.models.embedding_config import EmbeddingConfig
from serve_app.models.interface import LoadedModel

_LOG = logging.getLogger(__name__)
_UNMEASURED_BUDGET = 256
_MAX_FAILED_STEPS = 3
_EMBED_ONLY = replace(BASIC_CAPABILITIES, generation=False, embeddings=True, tools=False)


class EmbeddingEngine:
    """An `Engine` whose sequences end with a vector instead of tokens.

    Args:
        model: the network on its device.
        section: limits and toggles.
        config: pooling and normalisation.
        max_model_len: longest prompt; None is what the model was made for.
        load_s: seconds that loading took, for `info.startup_s`.
        on_progress: told the name of each stage of the warm-up.
    """

    def __init__(
        self,
        model: LoadedModel,
        section: EngineSection,
        config: EmbeddingConfig,
        *,
        max_model_len: int | None = None,
        load_s: float = 0.0,
        on_progress: Progress = lambda stage: None,
    ) -> None:
        self._network = network = model.network
        self._config = config
        block_size = section.block_size
        wanted_len = min(max_model_len or network.max_position, network.max_position)
        num_blocks = fit_kv_cache(network, section, wanted_len)
        self._max_model_len = min(wanted_len, num_blocks * block_size)
        self._is_invariant = section.batch_invariant
        chunk = max(INVARIANT_CHUNK, block_size) if self._is_invariant else None
        self._longest = min(chunk or LARGEST_BUDGET, self._max_model_len)
        self._cache = network.allocate_kv_cache(num_blocks + 1, block_size)
        self._packer = InputPacker(block_size, scratch_slot=section.max_num_seqs)
        self._uploads = Uploads(network.device)
        self._blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=False)
        started = time.perf_counter()
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=section.max_num_seqs,
            max_num_batched_tokens=self._warm_up(section, num_blocks, on_progress),
            prefill_chunk=chunk,
        )
        self._sequences: dict[str, Sequence] = {}
        self._pooled: dict[str, torch.Tensor] = {}
        self._events: list[TokenEvent] = []
        self._counters = StepCounters(model.read_bytes, network.kv_spec.bytes_per_token)
        self._num_arrived = 0
        self._is_paused = False
        self._dead: EngineError | None = None
        startup_s = {"load_s": load_s, "warmup_s": time.perf_counter() - started}
        self._info = self._describe(model, section, num_blocks, startup_s)

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._info

    def submit(
        self, request_id: str, prompt_token_ids: SequenceOf[int], sampling: SamplingParams
    ) -> None:
        """Queue a prompt. Raises ClientError as `check_request` does."""
        check_request(self._info, prompt_token_ids, sampling)
        assert request_id not in self._sequences, f"request {request_id} runs already"
        # As if its log-probabilities were wanted: no token is left to a decode row.
        whole = replace(sampling, max_tokens=0, prompt_logprobs=0)
        sequence = Sequence(request_id, prompt_token_ids, whole, self._num_arrived)
        self._num_arrived += 1
        self._sequences[request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a prompt: its blocks are free at once, its last event comes with the next step."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._counters.num_aborted += 1
            self._end(sequence, TokenEvent(request_id, finish_reason=FinishReason.ABORTED))

    def configure(self, batching: BatchingOptions) -> None:
        """Change the toggles from the next step on. Raises ConfigError beyond the limits."""
        self._scheduler.configure(batching)

    def pause(self) -> None:
        """Stop stepping; prompts keep their place."""
        self._is_paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._is_paused = False

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        if self._events or self._dead:
            return True
        return not self._is_paused and self._scheduler.has_work()

    def step(self) -> list[TokenEvent]:
        """Run one step. Raises EngineError once the device is lost."""
        if self._dead is not None:
            raise self._dead
        if not self._is_paused:
            started = time.perf_counter()
            batch = self._scheduler.schedule()
            self._run(batch)
            self._counters.count_step(batch, time.perf_counter() - started)
        events, self._events = self._events, []
        return events

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        return self._counters.stats(self._scheduler, is_paused=self._is_paused)

    def check_integrity(self) -> None:
        """Prove that each block is free or held by a live prompt, else AssertionError."""
        self._blocks.check_integrity(self._scheduler.running)

    def close(self) -> None:
        """Drop the network, the cache and all prompts."""
        self._sequences.clear()
        self._pooled.clear()
        self._counters.forget_network()
        del self._network, self._cache

    def _run(self, batch: ScheduledBatch) -> None:
        if not batch:
            return
        try:
            self._pool(batch, self._forward(batch))
            self._counters.num_failed_in_a_row = 0
        except torch.OutOfMemoryError as error:
            self._shed(batch, error)
        except Exception as error:
            self._fail(batch, error)

    @torch.inference_mode()
    def _forward(self, batch: ScheduledBatch) -> torch.Tensor:
        """Return the hidden states [T, size] of the batch's chunks; their K/V are written."""
        shape = self._packer.shape_of(batch, 0, width=0)
        inputs = StepInputs.over(self._uploads.send(self._packer.pack(batch, shape)), shape)
        metadata = self._packer.metadata(inputs, batch.prefills, 1, self._is_invariant)
        return self._network.forward(inputs.token_ids, inputs.positions, self._cache, metadata)

    @torch.inference_mode()
    def _pool(self, batch: ScheduledBatch, hidden: torch.Tensor) -> None:
        """Add each chunk's states to its prompt's vector; end the prompts that are complete."""
        row = 0
        done: list[Sequence] = []
        for chunk in batch.prefills:
            self._add(chunk, hidden[row : row + chunk.length].float())
            row += chunk.length
            if chunk.end == chunk.sequence.num_prompt_tokens:
                done.append(chunk.sequence)
        if not done:
            return
        vectors = torch.stack([self._finished_vector(sequence) for sequence in done])
        if self._config.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        host = vectors.cpu()  # the one place where the host waits for the device
        is_finite = torch.isfinite(host).all(-1).tolist()
        for sequence, vector, is_sound in zip(done, host, is_finite, strict=True):
            self._end(sequence, _result(sequence, vector, is_sound))

    def _add(self, chunk: ScheduledChunk, states: torch.Tensor) -> None:
        """Take the states [n, size] of a chunk into its prompt's vector, float32 [size]."""
        request_id, pooling = chunk.sequence.request_id, self._config.pooling
        if pooling == "last":
            self._pooled[request_id] = states[-1].clone()  # not a view that keeps all the states
        elif pooling == "mean":
            total = states.sum(0)
            # A prompt that was set back begins anew.
            self._pooled[request_id] = self._pooled[request_id] + total if chunk.start else total
        elif chunk.start == 0:
            self._pooled[request_id] = states[0].clone()

    def _finished_vector(self, sequence: Sequence) -> torch.Tensor:
        vector = self._pooled[sequence.request_id]
        return vector / sequence.num_prompt_tokens if self._config.pooling == "mean" else vector

    def _end(self, sequence: Sequence, event: TokenEvent) -> None:
        """Take the prompt out, free its blocks and tell how it ended."""
        self._scheduler.finish(sequence)
        sequence.finish_reason = event.finish_reason
        self._pooled.pop(sequence.request_id, None)
        del self._sequences[sequence.request_id]
        self._events.append(event)

    def _shed(self, batch: ScheduledBatch, error: Exception) -> None:
        """End the step's youngest prompt for lack of memory; the others are computed again."""
        _LOG.error("a step of %d prompts needs more memory", len(batch.chunks), exc_info=error)
        release_cached_memory(self._network.device)
        alive = {chunk.sequence.request_id: chunk.sequence for chunk in batch.chunks}
        youngest = max(alive.values(), key=lambda sequence: sequence.rank)
        for sequence in alive.values():
            if sequence is not youngest:
                self._scheduler.retry(sequence)
        self._counters.num_shed += 1
        self._fail_one(youngest, "the device is out of memory for this request; try again later")

    def _fail(self, batch: ScheduledBatch, error: Exception) -> None:
        """End the step's prompts with an error; the engine goes on unless the device is lost."""
        _LOG.error("a step of %d prompts failed", len(batch.chunks), exc_info=error)
        self._counters.num_failed_in_a_row += 1
        has_failed_often = self._counters.num_failed_in_a_row >= _MAX_FAILED_STEPS
        is_lost = has_failed_often or is_device_lost(self._network.device)
        affected = {chunk.sequence.request_id: chunk.sequence for chunk in batch.chunks}
        for sequence in list((self._sequences if is_lost else affected).values()):
            if not sequence.is_finished:
                name = type(error).__name__
                self._fail_one(sequence, f"the engine failed on this request ({name})")
        if is_lost:
            self._dead = EngineError(f"the device no longer answers ({type(error).__name__})")

    def _fail_one(self, sequence: Sequence, why: str) -> None:
        info = EngineError(why).info()
        event = TokenEvent(sequence.request_id, finish_reason=FinishReason.ERROR, error=info)
        self._end(sequence, event)

    def _warm_up(self, section: EngineSection, num_blocks: int, on_progress: Progress) -> int:
        """Run prompts once; return the token budget: given, measured, or a default."""
        given = section.max_num_batched_tokens
        if not section.warmup:
            return given or _UNMEASURED_BUDGET
        on_progress("token budget")

        def run(num_tokens: int) -> None:
            self._run_dummy(num_tokens, num_blocks)

        if given is not None:
            run(given)
            return given
        return measure_budget(run, largest=LARGEST_BUDGET, decode_step_s=0.0)

    def _run_dummy(self, num_tokens: int, num_blocks: int) -> None:
        """Run prompts of at most `_longest` tokens over blocks that nobody holds, and wait."""
        batch = ScheduledBatch()
        for start in range(0, num_tokens, self._longest):
            length = min(self._longest, num_tokens - start)
            sequence = Sequence("warm-up", [0] * length, SamplingParams(), arrival=start)
            blocks = self._packer.num_blocks(length)
            sequence.block_table = [1 + place % num_blocks for place in range(blocks)]
            batch.prefills.append(ScheduledChunk(sequence, 0, length, samples=False))
        self._forward(batch)[-1].cpu()

    def _describe(
        self,
        model: LoadedModel,
        section: EngineSection,
        num_blocks: int,
        startup_s: dict[str, float],
    ) -> EngineInfo:
        network = model.network
        block_bytes = section.block_size * network.kv_spec.bytes_per_token
        return EngineInfo(
            engine="embedding",
            model=model.name,
            device=str(network.device),
            device_name=device_name(network.device),
            dtype=str(model.dtype).removeprefix("torch."),
            vocab_size=network.vocab_size,
            max_model_len=self._max_model_len,
            max_num_seqs=section.max_num_seqs,
            max_num_batched_tokens=self._scheduler.max_num_batched_tokens,
            block_size=section.block_size,
            num_blocks=num_blocks,
            capabilities=replace(_EMBED_ONLY, batch_invariant=section.batch_invariant),
            startup_s=startup_s,
            weights_bytes=model.weights_bytes,
            kv_cache_bytes=(num_blocks + 1) * block_bytes,
            details={
                "architecture": model.architecture,
                "weight_format": model.weight_format,
                "num_threads": str(torch.get_num_threads()),
                "pooling": self._config.pooling,
                "normalize": str(self._config.normalize).lower(),
            },
        )


def _result(sequence: Sequence, vector: torch.Tensor, is_sound: bool) -> TokenEvent:
    """Return the event that ends a prompt: its vector, or that this is no vector of numbers."""
    if not is_sound:
        info = EngineError("the model produced non-finite values for this input").info()
        return TokenEvent(sequence.request_id, finish_reason=FinishReason.ERROR, error=info)
    # LENGTH: as much as was asked for. The wire is little-endian, as all our hosts are.
    data = vector.numpy().astype("<f4").tobytes()
    return TokenEvent(sequence.request_id, finish_reason=FinishReason.LENGTH, embedding=data)
