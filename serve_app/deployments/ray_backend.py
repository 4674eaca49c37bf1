"""The HTTP surface's Backend over Ray Serve handles."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve_app.core.errors import EngineError, XeRayError, error_from_info
from serve_app.core.events import EngineCapabilities, EngineInfo
from serve_app.core.requests import (
    GenerateChunk,
    GenerateRequest,
    ModelCard,
    PreparedPrompt,
    PrepareRequest,
    ServiceHealth,
)
from serve_app.deployments.handles import call_all, call_one
from serve_app.deployments.prompt_preparation import PreparedText
from serve_app.deployments.ray_errors import is_ray_error, to_xeray_error
from serve_app.deployments.replica_monitor import ReplicaMonitor
from serve_app.observability.aggregate import merge_expositions

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
_BACKOFF_S = 0.1
_PREPARE_TIMEOUT_S = 30.0
_INFO_TIMEOUT_S = 5.0
_METRICS_TIMEOUT_S = 2.0
_METRICS_CACHE_S = 1.0
_POLL_S = 1.0


class RayBackend:
    """Preparation and generation through handles; nothing of it is kept when a request ends."""

    def __init__(
        self,
        preprocessor: DeploymentHandle,
        model: DeploymentHandle,
        ingress: DeploymentHandle | None = None,
    ) -> None:
        self._preprocessor = preprocessor
        self._model = model
        self._ingress = ingress
        self._generate = model.options(stream=True).generate
        self._card: ModelCard | None = None
        self._info: EngineInfo | None = None
        self._metrics: tuple[float, str] = (-_METRICS_CACHE_S, "")
        self._metrics_lock = asyncio.Lock()
        self.monitor = ReplicaMonitor(lambda: call_all(model, "health", _INFO_TIMEOUT_S))

    async def models(self) -> list[ModelCard]:
        """Return the one model; its context as the engine really has it, once that is known."""
        if self._card is None:
            self._card = await call_one(
                lambda: self._preprocessor.card.remote(), "preprocessor", _INFO_TIMEOUT_S
            )
        if self._info is not None and self._info.max_model_len < self._card.max_model_len:
            self._card = replace(self._card, max_model_len=self._info.max_model_len)
        return [self._card]

    async def capabilities(self, model_id: str) -> EngineCapabilities:
        """Return what the engine can do. Raises OverloadedError while no replica is up."""
        if self._info is None:
            await self._require_replica()
            self._info = await call_one(
                lambda: self._model.info.remote(), "model replica", _INFO_TIMEOUT_S
            )
        return self._info.capabilities

    async def prepare(self, model_id: str, request: PrepareRequest) -> PreparedPrompt:
        """Return the prompt's token ids, or what was wrong with it as `error`."""
        return await call_one(
            lambda: self._preprocessor.prepare.remote(request), "preprocessor", _PREPARE_TIMEOUT_S
        )

    async def detokenize(self, model_id: str, token_ids: tuple[int, ...]) -> str:
        """Return the ids' text. Raises ClientError on an id out of range."""
        return (await self._text("detokenize", token_ids)).text

    async def token_strings(self, model_id: str, token_ids: tuple[int, ...]) -> list[str]:
        """Return each id's own text. Raises ClientError on an id out of range."""
        return list((await self._text("token_strings", token_ids)).parts)

    async def _text(self, method: str, token_ids: tuple[int, ...]) -> PreparedText:
        call = getattr(self._preprocessor, method)
        result: PreparedText = await call_one(
            lambda: call.remote(token_ids), "preprocessor", _PREPARE_TIMEOUT_S
        )
        if result.error is not None:
            raise error_from_info(result.error)
        return result

    async def generate(
        self, model_id: str, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Stream one sequence; another replica is tried as long as no chunk has gone out.

        Raises XeRayError; closing the generator cancels the call, which aborts the sequence.
        """
        stream, chunk = await self._open(request)
        has_ended = False
        try:
            while True:
                has_ended = chunk.finish_reason is not None or chunk.error is not None
                yield chunk
                if has_ended:
                    return
                chunk = await _next_chunk(stream)
        except XeRayError:
            has_ended = True
            raise
        finally:
            if not has_ended:
                stream.cancel()

    async def _open(
        self, request: GenerateRequest
    ) -> tuple[DeploymentResponseGenerator, GenerateChunk]:
        """Return a stream and its first chunk, which is no error. Raises XeRayError."""
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            await self._require_replica()
            stream = self._generate.remote(request)
            try:
                first = await self._first_chunk(stream)
                if first.error is None:
                    return stream, first
                error = error_from_info(first.error)
            except XeRayError as failure:
                error = failure
            except BaseException:  # the client has gone
                stream.cancel()
                raise
            if not error.is_retryable or attempt == _MAX_ATTEMPTS:
                raise error
            logger.warning("request %s: %s; trying again", request.request_id, error.message)
            await asyncio.sleep(_BACKOFF_S * attempt)
        raise AssertionError("unreachable")

    async def health(self) -> ServiceHealth:
        """Return the replicas' state as last heard, at most a second old."""
        return self.monitor.health()

    async def metrics_text(self) -> str:
        """Return the samples of every replica of every deployment; kept for a second."""
        async with self._metrics_lock:
            if time.monotonic() - self._metrics[0] >= _METRICS_CACHE_S:
                self._metrics = (time.monotonic(), await self._gather_metrics())
        return self._metrics[1]

    async def drain(self) -> None:
        """Take nothing new, on any ingress replica; what runs goes on."""
        self.monitor.is_draining = True
        if self._ingress is not None:
            await call_all(self._ingress, "drain", _INFO_TIMEOUT_S)

    async def _gather_metrics(self) -> str:
        handles = [self._model, self._preprocessor]
        if self._ingress is not None:
            handles.append(self._ingress)
        answers: list[list[Any]] = await asyncio.gather(
            *(call_all(handle, "metrics_text", _METRICS_TIMEOUT_S) for handle in handles)
        )
        return merge_expositions(dict(answer for group in answers for answer in group))

    async def _require_replica(self) -> None:
        """Raise OverloadedError where no model replica is up: Serve's queue would wait."""
        if self.monitor.has_live_replica():
            return
        await self.monitor.refresh()
        if not self.monitor.has_live_replica():
            raise self.monitor.unavailable()

    async def _first_chunk(self, stream: DeploymentResponseGenerator) -> GenerateChunk:
        """Wait for the first chunk, but not for ever for a replica that is gone."""
        waiting = asyncio.ensure_future(_next_chunk(stream))
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=_POLL_S)
                if done:
                    return waiting.result()
                if not self.monitor.has_live_replica():
                    stream.cancel()
                    raise self.monitor.unavailable()
        finally:
            waiting.cancel()


async def _next_chunk(stream: DeploymentResponseGenerator) -> GenerateChunk:
    """Return the stream's next chunk. Raises XeRayError where the replica fails or dies."""
    try:
        chunk: GenerateChunk = await anext(stream)
    except XeRayError:
        raise
    except StopAsyncIteration:
        raise EngineError("the model replica ended without an answer") from None
    except Exception as error:
        if not is_ray_error(error):
            logger.exception("a model replica failed on a request")
        raise to_xeray_error(error, "model replica") from error
    return chunk
