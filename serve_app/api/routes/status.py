"""What the status page shows, as one JSON object; where keys are asked for, for metrics or admin.

Replicas and ingress replicas are those of the whole service; host and cards are those of the host
that happens to answer, since nothing but the exporter reads the others'.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from serve_app import __version__
from serve_app.api.context import ApiContext, context_of
from serve_app.api.errors import json_response
from serve_app.api.protocol.status import (
    CardStatus,
    ErrorStatus,
    HistoryStatus,
    HostStatus,
    ReplicaStatus,
    StatusAnswer,
)
from serve_app.api.routes.service import BACKEND_TIMEOUT_S, service_health
from serve_app.core.requests import ReplicaHealth, ReplicaLoad
from serve_app.hardware.telemetry.sampler import GpuRates, HardwareSampler, HostRates
from serve_app.observability.activity import (
    SLOT_S,
    ActivityReport,
    last_slots,
    merge_reports,
    quantile,
)

HOST_PERIOD_S = 2.0
"""The host is read at most this often, however many pages ask."""


class HostWatch:
    """Reads the host's hardware below `root`, off the event loop."""

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._sampler = HardwareSampler(root, clock)
        self._clock = clock
        self._lock = asyncio.Lock()
        self._last: tuple[float, HostStatus] | None = None

    async def status(self) -> HostStatus:
        """Return the host's state, at most HOST_PERIOD_S old."""
        async with self._lock:
            now_s = self._clock()
            if self._last is None or now_s - self._last[0] >= HOST_PERIOD_S:
                rates = await asyncio.to_thread(self._sampler.sample)
                self._last = (now_s, _host_status(rates))
            return self._last[1]


class StatusRoute:
    """GET /status.json."""

    def __init__(self, host: HostWatch | None = None) -> None:
        self._host = host or HostWatch()

    async def __call__(self, request: Request) -> Response:
        """Answer with everything the page shows."""
        answer = await self._answer(context_of(request))
        return json_response(answer.model_dump(), headers={"Cache-Control": "no-store"})

    async def _answer(self, context: ApiContext) -> StatusAnswer:
        health, reports, host = await asyncio.gather(
            service_health(context), _reports(context), self._host.status()
        )
        activity = merge_reports(reports)
        now_s = time.time()
        return StatusAnswer(
            version=__version__,
            status=health.status,
            models=await _model_names(context),
            now_s=now_s,
            uptime_s=round(time.monotonic() - context.started_s, 1),
            in_flight=activity.num_in_flight,
            max_ongoing_requests=context.admission.max_ongoing_requests * len(reports),
            replicas=[_replica_status(replica) for replica in health.replicas],
            host=host,
            history=_history(activity, now_s),
            errors=[ErrorStatus(**asdict(error)) for error in reversed(activity.errors)],
            served_by=dict(activity.served_by),
        )


async def _reports(context: ApiContext) -> list[ActivityReport]:
    """Return each ingress replica's report; this one's where the others cannot be asked."""
    try:
        async with asyncio.timeout(BACKEND_TIMEOUT_S):
            reports = await context.backend.activity()
    except Exception:
        reports = []
    return reports or [context.metrics.activity.report()]


async def _model_names(context: ApiContext) -> list[str]:
    """Return the served models; none while the backend cannot tell."""
    try:
        async with asyncio.timeout(BACKEND_TIMEOUT_S):
            return [card.id for card in await context.backend.models()]
    except Exception:
        return []


def _replica_status(replica: ReplicaHealth) -> ReplicaStatus:
    load = replica.load or ReplicaLoad()
    return ReplicaStatus(
        replica_id=replica.replica_id,
        state=replica.state,
        detail=replica.detail,
        device=replica.device,
        engine=replica.engine,
        engine_reason=replica.engine_reason,
        last_progress_age_s=round(replica.last_progress_age_s, 1),
        num_streams=load.num_streams,
        max_num_seqs=load.max_num_seqs,
        num_waiting_tokens=load.num_waiting_tokens,
        kv_usage=round(load.num_used_blocks / load.num_blocks, 4) if load.num_blocks else None,
        ttft_p95_s=round(load.ttft_p95_s, 4),
    )


def _history(activity: ActivityReport, now_s: float) -> HistoryStatus:
    slots = last_slots(activity, now_s)
    return HistoryStatus(
        slot_s=SLOT_S,
        ttft_p50_s=[quantile(slot.ttft, 0.5) for slot in slots],
        ttft_p95_s=[quantile(slot.ttft, 0.95) for slot in slots],
        tpot_p50_s=[quantile(slot.tpot, 0.5) for slot in slots],
        tpot_p95_s=[quantile(slot.tpot, 0.95) for slot in slots],
        requests_per_s=[slot.num_finished / SLOT_S for slot in slots],
        tokens_per_s=[slot.num_tokens / SLOT_S for slot in slots],
    )


def _host_status(rates: HostRates) -> HostStatus:
    return HostStatus(
        name=socket.gethostname(),
        cpu_utilization=rates.cpu_utilization,
        memory_total_bytes=rates.reading.memory_total_bytes,
        memory_available_bytes=rates.reading.memory_available_bytes,
        cards=[_card_status(gpu) for gpu in rates.gpus],
    )


def _card_status(gpu: GpuRates) -> CardStatus:
    reading = gpu.reading
    known = list(gpu.engines.values())
    if not known and gpu.utilization is not None:
        known = [gpu.utilization]
    return CardStatus(
        name=gpu.card.name,
        label=gpu.card.lock_name,
        utilization=max(known) if known else None,
        power_w=gpu.power_w,
        temperature_c=max(reading.temperatures_c.values(), default=None),
        memory_used_bytes=gpu.memory_used_bytes,
        memory_total_bytes=gpu.card.memory_bytes,
        throttled_by=sorted({reason for gt in reading.gts for reason in gt.throttle}),
    )
