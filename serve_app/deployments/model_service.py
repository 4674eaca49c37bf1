"""What a ModelReplica does around its engine, without Ray: admission, streams, health, toggles."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from prometheus_client import Counter

from serve_app.config.load import validate_section
from serve_app.config.schema import AppConfig, BatchingSection, ModelReplicaUserConfig
from serve_app.core.errors import EngineError, ErrorInfo, OverloadedError, XeRayError
from serve_app.core.events import BatchingMode, BatchingOptions, EngineInfo, EngineStats
from serve_app.core.requests import GenerateChunk, GenerateRequest, ReplicaHealth, ReplicaLoad
from serve_app.deployments.continuation_input import end_of, engine_input
from serve_app.deployments.load_news import LoadNews
from serve_app.deployments.relay_sender import RelayLink, RelaySender
from serve_app.deployments.replica_load import LoadMeter, autoscaling_stats
from serve_app.deployments.token_stream import paced
from serve_app.engine.client import EngineClient
from serve_app.engine.token_stream import TokenStream
from serve_app.engine.trace_summary import operator_seconds
from serve_app.observability.energy import EnergyReader
from serve_app.observability.engine_metrics import EngineMetrics
from serve_app.observability.metrics import PREFIX
from serve_app.observability.replica_telemetry import ReplicaTelemetry
from serve_app.observability.tracing import Tracing
from serve_app.text.output import OutputProcessor
from serve_app.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_STATS_TIMEOUT_S = 1.0
_RELOAD_POLL_S = 0.05
_CANARY_IDLE_S = 10.0
"""An engine that has been idle this long proves itself with one token."""
_DEAD_S = 20.0
"""An engine that failed to come back for this long takes its replica out."""

_RELAY_COUNTERS = (
    ("relay_chunks", "Chunks that went to an ingress beside Ray's streams."),
    ("relay_lost_requests", "Requests that a lost connection to their ingress cut off."),
)


class ModelService:
    """One engine and its streams. All calls come from one event loop."""

    def __init__(
        self,
        config: AppConfig,
        client: EngineClient,
        tokenizer: Tokenizer,
        replica_id: str,
        energy: EnergyReader | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._config = config
        self._client = client
        self._tokenizer = tokenizer
        self._replica_id = replica_id
        self._toggles = _initial_toggles(config)
        self._num_streams = 0
        self._load = LoadMeter()
        self._is_draining = False
        self._last_stats = EngineStats()
        self._last_proof_s = time.monotonic()
        self._down_since_s: float | None = None
        self._refused_toggles = ""
        self._metrics = EngineMetrics(client.info.model)
        self._telemetry = ReplicaTelemetry(
            client.info.model, config.cost, self._metrics.registry, energy, tracing
        )
        self._relay = RelaySender(self._interval_s, self._note_progress)
        self._news = LoadNews(replica_id, self._relay.open_links, self.load)
        self._relay_told = (0, 0)
        self._relay_counters = tuple(
            Counter(PREFIX + name, text, registry=self._metrics.registry)
            for name, text in _RELAY_COUNTERS
        )

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
        link = None if request.relay is None else await self._relay.link_to(request.relay)
        submitted_s = time.monotonic()
        processor = OutputProcessor(self._tokenizer, request)
        if (end := end_of(request, self.info.max_model_len)) is not None:
            yield processor.push([end]) or GenerateChunk(error=_no_answer())
            return
        self._num_streams += 1
        stream = None
        span = self._telemetry.trace(request)
        failure = ""
        try:
            stream = self._client.submit(request.request_id, *engine_input(request))
            if link is None or request.relay is None:
                chunks = self._chunks(stream, processor)
            else:
                chunks = self._relayed(stream, processor, link, request.relay.key)
            num_tokens = len(request.prompt_token_ids) - request.num_expected_hit_tokens
            with self._load.sequence(max(1, num_tokens)) as loaded:
                self._news.arrived(request, link)
                async with contextlib.aclosing(chunks):
                    is_first = True
                    async for chunk in chunks:
                        if is_first:
                            loaded.note_first_token()
                            ttft_s = time.monotonic() - submitted_s
                            chunk = replace(chunk, engine_ttft_s=ttft_s, load=self.load())
                            is_first = False
                            self._news.changed()
                            span.first_token(chunk.queue_time_s, chunk.engine_ttft_s)
                        failure = chunk.error.code if chunk.error else ""
                        yield chunk
        except XeRayError as error:
            failure = error.code
            yield GenerateChunk(error=error.info())
        finally:
            self._num_streams -= 1
            self._news.changed()
            span.end(
                len(request.prompt_token_ids),
                processor.num_generated,
                processor.num_cached,
                failure,
            )
            if stream is not None:
                stream.close()

    async def _chunks(
        self, stream: TokenStream, processor: OutputProcessor
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Yield all chunks of a sequence, at the pace of `paced`."""
        async for events in paced(stream, self._interval_s):
            self._note_progress()
            chunk = processor.push(events)
            if chunk is None:
                continue
            yield chunk
            if processor.is_finished:
                return
        yield GenerateChunk(error=_no_answer())

    async def _relayed(
        self, stream: TokenStream, processor: OutputProcessor, link: RelayLink, key: int
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Yield the first chunk; the rest goes over the link, and what cuts it off comes here."""
        chunk = None
        async for events in stream:
            self._note_progress()
            chunk = processor.push(events)
            if chunk is not None:
                break
        if chunk is None or processor.is_finished:
            yield chunk or GenerateChunk(error=_no_answer())
            return
        sequence = self._relay.add(link, key, stream, processor)
        try:
            yield replace(chunk, is_relayed=True)
            error = await sequence.ended
            if error is not None:
                yield GenerateChunk(error=error)
        finally:
            self._relay.remove(sequence)

    def _note_progress(self) -> None:
        self._last_proof_s = time.monotonic()

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

    async def reload(self) -> None:
        """Let the running streams end, then start the engine anew; new ones are refused meanwhile.

        Streams still running after model_replica.graceful_shutdown_timeout_s end with an error.
        """
        if self._is_draining:
            raise OverloadedError("the replica is draining or reloading", code="draining")
        self._is_draining = True
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.model_replica.graceful_shutdown_timeout_s):
                    while self._num_streams:
                        await asyncio.sleep(_RELOAD_POLL_S)
            await self._client.reload()
            self._last_proof_s = time.monotonic()
        finally:
            self._is_draining = False

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
        stats = await self.stats()
        self._metrics.update(stats)
        await asyncio.to_thread(self._telemetry.update, self.health(), stats.step_time_s_total)
        # Read here rather than counted there: the relay's core knows no metrics.
        now = (self._relay.num_sent, self._relay.num_lost)
        for counter, count, told in zip(self._relay_counters, now, self._relay_told, strict=True):
            counter.inc(count - told)
        self._relay_told = now
        return self._metrics.render()

    async def profile(self, num_steps: int, timeout_s: float) -> dict[str, Any]:
        """Trace the next `num_steps` engine steps; their operators' times go to the metrics too.

        The trace stays on this host, in its folder for temporary files. Raises EngineError where
        no step ran within `timeout_s`, OverloadedError while another profile is taken.
        """
        folder = await asyncio.to_thread(tempfile.mkdtemp, prefix="xeray-profile-")
        try:
            figures = await self._client.profile(num_steps, f"{folder}/trace.json", timeout_s)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._metrics.set_operator_seconds(operator_seconds(figures))
        return {
            **figures,
            "replica_id": self._replica_id,
            "host": socket.gethostname(),
            "device": self.info.device_name or self.info.device,
        }

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
            load=self.load(),
            engine=self.info.engine,
            engine_reason=self.info.engine_reason,
        )

    def load(self) -> ReplicaLoad:
        """Return how busy this replica is, without asking the engine."""
        return self._load.load(self._client.last_stats, self.info, self._capacity())

    def autoscaling_stats(self) -> dict[str, float]:
        """Return what the autoscaling policy `engine_load` needs of this replica."""
        return autoscaling_stats(self.load())

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

    def close(self) -> None:
        """Close the relay's connections."""
        self._news.close()
        self._relay.close()

    def state(self) -> dict[str, Any]:
        """Return toggles and counts for /admin/stats and tests."""
        return {
            "replica_id": self._replica_id,
            "num_streams": self._num_streams,
            "is_draining": self._is_draining,
            "toggles": self._toggles.model_dump(),
            "num_relay_lost": self._relay.num_lost,
        }


def _no_answer() -> ErrorInfo:
    return EngineError("the engine ended without an answer").info()


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
