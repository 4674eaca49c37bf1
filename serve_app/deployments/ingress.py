"""The Ingress deployment: the HTTP surface, with Ray handles behind it."""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from serve_app.api.app import create_app
from serve_app.config.model_source import resolve_model
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError
from serve_app.deployments.options import INGRESS
from serve_app.deployments.ray_backend import RayBackend
from serve_app.deployments.replica_context import enter_replica
from serve_app.observability.metrics import IngressMetrics


@serve.ingress()
class Ingress:
    """Validation, limits, admission and streams; knows the other deployments by their handles."""

    async def __init__(  # type: ignore[misc]
        self, config: AppConfig, preprocessor: DeploymentHandle, model: DeploymentHandle
    ) -> None:
        self.replica_id = enter_replica(config)
        self._backend = RayBackend(preprocessor, model, _own_handle())
        self._metrics = IngressMetrics(_model_name(config), self.replica_id)
        self._app = create_app(
            self._backend,
            config,
            metrics=self._metrics,
            peer_is_client=not _is_behind_haproxy(),
            host_echoes_id=True,  # Serve's own middleware does, in each of its modes
        )
        self._backend.monitor.start()

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._app

    async def drain(self) -> None:
        """Take no new requests on this replica; those that run go on."""
        self._app.state.context.admission.drain()
        self._backend.monitor.is_draining = True

    async def metrics_text(self) -> tuple[str, str]:
        """Return this replica's id and its metrics as Prometheus text."""
        return self.replica_id, self._metrics.render()

    async def state(self) -> dict[str, Any]:
        """Return this replica's id, pid and requests in flight."""
        admission = self._app.state.context.admission
        return {
            "replica_id": self.replica_id,
            "pid": os.getpid(),
            "in_flight": admission.num_in_flight,
            "is_draining": admission.is_draining,
        }


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


def _is_behind_haproxy() -> bool:
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
