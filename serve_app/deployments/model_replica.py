"""The ModelReplica deployment: one device, one engine process, its streams."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from typing import Any

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError, XeRayError
from serve_app.core.events import EngineInfo, EngineStats
from serve_app.core.garbage import freeze_started_objects
from serve_app.core.requests import GenerateChunk, GenerateRequest, ReplicaHealth
from serve_app.core.sampling import TokenVocabulary
from serve_app.deployments.device_claim import DeviceClaim, claim_device, numbered_resources
from serve_app.deployments.model_service import ModelService
from serve_app.deployments.ray_private import raylet_unit_ids
from serve_app.deployments.replica_context import enter_replica, report_failed_start
from serve_app.engine.client import EngineClient
from serve_app.observability.energy import EnergyReader
from serve_app.observability.tracing import follow, make_tracing
from serve_app.text.token_vocabulary import token_vocabulary
from serve_app.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


class ModelReplica:
    """Claims its card, starts the engine on it, and streams what it generates.

    Constructed means ready: weights loaded, every batch bucket warmed up. `config` is its pool's,
    `application` the whole one that it is part of.
    """

    async def __init__(  # type: ignore[misc]
        self, config: AppConfig, application: AppConfig | None = None
    ) -> None:
        self.replica_id = enter_replica(config)
        self._claim: DeviceClaim | None = None
        self._client: EngineClient | None = None
        self._tracing = make_tracing(config.tracing, "model_replica", instance=self.replica_id)
        assigned = _assigned_units()
        try:
            self._service = await self._start(config, assigned)
        except XeRayError as error:
            await self._release()
            if isinstance(error, ConfigError):
                await asyncio.to_thread(report_failed_start, application or config, error)
            raise
        except BaseException:
            await self._release()
            raise
        freeze_started_objects()

    async def _start(self, config: AppConfig, assigned: dict[str, list[int]]) -> ModelService:
        tokenizer = await asyncio.to_thread(
            load_tokenizer,
            resolve_model(config.model),
            chat_template_override=config.model.chat_template,
        )
        self._claim = await asyncio.to_thread(claim_device, config, assigned)
        logger.info("replica %s holds %s", self.replica_id, self._claim.description)
        vocabulary = await asyncio.to_thread(token_vocabulary, tokenizer)
        self._client = self._make_client(config, self._claim, vocabulary)
        info = await self._client.start()
        logger.info(
            "replica %s is ready: %s on %s, %s",
            self.replica_id,
            info.model,
            info.device,
            info.startup_s,
        )
        service = ModelService(
            config,
            self._client,
            tokenizer,
            self.replica_id,
            _energy_reader(config, self._claim),
            self._tracing,
        )
        await service.apply_toggles()
        return service

    def _make_client(
        self, config: AppConfig, claim: DeviceClaim, vocabulary: TokenVocabulary
    ) -> EngineClient:
        return EngineClient(
            config.model,
            config.engine.model_copy(update={"device": claim.device}),
            env=claim.env,
            pass_fds=claim.pass_fds,
            cpu_ids=claim.cpu_ids,
            vocabulary=vocabulary,
            on_progress=self._log_progress,
        )

    def _log_progress(self, stage: str, seconds: float) -> None:
        logger.info("replica %s: %s took %.2f s", self.replica_id, stage, seconds)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the toggles of `user_config`; running sequences go on."""
        await self._service.reconfigure(user_config)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Stream one sequence; refusals and failures are the last chunk's `error`."""
        follow(request.trace_context)
        chunks = self._service.generate(request)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def check_health(self) -> None:
        """Called by Serve. Raises where the engine makes no progress."""
        await self._service.check_health()

    async def info(self) -> EngineInfo:
        """Return the engine's facts, capabilities included."""
        return self._service.info

    async def health(self) -> ReplicaHealth:
        """Return this replica's state."""
        return self._service.health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: what its autoscaling policy gets as `aggregated_metrics`."""
        return self._service.autoscaling_stats()

    async def stats(self) -> EngineStats:
        """Return the engine's counters and gauges."""
        return await self._service.stats()

    async def metrics_text(self) -> tuple[str, str]:
        """Return this replica's id and its metrics as Prometheus text."""
        return self.replica_id, await self._service.metrics_text()

    async def profile(self, num_steps: int, timeout_s: float) -> dict[str, Any]:
        """Trace the next engine steps into a file on this host; see `ModelService.profile`."""
        return await self._service.profile(num_steps, timeout_s)

    async def state(self) -> dict[str, Any]:
        """Return pid, device, cards and toggles."""
        claim = self._claim
        return {
            **self._service.state(),
            "pid": os.getpid(),
            "device": claim.device if claim else "",
            "card_indices": claim.card_indices if claim else (),
            "engine_pid": self._client.pid if self._client else None,
        }

    async def reload(self, replica_id: str) -> str | None:
        """Load the model's files anew if this is the replica that is meant; returns its id then."""
        if replica_id != self.replica_id:
            return None
        await self._service.reload()
        return self.replica_id

    async def drain(self) -> None:
        """Refuse new requests from now on; running ones finish."""
        self._service.drain()

    async def _release(self) -> None:
        if self._client is not None:
            await self._client.close()
        if self._claim is not None:
            self._claim.release()
        await asyncio.to_thread(self._tracing.close)

    async def __del__(self) -> None:
        # Serve awaits this once the last stream has ended, before it ends the process.
        await self._release()


def _energy_reader(config: AppConfig, claim: DeviceClaim) -> EnergyReader:
    """Return what reads the energy of the claim's cards, or of its share of the host's cpus."""
    kind = config.model_replica.pool
    names = tuple(f"{kind}-{index}" for index in claim.card_indices)
    num_cpus = os.cpu_count() or 1
    share = 1.0 if claim.cpu_ids is None else len(claim.cpu_ids) / num_cpus
    return EnergyReader(names, min(1.0, share))


def _assigned_units() -> dict[str, list[int]]:
    """Return the card numbers that the raylet gave this replica, by resource."""
    assigned = {name: raylet_unit_ids(name) for name in numbered_resources()}
    assigned["GPU"] = raylet_unit_ids("GPU")
    return {name: ids for name, ids in assigned.items() if ids}
