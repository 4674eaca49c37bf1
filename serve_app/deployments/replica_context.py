"""What a replica knows of where it runs: its id, its node, how to report a bad start."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from serve_app.config.load import validate_args
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError
from serve_app.deployments.environment import is_loopback
from serve_app.deployments.preflight import fail_serve_run
from serve_app.deployments.ray_private import bind_replica_grpc_to_loopback
from serve_app.observability.logs import setup_logging

logger = logging.getLogger(__name__)


def enter_replica(config: AppConfig) -> str:
    """Set up logging and sockets of the replica that this process is; returns its short id.

    To be called first in a deployment's constructor. Outside of Serve the id is a random one.
    """
    # Not sys.stderr: beside HAProxy, Serve puts a logger in its place that wraps each line in one
    # of its own and holds a thousand of them back. The process's stderr is a file of Ray's.
    setup_logging(config.logging, sys.__stderr__)
    if _node_is_loopback():
        bind_replica_grpc_to_loopback()
    return replica_id()


def replica_id() -> str:
    """Return this replica's short id, a random one outside of Serve."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except (RayServeException, AttributeError):
        return uuid.uuid4().hex[:8]


def report_failed_start(config: AppConfig, error: ConfigError) -> None:
    """Tell the `serve run` that waits for this application's first start why it cannot; blocking.

    Does nothing where the application already ran: a later failure must not end the rest.
    """
    logger.error("%s", error.message)
    if _is_first_start():
        fail_serve_run(error.message, lambda args: _is_same(args, config))


def _is_same(args: Mapping[str, Any], config: AppConfig) -> bool:
    try:
        return validate_args(args) == config
    except ConfigError:
        return False


def _is_first_start() -> bool:
    from ray import serve
    from ray.serve.exceptions import RayServeException
    from ray.serve.schema import ApplicationStatus

    try:
        app_name = serve.get_replica_context().app_name
        application = serve.status().applications.get(app_name)
    except RayServeException:
        return False
    return application is not None and application.status == ApplicationStatus.DEPLOYING


def node_host() -> str:
    """Return the address at which other nodes reach this one; 127.0.0.1 where Ray has no others."""
    import ray

    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else "127.0.0.1"


def _node_is_loopback() -> bool:
    import ray

    return ray.is_initialized() and is_loopback(node_host())
