"""Ray's environment: the variables that must be set before Ray and Serve start, on every node."""

from __future__ import annotations

import ipaddress
from typing import Literal

from serve_app.deployments.cluster_resources import UNIT_RESOURCES
from serve_app.deployments.ray_private import DEFAULT_UNIT_INSTANCE_RESOURCES

ProxyMode = Literal["python", "haproxy"]

UNIT_INSTANCE_VARIABLE = "RAY_custom_unit_instance_resources"
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""With 0, Ray calls its node 127.0.0.1 and binds each of its servers there (single node only)."""

_PROXY_LAYERS = "serve_app.deployments.proxy_guard:layers"
"""Serve puts what this returns before each of its HTTP servers."""

CONTROL_LOOP_INTERVAL_S = "0.5"
"""Serve's 0.1 costs 4 % of a core at rest; health checks and scaling have periods of their own."""

_QUIET_WORKSTATION = {
    LOOPBACK_VARIABLE: "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "3",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
}
"""One node, which nobody else watches: Ray's own polling and metrics cost a tenth of a core, which
the engine's threads wait for. XeRay's /metrics needs none of it."""

LONGEST_STREAM_S = 3600
"""A stream that lasts longer may be cut when the set of ingress replicas changes (HAProxy mode)."""


def serve_environment(mode: ProxyMode, *, loopback: bool = False) -> dict[str, str]:
    """Return the variables to export before `ray start` or `ray.init`, on every node.

    mode: "python" for Serve's own proxy, "haproxy" for HAProxy with Serve's throughput settings
        (cheaper by a factor of 3 to 4 per token).
    loopback: nothing of Ray may listen outside of 127.0.0.1; for one node. HAProxy's own servers
        need `HAProxyInstance(loopback=True)` beside it.
    """
    unit_resources = ",".join([DEFAULT_UNIT_INSTANCE_RESOURCES, *UNIT_RESOURCES])
    variables = {
        UNIT_INSTANCE_VARIABLE: unit_resources,
        # Ray's 15 is for batch work: beside four programs of its session, 1 s became 21 s.
        "RAY_worker_niceness": "0",
        # Nodes and proxies that died are noticed within seconds instead of half a minute.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "5",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "5",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": CONTROL_LOOP_INTERVAL_S,
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": _PROXY_LAYERS,
    }
    if loopback:
        variables |= _QUIET_WORKSTATION
    if mode == "haproxy":
        variables |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM_S),
            # HAProxy on the same host hears of an ingress that leaves at once.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        }
    return variables


def is_loopback(host: str) -> bool:
    """Return whether `host` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def has_unit_instances(resource: str, variables: dict[str, str]) -> bool:
    """Return whether a node that was started with `variables` numbers the units of `resource`."""
    return resource in variables.get(UNIT_INSTANCE_VARIABLE, "").split(",")
