"""The Preprocessor deployment: prompts to token ids on CPU cores of its own, in micro-batches."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from ray import serve

from serve_app.config.load import validate_section
from serve_app.config.schema import AppConfig, PreprocessorUserConfig
from serve_app.core.errors import ConfigError, XeRayError
from serve_app.core.garbage import freeze_started_objects
from serve_app.core.requests import ModelCard, PreparedPrompt, PrepareRequest
from serve_app.deployments.cluster_resources import XEON_CORES
from serve_app.deployments.environment import has_unit_instances
from serve_app.deployments.prompt_preparation import PreparedText, PromptPreparer
from serve_app.deployments.ray_private import raylet_unit_ids
from serve_app.deployments.replica_context import enter_replica, report_failed_start
from serve_app.hardware.affinity import CoreClaim, claim_cores, pin_process
from serve_app.observability.metrics import PREFIX
from serve_app.observability.tracing import REQUEST_ID, follow, make_tracing

logger = logging.getLogger(__name__)

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_MAX_PARALLEL_CALLS = 32  # with micro-batching off each call runs at once


class Preprocessor:
    """Chat template and tokenisation, pinned to cores that this replica alone holds."""

    async def __init__(self, config: AppConfig) -> None:  # type: ignore[misc]
        self.replica_id = enter_replica(config)
        unit_ids = _assigned_cores()
        try:
            self._cores = await asyncio.to_thread(
                _claim_and_pin, config.preprocessor.xeon_cores, unit_ids
            )
            self._preparer = await asyncio.to_thread(PromptPreparer, config.model)
        except ConfigError as error:
            await asyncio.to_thread(report_failed_start, config, error)
            raise
        self._tracing = make_tracing(config.tracing, "preprocessor", instance=self.replica_id)
        self._pool = ThreadPoolExecutor(_MAX_PARALLEL_CALLS, thread_name_prefix="prepare")
        self._toggles = PreprocessorUserConfig()
        self._batch_sizes: Counter[int] = Counter()
        self._registry = CollectorRegistry()
        self._batch_size = Histogram(
            f"{PREFIX}preprocessor_batch_size",
            "Prompts that were prepared together.",
            buckets=_BATCH_BUCKETS,
            registry=self._registry,
        )
        self._apply(PreprocessorUserConfig(micro_batching=config.preprocessor.micro_batching))
        freeze_started_objects()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the toggles of `user_config`; calls in flight go on. Raises ConfigError."""
        self._apply(validate_section(PreprocessorUserConfig, user_config, "user_config"))

    def _apply(self, toggles: PreprocessorUserConfig) -> None:
        batching = toggles.micro_batching
        batcher: Any = self._prepare_in_batch  # the decorator adds the setters
        batcher.set_max_batch_size(batching.max_batch_size)
        batcher.set_batch_wait_timeout_s(batching.batch_wait_timeout_s)
        self._toggles = toggles

    async def prepare(self, request: PrepareRequest) -> PreparedPrompt:
        """Return the prompt's token ids; an error of the input comes back as data."""
        follow({REQUEST_ID: request.request_id, **request.trace_context})
        prepared = await self._traced(request)
        if prepared.error is None:
            logger.debug("prepared: %d prompt tokens", len(prepared.token_ids))
        else:
            logger.debug("refused: %s", prepared.error.code)
        return prepared

    async def _traced(self, request: PrepareRequest) -> PreparedPrompt:
        if not request.trace_context:
            return await self._prepare(request)
        with self._tracing.span("tokenize", request.trace_context) as span:
            prepared = await self._prepare(request)
            span.set({"gen_ai.usage.input_tokens": len(prepared.token_ids)})
            if prepared.error is not None:
                span.fail(prepared.error.code)
        return prepared

    async def _prepare(self, request: PrepareRequest) -> PreparedPrompt:
        if self._toggles.micro_batching.enabled:
            return await self._prepare_in_batch(request)
        # A batch of at most one would run one call after the other: go around it.
        return (await self._run([request]))[0]

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.002)
    async def _prepare_in_batch(self, requests: list[PrepareRequest]) -> list[PreparedPrompt]:
        return await self._run(requests)

    async def _run(self, requests: list[PrepareRequest]) -> list[PreparedPrompt]:
        self._batch_sizes[len(requests)] += 1
        self._batch_size.observe(len(requests))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._preparer.prepare_batch, requests)

    async def detokenize(self, token_ids: tuple[int, ...]) -> PreparedText:
        """Return the ids' text, special tokens included."""
        try:
            return PreparedText(self._preparer.detokenize(token_ids))
        except XeRayError as error:
            return PreparedText(error=error.info())

    async def token_strings(self, token_ids: tuple[int, ...]) -> PreparedText:
        """Return each id's own text in `parts`."""
        try:
            return PreparedText(parts=tuple(self._preparer.token_strings(token_ids)))
        except XeRayError as error:
            return PreparedText(error=error.info())

    async def card(self) -> ModelCard:
        """Return the model's card."""
        return self._preparer.card

    async def state(self) -> dict[str, Any]:
        """Return pid, cores, allowed cpus, toggles and batch sizes so far (size → count)."""
        return {
            "replica_id": self.replica_id,
            "pid": os.getpid(),
            "cpu_ids": self._cores.cpu_ids,
            "affinity": tuple(sorted(os.sched_getaffinity(0))),
            "micro_batching": self._toggles.micro_batching.model_dump(),
            "batch_sizes": dict(self._batch_sizes),
        }

    async def metrics_text(self) -> tuple[str, str]:
        """Return this replica's id and its metrics as Prometheus text."""
        return self.replica_id, generate_latest(self._registry).decode()

    async def check_health(self) -> None:
        """Pass: whoever answers on the event loop can prepare prompts."""

    def __del__(self) -> None:
        # Serve calls this before it ends the process; a constructor that failed has nothing yet.
        if (tracing := getattr(self, "_tracing", None)) is not None:
            tracing.close()


def _assigned_cores() -> list[int]:
    if not has_unit_instances(XEON_CORES, dict(os.environ)):
        return []
    return raylet_unit_ids(XEON_CORES)


def _claim_and_pin(num_cores: int, unit_ids: list[int]) -> CoreClaim:
    claim = claim_cores(num_cores, role="preprocessor", preferred=unit_ids)
    # Before the tokenizer's thread pools start: they size themselves by these.
    os.environ["RAYON_NUM_THREADS"] = str(num_cores)
    os.environ["OMP_NUM_THREADS"] = str(num_cores)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_cores > 1 else "false"
    pin_process(claim.cpu_ids)
    logger.info("pinned to cpus %s", ",".join(map(str, claim.cpu_ids)))
    return claim
