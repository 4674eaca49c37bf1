"""Everything of Ray that is not public API, each thing in one function with a way to do without it.

Ray changes such names freely: a function here returns "nothing known" where Ray no longer has them,
or raises a ConfigError that names the Ray version where there is no way to do without.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from serve_app.core.errors import ConfigError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

TESTED_RAY = "2.60.*"
"""The Ray whose private names are used here."""

DEFAULT_UNIT_INSTANCE_RESOURCES = "neuron_cores,TPU,NPU,HPU,RBLN,FURIOSA,TTNPU,MBLT"
"""Ray 2.60's own RAY_custom_unit_instance_resources; ours is appended, never replaces it."""


@contextlib.contextmanager
def without_idle_helpers() -> Iterator[None]:
    """A Ray that starts meanwhile has no log monitor and no autoscaler.

    The one reads all log files several times a second for drivers that asked not to have them, the
    other waits for machines to add: 1 % of a core together, which an engine's threads wait for.
    `ray start` has an option for the first, `ray.init` for neither.
    """
    try:
        from ray._private.node import Node

        originals = {name: vars(Node)[name] for name in ("start_log_monitor", "start_monitor")}
    except (ImportError, KeyError):
        logger.debug("this Ray's helpers have other names: they are started", exc_info=True)
        yield
        return
    try:
        for name in originals:
            setattr(Node, name, lambda self: None)
        yield
    finally:
        for name, original in originals.items():
            setattr(Node, name, original)


def raylet_unit_ids(resource: str) -> list[int]:
    """Return which units (cards, cores) of a custom resource the raylet gave this worker.

    Meaningful only where RAY_custom_unit_instance_resources names the resource on this node:
    without it every holder of a plain resource reads 0. Empty where Ray does not tell.
    """
    try:
        from ray._private.worker import global_worker

        assignments = dict(global_worker.core_worker.resource_ids())
    except Exception:
        logger.debug("this Ray does not tell resource ids", exc_info=True)
        return []
    ids: set[int] = set()
    for name, units in assignments.items():
        # In a placement group: <resource>_group_<id>; <resource>_group_<index>_<id> repeats it.
        in_group = name.startswith(f"{resource}_group_")
        if name == resource or (in_group and name.count("_") == resource.count("_") + 2):
            ids.update(int(unit) for unit, _ in units)
    return sorted(ids)


def with_own_request_id(call: Callable[[], _T]) -> _T:
    """Return `call()`, which sends a request through a handle under an id of its own.

    Serve's router keys calls that wait for a replica by an id that all calls of one HTTP request
    share: of two at once (n = 2, two prompts, two inputs) one would wait for ever.
    """
    return contextvars.copy_context().run(_forget_request_id, call)


def _forget_request_id(call: Callable[[], _T]) -> _T:
    try:
        from ray.serve import context

        current = context._get_serve_request_context()
        context._serve_request_context.set(replace(current, _internal_request_id=""))
    except Exception:
        logger.debug("this Ray has no request ids of its own", exc_info=True)
    return call()


async def replica_calls(broadcast: Any) -> list[Coroutine[Any, Any, Any]] | None:
    """Return a broadcast's calls, one per replica; None where this Ray tells of all or of none.

    Its public `results_async` waits for the slowest: a replica that hangs hides the others.
    """
    try:
        fetch = broadcast._fetch_replica_results_async
    except AttributeError:
        return None
    results = await fetch()
    return [result.get_async() for result in results]


def bind_replica_grpc_to_loopback() -> bool:
    """Make this Serve replica's internal gRPC server listen on 127.0.0.1 only.

    To be called in the replica's constructor, which runs before Serve starts that server. Returns
    whether it could be done.
    """
    try:
        from ray.serve._private import replica

        original = replica.add_port_to_grpc_server
    except (ImportError, AttributeError):
        logger.warning("this Ray's replica server cannot be bound to the loopback interface")
        return False
    if getattr(original, "is_loopback_only", False):
        return True

    def add_port(server: Any, address: str) -> int:
        return int(original(server, address.replace("[::]:", "127.0.0.1:")))

    add_port.is_loopback_only = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = add_port
    return True


@dataclass(frozen=True, slots=True)
class Driver:
    """A live driver process of the Ray cluster."""

    node_ip: str
    pid: int
    entrypoint: str


def live_drivers() -> list[Driver]:
    """Return the drivers that are connected to this Ray; empty where Ray does not tell."""
    try:
        from ray._private.state import state

        jobs = state.job_table()
    except Exception:
        logger.debug("this Ray does not list its jobs", exc_info=True)
        return []
    return [
        Driver(str(job["DriverIPAddress"]), int(job["DriverPid"]), str(job.get("Entrypoint", "")))
        for job in jobs
        if not job.get("IsDead")
    ]


def deploy_document(document: dict[str, Any]) -> None:
    """Hand a checked Serve config file to the running Serve, as `serve run` does; returns at once.

    The public way is the dashboard's REST API, which a loopback-only start does without.
    """
    from ray.serve.schema import ServeDeploySchema

    client = _serve_client(raise_if_no_controller_running=True)
    try:
        deploy = client.deploy_apps
        checked = ServeDeploySchema.model_validate(document)
        deploy(checked, _blocking=False)
    except (AttributeError, TypeError) as error:
        raise _unsupported("deploying a config file", error) from error


def deployed_applications() -> list[dict[str, Any]]:
    """Return the applications that were deployed from config files, as those files said.

    The public way is the dashboard's REST API, which a loopback-only start does without.
    """
    import ray

    client = _serve_client(raise_if_no_controller_running=True)
    try:
        configs = ray.get(client._controller.get_app_configs.remote())
        return [config.model_dump(exclude_unset=True) for config in configs.values()]
    except AttributeError as error:
        raise _unsupported("reading what runs", error) from error


def is_serve_running() -> bool:
    """Return whether the Ray that this process is connected to runs Serve."""
    return _serve_client(raise_if_no_controller_running=False) is not None


def _serve_client(**options: Any) -> Any:
    """Return Serve's client of this process. Raises ConfigError where this Ray has none."""
    try:
        from ray.serve.context import _get_global_client
    except ImportError as error:
        raise _unsupported("finding the running Serve", error) from error
    try:
        return _get_global_client(**options)
    except TypeError as error:
        raise _unsupported("finding the running Serve", error) from error


def _unsupported(what: str, error: Exception) -> ConfigError:
    import ray

    return ConfigError(
        f"{what} does not work with Ray {ray.__version__} ({error}); install a Ray that XeRay was"
        f" tested with: pip install 'ray[serve]=={TESTED_RAY}'"
    )
