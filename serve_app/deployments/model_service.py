"""What a ModelReplica does around its engine, without Ray: admission, streams, health, toggles."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from serve_app.config.load import validate_section
from serve_app.config.schema import AppConfig, BatchingSection, ModelReplicaUserConfig
from serve_app.core.errors import EngineError, ErrorInfo, OverloadedError, XeRayError
from serve_app.core.events import BatchingMode, BatchingOptions, EngineInfo, EngineStats
from serve_app.core.requests import GenerateChunk, GenerateRequest, ReplicaHealth
from serve_app.deployments.token_stream import paced
from serve_app.engine.client import EngineClient
from serve_app.observability.engine_metrics import EngineMetrics
from serve_app.text.output import OutputProcessor
from serve_app.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_STATS_TIMEOUT_S = 1.0
_CANARY_IDLE_S = 10.0
"""An engine that has been idle this long proves itself with one token."""
_DEAD_S = 20.0
"""An engine that failed to come back for this long takes its replica out."""


class ModelService:
    """One engine and its streams. All calls come from one event loop."""

    def __init__(
        self, config: AppConfig, client: EngineClient, tokenizer: Tokenizer, replica_id: str
    ) -> None:
        self._config = config
        self._client = client
        self._tokenizer = tokenizer
        self._replica_id = replica_id
        self._toggles = _initial_toggles(config)
        self._num_streams = 0
        self._is_draining = False
        self._last_stats = EngineStats()
        self._last_proof_s = time.monotonic()
        self._down_since_s: float | None = None
        self._refused_toggles = ""
        self._metrics = EngineMetrics(client.info.model)

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._client.info

    @property
    def num_streams(self) -> int:
        """Requests that are running or waiting here."""
        return self._num_streams

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Stream one sequence; the last chunk has `finish_reason` or `error`. Closing it aborts."""
        refusal = self._refusal()
        if refusal is not None:
            yield GenerateChunk(error=refusal)
            return
        submitted_s = time.monotonic()
        processor = OutputProcessor(self._tokenizer, request)
        self._num_streams += 1
        stream = None
        try:
            stream = self._client.submit(
                request.request_id, request.prompt_token_ids, request.sampling
            )
            is_first = True
            async for events in paced(stream, self._interval_s):
                self._last_proof_s = time.monotonic()
                chunk = processor.push(events)
                if chunk is None:
                    continue
                if is_first:
                    chunk = replace(chunk, engine_ttft_s=time.monotonic() - submitted_s)
                    is_first = False
                yield chunk
                if processor.is_finished:
                    return
            yield GenerateChunk(error=EngineError("the engine ended without an answer").info())
        except XeRayError as error:
            yield GenerateChunk(error=error.info())
        finally:
            self._num_streams -= 1
            if stream is not None:
                stream.close()

    async def apply_toggles(self) -> None:
        """Bring a fresh engine to the config's toggles. Raises ConfigError beyond its limits."""
        if self._toggles.batching != BatchingSection():
            await self._client.configure(_options(self._toggles.batching))

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take over run-time toggles; running sequences go on.

        Toggles that cannot be are refused whole: the old ones stay, the log and `health` say why.
        Raising would make Serve replace a replica that works by one that cannot start.
        """
        try:
            toggles = validate_section(ModelReplicaUserConfig, user_config, "user_config")
            if toggles.batching != self._toggles.batching:
                await self._client.configure(_options(toggles.batching))
        except XeRayError as error:
            self._refused_toggles = f"user_config refused: {error.message}"
            logger.error("%s", self._refused_toggles)
            return
        self._refused_toggles = ""
        if toggles != self._toggles:
            logger.info("toggles are now %s", toggles.model_dump())
        self._toggles = toggles

    def drain(self) -> None:
        """Refuse new requests from now on; running ones finish."""
        self._is_draining = True

    async def stats(self) -> EngineStats:
        """Return the engine's counters; the last known ones where it does not answer in time."""
        with contextlib.suppress(XeRayError, asyncio.TimeoutError):
            async with asyncio.timeout(_STATS_TIMEOUT_S):
                self._last_stats = await self._client.stats()
        return self._last_stats

    async def metrics_text(self) -> str:
        """Return the engine's metrics as Prometheus text."""
        self._metrics.update(await self.stats())
        return self._metrics.render()

    def health(self) -> ReplicaHealth:
        """Return the state of this replica, without asking the engine."""
        state: str = self._client.state
        if state == "ready" and self._is_draining:
            state = "draining"
        return ReplicaHealth(
            replica_id=self._replica_id,
            state=state,
            detail=self._refused_toggles,
            device=self.info.device_name or self.info.device,
            last_progress_age_s=self._client.last_progress_age_s,
        )

    async def check_health(self) -> None:
        """Pass where the engine makes progress, or an idle one answers with a token in time.

        Raises EngineError otherwise; the replica is then replaced. An engine that its watchdog is
        just bringing back counts as healthy: that is quicker than a new replica.
        """
        if self._client.state != "ready":
            self._check_recovery()
            return
        self._down_since_s = None
        if self._num_streams or time.monotonic() - self._last_proof_s < _CANARY_IDLE_S:
            return  # busy: the client's watchdog sees to it
        timeout_s = 0.8 * self._config.model_replica.health_check_timeout_s
        if await self._client.canary(timeout_s):
            self._last_proof_s = time.monotonic()
        elif self._client.state == "ready":
            raise EngineError(f"the idle engine gave no token within {timeout_s:g} s")

    def _check_recovery(self) -> None:
        now = time.monotonic()
        if self._down_since_s is None:
            self._down_since_s = now
        limit_s = self._config.engine.startup_timeout_s
        if self._client.state in ("dead", "stuck"):
            limit_s = _DEAD_S
        if now - self._down_since_s > limit_s:
            raise EngineError(f"the engine is {self._client.state} and did not come back")

    def _refusal(self) -> ErrorInfo | None:
        if self._is_draining:
            return OverloadedError("the replica is draining", code="draining").info()
        state = self._client.state
        if state == "loading":
            return OverloadedError("the model is loading", code="model_loading").info()
        if state != "ready":
            return OverloadedError("the engine is being restarted", code="model_loading").info()
        if self._num_streams >= self._capacity() + self._max_queued_requests():
            return OverloadedError("the replica's queue is full", code="queue_full").info()
        return None

    def _capacity(self) -> int:
        limit = self._toggles.batching.max_num_seqs or self.info.max_num_seqs
        return 1 if self._toggles.batching.mode == "off" else min(limit, self.info.max_num_seqs)

    def _max_queued_requests(self) -> int:
        given = self._toggles.max_queued_requests
        return self._config.model_replica.max_queued_requests if given is None else given

    def _interval_s(self) -> float:
        """Return the gathering time of a stream: the more streams, the fewer messages of each."""
        given_ms = self._toggles.stream_interval_ms
        return (min(100.0, 3.0 * self._num_streams) if given_ms is None else given_ms) / 1000.0

    def state(self) -> dict[str, Any]:
        """Return toggles and counts for /admin/stats and tests."""
        return {
            "replica_id": self._replica_id,
            "num_streams": self._num_streams,
            "is_draining": self._is_draining,
            "toggles": self._toggles.model_dump(),
        }


def _initial_toggles(config: AppConfig) -> ModelReplicaUserConfig:
    section = config.model_replica
    return ModelReplicaUserConfig(
        batching=section.batching,
        max_queued_requests=section.max_queued_requests,
        stream_interval_ms=section.stream_interval_ms,
    )


def _options(batching: BatchingSection) -> BatchingOptions:
    return BatchingOptions(
        BatchingMode(batching.mode), batching.max_num_seqs, batching.max_num_batched_tokens
    )
