"""Adapter over intel-extension-for-pytorch: transformers' `generate()` on an optimised network.

Static batches: those that wait start together, and the next start when the last of them has ended.
The extension has ended with torch 2.8; the engine is for whoever must compare with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from serve_app.config.schema import EngineSection
from serve_app.core.errors import ConfigError, EngineError
from serve_app.core.events import (
    BASIC_CAPABILITIES,
    BatchingMode,
    BatchingOptions,
    EngineInfo,
    EngineStats,
    FinishReason,
    TokenEvent,
)
from serve_app.core.sampling import SamplingParams
from serve_app.engine.adapter_stats import AdapterStats
from serve_app.engine.admission import Admission
from serve_app.engine.devices import device_name
from serve_app.engine.ipex_runtime import import_ipex, module_types, optimize
from serve_app.engine.sizing import choose_num_blocks, free_memory_bytes
from serve_app.engine.static_batch import BatchEnd, BatchStep, Row, StaticBatch
from serve_app.engine.transformers_engine import load_transformers_model
from serve_app.engine.validation import check_request

_LOG = logging.getLogger(__name__)
_STEP_WAIT_S = 0.05
_MAX_FAILED_BATCHES = 3
_CAPABILITIES = replace(BASIC_CAPABILITIES, batching_modes=("static", "off"))


class IpexEngine:
    """Serves a network of transformers that the extension has optimised.

    Args:
        network: the optimised network, on the CPU.
        section: limits; each sequence of a batch has room for `max_model_len` tokens.
        name: the model's name.
        max_model_len: longest prompt + answer asked for; None is what the model was made for.
        optimizer: which of the extension's functions optimised it.
        load_s: seconds that loading and optimising took.
    """

    def __init__(
        self,
        network: Any,
        section: EngineSection,
        *,
        name: str,
        max_model_len: int | None = None,
        optimizer: str = "ipex.llm.optimize",
        load_s: float = 0.0,
    ) -> None:
        self._network = network
        self._info = _describe(network, section, name, max_model_len, optimizer)
        self._admission: Admission[Row] = Admission(self._info.max_num_seqs)
        self._admission.mode = BatchingMode.STATIC
        self._stats = AdapterStats()
        self._events: list[TokenEvent] = []
        self._batch: StaticBatch | None = None
        self._may_run = threading.Event()
        self._may_run.set()
        self._num_failed_in_a_row = 0
        self._dead: EngineError | None = None
        started = time.perf_counter()
        if section.warmup:
            self._warm_up()
        seconds = {"load_s": load_s, "warmup_s": time.perf_counter() - started}
        self._info = replace(self._info, startup_s=seconds)

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._info

    def submit(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        """Queue a request. Raises ClientError as `check_request` does."""
        check_request(self._info, prompt_token_ids, sampling)
        room = self._info.max_model_len - len(prompt_token_ids)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        self._admission.waiting[request_id] = Row(request_id, tuple(prompt_token_ids), sampling)
        self._stats.count(num_prompt_tokens_total=len(prompt_token_ids))

    def abort(self, request_id: str) -> None:
        """End a request; its row stops counting at once and its batch goes on without it."""
        row = self._admission.remove(request_id)
        if row is None:
            return
        row.is_done = True
        self._stats.count(num_aborted_total=1)
        self._events.append(TokenEvent(request_id, finish_reason=FinishReason.ABORTED))

    def configure(self, batching: BatchingOptions) -> None:
        """Change the batching toggles. Raises ConfigError: batches here are static or single."""
        if batching.mode is BatchingMode.CONTINUOUS:
            raise ConfigError(
                "batching.mode: the ipex engine cannot let sequences join a running batch; set"
                " static or off",
                param="batching.mode",
            )
        self._admission.configure(batching)

    def pause(self) -> None:
        """Stop after the token in flight; sequences keep their place."""
        self._may_run.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._may_run.set()

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        if self._events or self._dead:
            return True
        has_any = bool(self._batch or self._admission.waiting or self._admission.running)
        return has_any and self._may_run.is_set()

    def step(self) -> list[TokenEvent]:
        """Start a batch where none runs, and hand out its next tokens; waits at most 50 ms.

        Raises EngineError once batches keep failing and every request had its last event.
        """
        if self._dead is not None:
            raise self._dead
        if self._may_run.is_set():
            if self._batch is None:
                self._start_batch()
            if self._batch is not None:
                self._advance(self._batch)
        events, self._events = self._events, []
        return events

    def stats(self) -> EngineStats:
        """Counters and gauges; blocks as this side sees them: those that running requests fill."""
        lengths = [
            len(row.prompt_token_ids) + row.num_generated
            for row in self._admission.running.values()
        ]
        is_paused = not self._may_run.is_set()
        return self._stats.snapshot(self._admission, self._info, lengths, is_paused=is_paused)

    def close(self) -> None:
        """End the running batch and drop the network."""
        if self._batch is not None:
            self._batch.cancel()
            self._batch = None
        self._admission.running.clear()
        self._admission.waiting.clear()
        self._network = None

    def _start_batch(self) -> None:
        rows = self._admission.admit()
        if rows:
            self._batch = StaticBatch(rows, self._may_run)
            self._batch.start(self._network)

    def _advance(self, batch: StaticBatch) -> None:
        came = batch.take(_STEP_WAIT_S)
        if isinstance(came, BatchStep):
            self._hand_out(batch, came)
            batch.proceed()
        elif isinstance(came, BatchEnd):
            self._batch = None
            self._on_end(batch, came.error)

    def _hand_out(self, batch: StaticBatch, step: BatchStep) -> None:
        num_new = 0
        for row, token_id in zip(batch.rows, step.token_ids, strict=True):
            if row.is_done:
                continue
            num_new += 1
            queue_time_s = None if row.num_generated else row.queue_time_s
            row.num_generated += 1
            is_stop = token_id in row.sampling.stop_token_ids
            event = TokenEvent(row.request_id, (token_id,), queue_time_s=queue_time_s)
            if is_stop or row.num_generated >= row.sampling.max_tokens:
                row.is_done = True
                self._admission.remove(row.request_id)
                reason = FinishReason.STOP if is_stop else FinishReason.LENGTH
                stop_token_id = token_id if is_stop else None
                event = replace(event, finish_reason=reason, stop_token_id=stop_token_id)
            self._events.append(event)
        self._stats.count_step(
            step.seconds,
            num_generation_tokens_total=num_new,
            num_scheduled_tokens_total=num_new,
            weight_bytes_read_total=self._info.weights_bytes,
        )

    def _on_end(self, batch: StaticBatch, error: Exception | None) -> None:
        """Close what a failed `generate()` left open; one that returned early has failed too."""
        left = [row for row in batch.rows if not row.is_done]
        if error is None and not left:
            self._num_failed_in_a_row = 0
            return
        _LOG.error("a batch of %d sequences failed", len(batch.rows), exc_info=error)
        kind = type(error).__name__ if error is not None else "it ended early"
        for row in left:
            self._fail(row, f"the engine failed on this request ({kind})")
        self._num_failed_in_a_row += 1
        if self._num_failed_in_a_row >= _MAX_FAILED_BATCHES:
            for row in list(self._admission.waiting.values()):
                self._fail(row, "the engine died")
            self._dead = EngineError(f"the ipex engine no longer works ({kind})")

    def _fail(self, row: Row, message: str) -> None:
        row.is_done = True
        self._admission.remove(row.request_id)
        info = EngineError(message).info()
        self._events.append(
            TokenEvent(row.request_id, finish_reason=FinishReason.ERROR, error=info)
        )

    def _warm_up(self) -> None:
        self.submit("warm-up", [0], SamplingParams(temperature=0.0, max_tokens=2))
        while self.has_work():
            for event in self.step():
                if event.error is not None:
                    raise EngineError(event.error.message)
        self._admission.max_num_running = 0
        self._stats.reset()


def create_ipex_engine(
    path: Path,
    section: EngineSection,
    *,
    name: str,
    max_model_len: int | None,
    dtype: torch.dtype,
    trust_pickle: bool,
) -> IpexEngine:
    """Load a Hugging Face folder, optimise it and start the engine.

    Raises ConfigError, one line with the fix, where the extension is absent or another torch runs.
    """
    ipex = import_ipex()
    started = time.perf_counter()
    cpu = torch.device("cpu")
    network = load_transformers_model(path, cpu, dtype, trust_pickle=trust_pickle)
    network, optimizer = optimize(ipex, network, dtype)
    return IpexEngine(
        network,
        section,
        name=name,
        max_model_len=max_model_len,
        optimizer=optimizer,
        load_s=time.perf_counter() - started,
    )


def _describe(
    network: Any, section: EngineSection, name: str, max_model_len: int | None, optimizer: str
) -> EngineInfo:
    config = network.config.get_text_config()
    made_for = getattr(config, "max_position_embeddings", None) or 2048
    wanted_len = min(max_model_len or made_for, made_for)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * head_dim * network.dtype.itemsize
    num_blocks = choose_num_blocks(
        kv_cache_tokens=section.kv_cache_tokens,
        memory_fraction=section.kv_cache_memory_fraction,
        free_bytes=free_memory_bytes(torch.device("cpu")),
        bytes_per_token=bytes_per_token,
        block_size=section.block_size,
        max_num_seqs=section.max_num_seqs,
        max_model_len=wanted_len,
    )
    num_tokens = num_blocks * section.block_size
    max_len = min(wanted_len, num_tokens)
    # A cache grows with its batch and is nobody's to preempt: only so many as surely have room.
    max_num_seqs = min(section.max_num_seqs, num_tokens // max_len)
    return EngineInfo(
        engine="ipex",
        model=name,
        device="cpu",
        device_name=device_name(torch.device("cpu")),
        dtype=str(network.dtype).removeprefix("torch."),
        vocab_size=config.vocab_size,
        max_model_len=max_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs * max_len,
        block_size=section.block_size,
        num_blocks=num_blocks,
        capabilities=_CAPABILITIES,
        weights_bytes=sum(p.numel() * p.element_size() for p in network.parameters()),
        kv_cache_bytes=num_tokens * bytes_per_token,
        details={
            "architecture": config.model_type,
            "weight_format": "dense",
            "optimizer": optimizer,
            "module_type": module_types(network),
            "num_threads": str(torch.get_num_threads()),
        },
    )
