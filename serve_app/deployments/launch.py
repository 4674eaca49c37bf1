"""Starts the application of a config file in this process's own Ray, stage by stage; or joins one.

Nothing heavy is imported before the file is checked, the port is free and Ray's environment is set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.config.env import PROXY_SEND_TIMEOUT_S, read_seconds
from serve_app.config.load import ServeFile, load_serve_file
from serve_app.config.model_source import resolve_model
from serve_app.core.errors import ConfigError
from serve_app.core.scheduling import children_wait
from serve_app.deployments.cluster_resources import node_resources
from serve_app.deployments.environment import ProxyMode, is_loopback, serve_environment
from serve_app.deployments.haproxy_instance import (
    BINARY_VARIABLE,
    HAProxyInstance,
    find_haproxy,
)
from serve_app.deployments.options import (
    INGRESS,
    MODEL_REPLICA,
    PREPROCESSOR,
    model_deployments,
)
from serve_app.deployments.running import RunningService, announce, ray_variables

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_INFO_TIMEOUT_S = 10.0
_OBJECT_STORE_BYTES = 128 << 20
"""Requests and tokens are small and never go through the object store."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the start: its name, and the seconds it took once it is done (None: it begins)."""

    name: str
    seconds: float | None = None


Progress = Callable[[Stage], None]


@dataclass(slots=True)
class Launched:
    """A running application and what was started for it; `stop()` ends that, and only that.

    `startup_s` are the seconds from the beginning to ready.
    """

    url: str
    model_id: str
    app_name: str
    proxy_mode: ProxyMode
    startup_s: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    _closers: list[Callable[[], object]] = field(default_factory=list)

    def stop(self) -> None:
        """End what `launch` started, last first: streams drain, then processes end.

        Interrupted, it goes on with the next thing when it is called again; else that does nothing.
        """
        while self._closers:
            close = self._closers.pop()
            try:
                close()
            except Exception:
                logger.warning("stopping failed", exc_info=True)

    def check(self) -> None:
        """Raise XeRayError where the application is no longer there."""
        _application_status(self.app_name)


def launch(
    config_path: str | Path,
    *,
    overrides: Sequence[str] = (),
    address: str | None = None,
    proxy_mode: ProxyMode | None = None,
    on_progress: Progress | None = None,
    timeout_s: float = 900.0,
) -> Launched:
    """Start the application of a Serve config file and wait until it is ready.

    address: a running Ray to use (`auto` or host:port); None starts one that ends with `stop()`.
    proxy_mode: None takes HAProxy where it is installed; on a running Ray it is Ray's own affair.
    on_progress: told when each stage begins and when it is done.
    Raises ConfigError, one line with the fix, after ending whatever was started until then.
    """
    started_s = time.monotonic()
    file = load_serve_file(config_path, overrides)
    mode = proxy_mode or _choose_proxy(file.host, address)
    if address is None:
        _check_port(file.host, file.port)
    source = resolve_model(file.app.model)
    launched = Launched(_url(file), source.name, file.app_name, mode)
    run = _Stages(launched, on_progress)
    try:
        is_own_ray = address is None
        _set_environment(launched, is_loopback(file.host) and is_own_ray, is_own_ray)
        _set_send_timeout(launched, file.app.ingress.send_timeout_s)
        from serve_app.deployments.ray_private import deploy_document

        with run.stage("ray"):
            _start_ray(launched, file, address)
        with run.stage("serve"):
            _start_serve(launched, file, is_shared=address is not None)
        deploy_document(file.document)
        _await_ready(run, file, started_s + timeout_s)
        launched._closers.append(lambda: _drain(file))
        if address is None:
            _announce(launched)
    except BaseException:
        launched.stop()
        raise
    launched.startup_s = time.monotonic() - started_s
    return launched


class _Stages:
    """Times the stages and tells of them."""

    def __init__(self, launched: Launched, on_progress: Progress | None) -> None:
        self.launched = launched
        self._tell = on_progress or (lambda stage: None)

    @contextlib.contextmanager
    def stage(self, name: str) -> Any:
        """Time the block as the stage `name`."""
        self._tell(Stage(name))
        started_s = time.monotonic()
        yield
        self.done(name, time.monotonic() - started_s)

    def done(self, name: str, seconds: float) -> None:
        """Note that a stage is done."""
        stage = Stage(name, seconds)
        self.launched.stages.append(stage)
        self._tell(stage)


def _choose_proxy(host: str, address: str | None) -> ProxyMode:
    if address is not None and is_loopback(host):
        return "python"  # a Ray that runs already has its environment; that host fits no HAProxy
    return "haproxy" if find_haproxy() is not None else "python"


def _set_environment(launched: Launched, loopback: bool, is_own_ray: bool) -> None:
    """Export Ray's variables; what the user set already stays."""
    for name, value in serve_environment(launched.proxy_mode, loopback=loopback).items():
        os.environ.setdefault(name, value)
    if launched.proxy_mode == "haproxy" and is_own_ray:
        instance = HAProxyInstance(loopback=loopback)
        launched._closers.append(instance.close)
        for name, value in instance.variables().items():
            _set_until_stop(launched, name, value, replace=name == BINARY_VARIABLE)


def _set_send_timeout(launched: Launched, timeout_s: float) -> None:
    """Tell Serve's servers, which know no config. Raises ConfigError on what the user set."""
    _set_until_stop(launched, PROXY_SEND_TIMEOUT_S.name, f"{timeout_s:g}", replace=False)
    read_seconds(PROXY_SEND_TIMEOUT_S)


def _set_until_stop(launched: Launched, name: str, value: str, *, replace: bool) -> None:
    before = os.environ.get(name)
    if before is None:
        os.environ[name] = value
        launched._closers.append(lambda: os.environ.pop(name, None))
    elif replace:
        os.environ[name] = value
        launched._closers.append(lambda: os.environ.__setitem__(name, before))


def _check_port(host: str, port: int) -> None:
    """Raise ConfigError where the port is taken: Serve's proxy would share or retry it silently."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"http_options.port: {host}:{port} cannot be used ({error.strerror}); stop what"
                " listens there, or set another http_options.port in the config",
                param="http_options.port",
            ) from None


def _start_ray(launched: Launched, file: ServeFile, address: str | None) -> None:
    import ray

    from serve_app.deployments.ray_private import without_idle_helpers

    if address is not None:
        try:
            ray.init(
                address=address, namespace="serve", log_to_driver=False, logging_level=logging.ERROR
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"no Ray at {address}: {reason}") from None
        launched._closers.append(ray.shutdown)
        return
    with without_idle_helpers(), children_wait():
        ray.init(
            address="local",
            namespace="serve",
            resources=node_resources(),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=_temp_dir(),
        )
    launched._closers.append(ray.shutdown)


def _temp_dir() -> str | None:
    """Return a short folder for Ray's sockets where the default would be too long for them."""
    given = os.environ.get("RAY_TMPDIR")
    if given and len(given) > 50:
        return tempfile.mkdtemp(prefix="xeray-", dir="/tmp")
    return None


def _start_serve(launched: Launched, file: ServeFile, *, is_shared: bool) -> None:
    from ray import serve

    from serve_app.deployments.preflight import check_cluster

    check_cluster(file.app)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    was_running = is_shared and _has_serve(file.app_name)
    http_options = dict(file.document.get("http_options") or {})
    http_options.update(host=file.host, port=file.port)
    serve.start(
        proxy_location=file.proxy_location,
        http_options=http_options,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    if is_shared and not was_running:
        launched._closers.append(serve.shutdown)
    # Drains; on a Ray of our own all the rest ends with it.
    launched._closers.append(lambda: serve.delete(file.app_name))


def _has_serve(app_name: str) -> bool:
    """Return whether Serve runs already. Raises ConfigError where it has other applications.

    A config file is the whole of what Serve shall run: deploying it would delete the others.
    """
    from serve_app.deployments.ray_private import is_serve_running

    if not is_serve_running():
        return False
    from ray import serve

    others = sorted(name for name in serve.status().applications if name != app_name)
    if others:
        raise ConfigError(
            f"this Ray already serves {', '.join(others)}, which deploying this file would delete;"
            " put all applications into one file and use `serve deploy`"
        )
    return True


def _await_ready(run: _Stages, file: ServeFile, deadline_s: float) -> None:
    """Wait for each deployment in turn. Raises ConfigError where the start failed."""
    for stage, deployment in (("preprocessor", PREPROCESSOR), ("ingress", INGRESS)):
        with run.stage(stage):
            _await_deployment(file.app_name, deployment, deadline_s)
    with run.stage("model"):
        for deployment in model_deployments(file.app):
            _await_deployment(file.app_name, deployment, deadline_s)
    if run.launched.proxy_mode == "python":
        # With Serve's throughput settings a handle lives on the caller's event loop; here is none.
        for name, seconds in _engine_stages(file.app_name).items():
            run.done(name, seconds)


def _drain(file: ServeFile) -> None:
    from serve_app.deployments.drain import drain_application

    drain_application(file.app_name, file.app.model_replica.graceful_shutdown_timeout_s)


def _announce(launched: Launched) -> None:
    """Let `xeray rollout` find this service; it serves as well where that cannot be."""
    import ray

    address = str(ray.get_runtime_context().gcs_address)
    service = RunningService(launched.app_name, launched.url, address, ray_variables())
    try:
        launched._closers.append(announce(service))
    except (OSError, ConfigError):
        logger.warning("other commands need --address %s to find this service", address)


def _await_deployment(app_name: str, deployment: str, deadline_s: float) -> None:
    while not _is_healthy(app_name, deployment):
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"the deployment {deployment} was not ready in time; Ray's session folder has logs"
            )
        time.sleep(_POLL_S)


def _engine_stages(app_name: str) -> dict[str, float]:
    """Return the stages of the engine's own start, seconds each; they overlap those before."""
    from ray import serve

    try:
        handle = serve.get_deployment_handle(MODEL_REPLICA, app_name)
        info = handle.info.remote().result(timeout_s=_INFO_TIMEOUT_S)
    except Exception:
        logger.warning("the engine did not tell its start-up times", exc_info=True)
        return {}
    return {f"  {name.removesuffix('_s')}": seconds for name, seconds in info.startup_s.items()}


def _is_healthy(app_name: str, deployment: str) -> bool:
    application = _application_status(app_name)
    if application is None:
        return False
    details = application.deployments.get(deployment)
    return details is not None and str(details.status.value) == "HEALTHY"


def _application_status(app_name: str) -> Any:
    """Return the application's status, None before it is known. Raises where it failed."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    application = serve.status().applications.get(app_name)
    if application is None:
        return None
    if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
        raise ConfigError(failure_reason(application))
    return application


def failure_reason(application: Any) -> str:
    """Return the one line that says why an application failed: our error's, if there is one."""
    messages = [application.message, *(d.message for d in application.deployments.values())]
    for message in messages:
        for line in reversed(str(message).splitlines()):
            for marker in ("ConfigError: ", "EngineError: ", "OverloadedError: "):
                if marker in line:
                    return line.split(marker, 1)[1].strip()
    text = next((str(m).strip() for m in messages if m), "unknown reason")
    return f"the application could not start: {text.splitlines()[-1]}"


def _url(file: ServeFile) -> str:
    host = "127.0.0.1" if file.host in ("0.0.0.0", "::") else file.host
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{file.port}{file.route_prefix.rstrip('/')}"
