"""What each deployment asks of Ray Serve: replicas, limits, timeouts, resources."""

from __future__ import annotations

from typing import Any

from serve_app.config.load import POOL_PREFIX
from serve_app.config.schema import AppConfig, AutoscalingSection, LoggingSection
from serve_app.deployments.autoscaling import autoscaling_config
from serve_app.deployments.cluster_resources import ARC_GPU, IGPU, XEON_CORES

INGRESS = "Ingress"
PREPROCESSOR = "Preprocessor"
MODEL_REPLICA = "ModelReplica"

ROUTER_CLASS = "serve_app.deployments.request_router.TargetedRequestRouter"

PREPROCESSOR_NUM_CPUS = 0.1  # its real claim is the pinned cores
_CONTROL_SLACK = 16
"""Serve's limit lies above ours by this, so that our typed refusal comes first."""


def ingress_options(config: AppConfig) -> dict[str, Any]:
    """Return the Serve options of the Ingress."""
    section = config.ingress
    return {
        "name": INGRESS,
        **_replicas(section.num_replicas, section.autoscaling),
        "max_ongoing_requests": section.max_ongoing_requests,
        "max_surge_percent": 100,  # an update starts the new one before it ends the old one
        "user_config": {"canary": None},
        "graceful_shutdown_timeout_s": config.model_replica.graceful_shutdown_timeout_s + 10.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "ray_actor_options": {"num_cpus": section.num_cpus},
        "logging_config": _logging(config.logging),
    }


def preprocessor_options(config: AppConfig) -> dict[str, Any]:
    """Return the Serve options of the Preprocessor."""
    section = config.preprocessor
    actor: dict[str, Any] = {"num_cpus": PREPROCESSOR_NUM_CPUS}
    if section.reserve_xeon_cores:
        actor["resources"] = {XEON_CORES: section.xeon_cores}
    return {
        "name": PREPROCESSOR,
        **_replicas(section.num_replicas, section.autoscaling),
        "max_ongoing_requests": section.max_ongoing_requests,
        "graceful_shutdown_timeout_s": 10.0,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "ray_actor_options": actor,
        "user_config": {"micro_batching": section.micro_batching.model_dump()},
        "logging_config": _logging(config.logging),
    }


def model_deployments(config: AppConfig) -> dict[str, AppConfig]:
    """Return each pool's deployment name with the config of its replicas, best pool first."""
    names = [
        MODEL_REPLICA if rank == 0 else POOL_PREFIX + pool.name
        for rank, pool in enumerate(config.pools)
    ]
    return dict(zip(names or [MODEL_REPLICA], config.pool_configs(), strict=True))


def model_replica_options(config: AppConfig, name: str = MODEL_REPLICA) -> dict[str, Any]:
    """Return the Serve options of a pool's ModelReplica; limits follow from its engine's capacity.

    config: one of `model_deployments`.
    """
    section = config.model_replica
    capacity = config.engine.max_num_seqs + section.max_queued_requests
    return {
        "name": name,
        **_router(config),
        **_replicas(section.num_replicas, section.autoscaling),
        "max_ongoing_requests": capacity + _CONTROL_SLACK,
        # Counted per ingress replica and while a request is being assigned: room for a burst.
        "max_queued_requests": max(256, 4 * capacity),
        "graceful_shutdown_timeout_s": section.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": section.health_check_period_s,
        "health_check_timeout_s": section.health_check_timeout_s,
        "ray_actor_options": _model_actor(config),
        "user_config": {
            "batching": section.batching.model_dump(),
            "max_queued_requests": section.max_queued_requests,
            "stream_interval_ms": section.stream_interval_ms,
        },
        "logging_config": _logging(config.logging),
    }


def required_resources(config: AppConfig, *, most: bool = False) -> dict[str, float]:
    """Return what the replicas take of Ray: custom resources, GPU and CPU.

    Counts the smallest set of replicas that the config allows, or the largest (`most`).
    """
    required: dict[str, float] = {}
    for options in (
        ingress_options(config),
        preprocessor_options(config),
        *(model_replica_options(pool) for pool in config.pool_configs()),
    ):
        replicas = _num_replicas(options, most)
        actor = options["ray_actor_options"]
        amounts = {"CPU": actor["num_cpus"], "GPU": actor.get("num_gpus", 0)}
        for name, amount in {**amounts, **actor.get("resources", {})}.items():
            if amount:
                required[name] = required.get(name, 0.0) + replicas * amount
    return required


def _model_actor(config: AppConfig) -> dict[str, Any]:
    section = config.model_replica
    actor: dict[str, Any] = {"num_cpus": section.num_cpus}
    if section.pool == "arc":
        actor["resources"] = {ARC_GPU: section.num_cards}
    elif section.pool == "igpu":
        actor["resources"] = {IGPU: section.num_cards}
    elif section.pool == "cuda":
        actor["num_gpus"] = section.num_cards
    return actor


def _replicas(num_replicas: int, autoscaling: AutoscalingSection | None) -> dict[str, Any]:
    if autoscaling is None:
        return {"num_replicas": num_replicas}
    return {"autoscaling_config": autoscaling_config(autoscaling)}


def _router(config: AppConfig) -> dict[str, Any]:
    if config.routing.policy == "power_of_two":
        return {}
    return {"request_router_config": {"request_router_class": ROUTER_CLASS}}


def _num_replicas(options: dict[str, Any], most: bool) -> int:
    if "num_replicas" in options:
        return int(options["num_replicas"])
    return int(options["autoscaling_config"]["max_replicas" if most else "min_replicas"])


def _logging(section: LoggingSection) -> dict[str, Any]:
    return {
        "encoding": section.encoding,
        "log_level": section.level,
        "enable_access_log": False,
    }
