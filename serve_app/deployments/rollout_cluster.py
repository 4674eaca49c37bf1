"""What a rollout does to the running Serve: rollout.Cluster over Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from serve_app.api.app import create_app
from serve_app.config.load import validate_args
from serve_app.core.errors import ConfigError
from serve_app.deployments.handles import call_all
from serve_app.deployments.launch import failure_reason
from serve_app.deployments.loop_thread import LoopThread
from serve_app.deployments.options import INGRESS, PREPROCESSOR, required_resources
from serve_app.deployments.pools import model_pools
from serve_app.deployments.preflight import CORES_WAIT_S, check_free_cores
from serve_app.deployments.ray_backend import RayBackend
from serve_app.deployments.ray_private import deploy_document, deployed_applications
from serve_app.deployments.rollout import Application, is_candidate, model_names
from serve_app.deployments.rollout_compare import VersionReport, merged
from serve_app.deployments.rollout_scenarios import Scenario, ScenarioResult, run_scenario

_POLL_S = 0.2
_CALL_TIMEOUT_S = 5.0
_SHARE_TIMEOUT_S = 60.0
_REQUEST_TIMEOUT_S = 600.0
_FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


class ServeCluster:
    """The Serve of the Ray that this process is connected to; other applications stay."""

    def __init__(self) -> None:
        self._ours: set[str] = set()
        self._others: list[Application] = []
        self._loop = LoopThread()

    def close(self) -> None:
        """End the event loop; nothing can be asked any more."""
        self._loop.close()

    def own(self, *app_names: str) -> None:
        """Say which applications are the rollout's; the rest is deployed again as it is.

        What an earlier rollout of theirs has left, ending perhaps, is not of the rest.
        """
        self._ours = set(app_names)
        self._others = [app for app in deployed_applications() if not self._is_ours(app["name"])]

    def _is_ours(self, name: str) -> bool:
        return name in self._ours or any(is_candidate(name, of=app) for app in self._ours)

    def deploy(self, applications: Sequence[Application]) -> None:
        """Make these applications what Serve runs, beside those of others."""
        deploy_document({"applications": [*self._others, *applications]})

    def await_ready(self, app_name: str, timeout_s: float) -> None:
        """Wait until Serve calls the application RUNNING, after the deployment that was just made.

        Raises ConfigError where it failed or took too long.
        """

        def is_running() -> bool:
            application = serve.status().applications.get(app_name)
            if application is None:
                return False
            if application.status in _FAILED:
                raise ConfigError(f"{app_name}: {failure_reason(application)}")
            return application.status == ApplicationStatus.RUNNING

        # The controller takes a new config over within one of its rounds, not at once.
        time.sleep(1.0)
        _wait(is_running, timeout_s, f"{app_name} was not ready within {timeout_s:g} s")

    def await_share(self, app_name: str, percent: float) -> None:
        """Wait until every ingress replica has the share. Raises ConfigError if it takes long."""

        def is_everywhere() -> bool:
            states = self._ask(app_name, "state")
            return bool(states) and all(s["canary_percent"] == percent for s in states)

        _wait(is_everywhere, _SHARE_TIMEOUT_S, f"the ingress did not take {percent:g} % over")

    def reports(self, app_name: str) -> dict[str, VersionReport]:
        """Return both versions' reports over all ingress replicas."""
        rows = [row for row in self._ask(app_name, "canary_report") if row]
        return {version: merged([row[version] for row in rows]) for version in ("stable", "canary")}

    def run_scenarios(self, app_name: str, scenarios: Sequence[Scenario]) -> list[ScenarioResult]:
        """Run scenarios through the API in this process, over the application's own replicas."""
        application = next(a for a in deployed_applications() if a["name"] == app_name)
        return self._loop.run(_run_scenarios(application, scenarios))

    def _ask(self, app_name: str, method: str) -> list[Any]:
        async def ask() -> list[Any]:
            handle = serve.get_deployment_handle(INGRESS, app_name)
            return await call_all(handle, method, _CALL_TIMEOUT_S)

        return self._loop.run(ask())


async def _run_scenarios(
    application: Application, scenarios: Sequence[Scenario]
) -> list[ScenarioResult]:
    args = application.get("args") or {}
    config = validate_args({**args, "auth": {}, "fallback": {}})
    name = application["name"]
    handles = [serve.get_deployment_handle(deployment, name) for deployment in model_names(args)]
    preprocessor = serve.get_deployment_handle(PREPROCESSOR, name)
    backend = RayBackend(preprocessor, model_pools(config, handles))
    backend.monitor.start()
    transport = httpx.ASGITransport(create_app(backend, config))
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=_REQUEST_TIMEOUT_S
        ) as client:
            model = (await backend.models())[0].id
            return [await run_scenario(scenario, client, model) for scenario in scenarios]
    finally:
        await backend.stop()


def find_application(app_name: str | None) -> Application:
    """Return the running XeRay application of that name, or the only one. Raises ConfigError."""
    applications = {app["name"]: app for app in deployed_applications()}
    if app_name is None and len(applications) == 1:
        return next(iter(applications.values()))
    if app_name in applications:
        return applications[app_name]
    known = ", ".join(sorted(applications)) or "none"
    raise ConfigError(f"no application {app_name or '(name one with --app)'}; running: {known}")


def check_room(application: Application, *, cores_wait_s: float = CORES_WAIT_S) -> None:
    """Raise ConfigError where too little is free for the application beside the others.

    That is Ray's resources and, on one host, the Preprocessor's cores, which services share that
    know nothing of each other: without this the new version waits long for a core, and then fails.
    """
    config = validate_args(application.get("args") or {})
    required = required_resources(config)
    free = ray.available_resources()
    missing = [
        f"{amount:g} {name} (free: {free.get(name, 0.0):g})"
        for name, amount in required.items()
        if amount > free.get(name, 0.0) + 1e-6
    ]
    if missing:
        raise ConfigError(
            f"no room for the new version beside the old one: {', '.join(missing)} needed;"
            " use --strategy in_place, which replaces replicas one by one"
        )
    if sum(bool(node.get("Alive")) for node in ray.nodes()) > 1:
        return  # each host has locks of its own
    try:
        check_free_cores(config, timeout_s=cores_wait_s)
    except ConfigError as error:
        raise ConfigError(
            f"no room for the new version beside the old one: {error.message};"
            " or use --strategy in_place, which replaces replicas one by one",
            param=error.param,
        ) from None


def _wait(is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline_s:
            raise ConfigError(what)
        time.sleep(_POLL_S)
