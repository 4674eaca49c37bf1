"""The Ingress deployment: the HTTP surface, with Ray handles behind it."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from serve_app.api.app import create_app
from serve_app.config.load import validate_section
from serve_app.config.model_source import resolve_model
from serve_app.config.schema import AppConfig
from serve_app.config.sections_canary import CanarySection, IngressUserConfig
from serve_app.core.errors import ConfigError
from serve_app.core.garbage import freeze_started_objects
from serve_app.deployments.canary import SplitBackend
from serve_app.deployments.canary_backend import canary_backend, retire
from serve_app.deployments.continuation import ContinuationPolicy
from serve_app.deployments.environment import LOOPBACK_VARIABLE
from serve_app.deployments.options import INGRESS
from serve_app.deployments.pools import model_pools
from serve_app.deployments.ray_backend import RayBackend
from serve_app.deployments.replica_context import enter_replica, node_host
from serve_app.observability.activity import ActivityReport
from serve_app.observability.metrics import IngressMetrics
from serve_app.observability.tracing import make_tracing

logger = logging.getLogger(__name__)


@serve.ingress()
class Ingress:
    """Validation, limits, admission and streams; knows the other deployments by their handles."""

    async def __init__(  # type: ignore[misc]
        self, config: AppConfig, preprocessor: DeploymentHandle, *models: DeploymentHandle
    ) -> None:
        self.replica_id = enter_replica(config)
        self._metrics = IngressMetrics(_model_name(config), self.replica_id, config.slo)
        pools = model_pools(config, models, self._metrics.registry)
        self._backend = RayBackend(preprocessor, pools, _own_handle())
        self._backend.continuation = ContinuationPolicy(
            config.ingress.continue_streams, config.ingress.continue_timeout_s
        )
        self._backend.on_retried = self._metrics.count_retry
        self._backend.on_moved = self._metrics.count_moved
        self._backend.on_continued = self._metrics.count_continued
        self._split = SplitBackend(self._backend)
        self._canary_section: CanarySection | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._tracing = make_tracing(config.tracing, "ingress", instance=self.replica_id)
        self._app = create_app(
            self._split,
            config,
            metrics=self._metrics,
            peer_is_client=_peer_tells_of_client(),
            host_echoes_id=True,  # Serve's own middleware does, in each of its modes
            tracing=self._tracing,
        )
        await self._backend.start(node_host())
        freeze_started_objects()

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the canary of `user_config`; requests that run stay where they are.

        One that is not there is left out, which its rollout sees: raising would make Serve replace
        this replica, which serves.
        """
        section = validate_section(IngressUserConfig, user_config or {}, "user_config").canary
        old, before = self._split.canary, self._canary_section
        if section is None:
            self._split.split(None, 0.0)
        elif old is not None and before is not None and _same_place(before, section):
            self._split.split(old, section.percent)
        else:
            canary = await self._start_canary(section)
            self._split.split(canary, 0.0 if canary is None else section.percent)
        self._canary_section = section
        if isinstance(old, RayBackend) and old is not self._split.canary:
            task = asyncio.create_task(retire(self._split, old))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _start_canary(self, section: CanarySection) -> RayBackend | None:
        try:
            canary = canary_backend(section)
        except ConfigError as error:
            logger.error("all requests stay with the old version: %s", error.message)
            return None
        canary.continuation = self._backend.continuation
        canary.on_retried = self._backend.on_retried
        canary.on_moved = self._backend.on_moved
        canary.on_continued = self._backend.on_continued
        await canary.start(node_host())
        await canary.monitor.refresh()
        return canary

    async def canary_report(self) -> dict[str, dict[str, Any]]:
        """Return what each version did on this replica since the share last changed."""
        return {
            version: {
                "num_requests": stats.num_requests,
                "num_failed": stats.num_failed,
                "num_tokens": stats.num_tokens,
                "ttfts_s": list(stats.ttfts_s),
                "latencies_s": list(stats.latencies_s),
            }
            for version, stats in self._split.stats.items()
        }

    async def drain(self) -> None:
        """Take no new requests on this replica; those that run go on."""
        self._app.state.context.admission.drain()
        self._backend.monitor.is_draining = True

    async def metrics_text(self) -> tuple[str, str]:
        """Return this replica's id and its metrics as Prometheus text."""
        return self.replica_id, self._metrics.render()

    async def activity(self) -> ActivityReport:
        """Return what this replica did lately, for the status page."""
        return self._metrics.activity.report()

    async def state(self) -> dict[str, Any]:
        """Return this replica's id, pid and requests in flight."""
        admission = self._app.state.context.admission
        return {
            "replica_id": self.replica_id,
            "pid": os.getpid(),
            "in_flight": admission.num_in_flight,
            "is_draining": admission.is_draining,
            "canary_percent": self._split.percent,
        }

    def __del__(self) -> None:
        # Serve calls this before it ends the process; a constructor that failed has nothing yet.
        if (tracing := getattr(self, "_tracing", None)) is not None:
            tracing.close()


def _same_place(left: CanarySection, right: CanarySection) -> bool:
    return (left.application, left.deployments) == (right.application, right.deployments)


def _own_handle() -> DeploymentHandle | None:
    try:
        app_name = serve.get_replica_context().app_name
    except serve.exceptions.RayServeException:
        return None
    return serve.get_deployment_handle(INGRESS, app_name)


def _model_name(config: AppConfig) -> str:
    try:
        return resolve_model(config.model).name
    except ConfigError:
        # The files need not lie on this host: only the other deployments read them.
        return config.model.name or "default"


def _peer_tells_of_client() -> bool:
    """Whether a loopback peer means a loopback client.

    Behind HAProxy each peer is HAProxy; but kept to loopback it has clients of this machine alone.
    """
    is_behind_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    return not is_behind_haproxy or os.environ.get(LOOPBACK_VARIABLE) == "0"
