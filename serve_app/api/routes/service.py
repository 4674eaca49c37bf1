"""Health, version and metrics."""

from __future__ import annotations

import asyncio
import logging

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from serve_app import __version__
from serve_app.api.context import ApiContext, context_of
from serve_app.api.errors import error_body, error_info, json_response, retry_headers
from serve_app.api.protocol.service import HealthAnswer, ReplicaEntry, VersionAnswer
from serve_app.core.errors import OverloadedError
from serve_app.core.requests import ServiceHealth
from serve_app.observability.aggregate import merge_expositions

_logger = logging.getLogger(__name__)

BACKEND_TIMEOUT_S = 5.0
METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CODES = {"draining": "draining", "loading": "model_loading"}


async def health(request: Request) -> Response:
    """Answer 200 when a replica can generate, else 503 with the reason."""
    return _health_response(await service_health(context_of(request)))


async def livez(request: Request) -> Response:
    """Answer 200 as long as waiting may help: loading and draining are alive, dead is not."""
    state = await service_health(context_of(request))
    if state.status == "dead":
        return _health_response(state)
    return json_response({"status": "alive"})


async def service_health(context: ApiContext) -> ServiceHealth:
    """Return the replicas' state; a backend that cannot tell within 5 s counts as unreachable."""
    try:
        async with asyncio.timeout(BACKEND_TIMEOUT_S):
            state = await context.backend.health()
    except Exception as error:
        _logger.warning("health: the backend did not answer: %s", type(error).__name__)
        state = ServiceHealth(is_ready=False, status="unreachable")
    if context.admission.is_draining:
        return ServiceHealth(is_ready=False, status="draining", replicas=state.replicas)
    return state


def health_answer(state: ServiceHealth) -> HealthAnswer:
    """Return the state as clients see it."""
    replicas = [
        ReplicaEntry(
            replica_id=replica.replica_id,
            state=replica.state,
            detail=replica.detail,
            device=replica.device,
            last_progress_age_s=round(replica.last_progress_age_s, 3),
        )
        for replica in state.replicas
    ]
    return HealthAnswer(status=state.status, replicas=replicas)


def _health_response(state: ServiceHealth) -> Response:
    answer = health_answer(state).model_dump()
    headers = {"Cache-Control": "no-store"}
    if state.is_ready:
        return json_response(answer, 200, headers)
    error = OverloadedError(
        f"The service is not ready: {state.status}.", code=_CODES.get(state.status, "no_replica")
    )
    info = error_info(error)
    return json_response(answer | error_body(info), 503, headers | retry_headers(info))


async def version(request: Request) -> Response:
    """Tell the version."""
    return json_response(VersionAnswer(version=__version__).model_dump())


async def metrics(request: Request) -> Response:
    """Return this ingress replica's samples and those of every replica that the backend reaches."""
    context = context_of(request)
    state = await service_health(context)
    context.metrics.set_replicas(replica.state for replica in state.replicas)
    texts = {context.metrics.replica_id: context.metrics.render()}
    try:
        async with asyncio.timeout(BACKEND_TIMEOUT_S):
            texts["backend"] = await context.backend.metrics_text()
        merged = merge_expositions(texts)
    except Exception as error:
        # A scrape while replicas come and go still gets what is at hand.
        _logger.warning("metrics: the backend's samples are missing: %s", type(error).__name__)
        texts.pop("backend", None)
        merged = merge_expositions(texts)
    return PlainTextResponse(merged, media_type=METRICS_CONTENT_TYPE)
