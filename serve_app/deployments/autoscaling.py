"""Autoscaling as Ray Serve takes it: our policy where it is chosen, and never beyond the cards."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from serve_app.config.schema import AppConfig, ModelReplicaSection
from serve_app.config.sections_autoscaling import AutoscalingSection
from serve_app.deployments.cluster_resources import ARC_GPU, IGPU

logger = logging.getLogger(__name__)

POLICY = "serve_app.deployments.autoscaling_policy:EngineLoadPolicy"
_RESOURCES = {"arc": ARC_GPU, "igpu": IGPU, "cuda": "GPU"}


def autoscaling_config(section: AutoscalingSection) -> dict[str, Any]:
    """Return Serve's `autoscaling_config`."""
    values = section.model_dump(exclude={"policy", "targets", "downscale_to_zero_delay_s"})
    if section.downscale_to_zero_delay_s is not None:
        values["downscale_to_zero_delay_s"] = section.downscale_to_zero_delay_s
    if section.min_replicas == 0:
        values["initial_replicas"] = 1  # a start that fails is seen at the start
    if section.policy == "engine_load":
        targets = section.targets.model_dump()
        values["policy"] = {
            "policy_function": POLICY,
            "policy_kwargs": {
                **targets,
                "target_ongoing_requests": section.target_ongoing_requests,
            },
        }
    return values


def capped(config: AppConfig, declared: Mapping[str, float]) -> AppConfig:
    """Return `config` with each pool's max_replicas no larger than its cards in `declared`.

    Pools that share a kind of card share it in their order. Replicas beyond the cards would stay
    pending for ever, and Serve would believe that it had scaled.
    """
    left = {name: declared.get(name, 0.0) for name in _RESOURCES.values()}
    if not config.pools:
        return config.model_copy(
            update={"model_replica": _capped_section(config.model_replica, left, "model_replica")}
        )
    pools = []
    for pool, pool_config in zip(config.pools, config.pool_configs(), strict=True):
        section = _capped_section(pool_config.model_replica, left, f"pool {pool.name}")
        changes = dict(pool.model_replica)
        if section.autoscaling is not None:
            changes["autoscaling"] = section.autoscaling.model_dump()
        pools.append(pool.model_copy(update={"model_replica": changes}))
    return config.model_copy(update={"pools": tuple(pools)})


def capped_to_cluster(config: AppConfig) -> AppConfig:
    """Return `config` capped to the Ray that this process is connected to; as it is without one."""
    import ray

    if not ray.is_initialized():
        return config
    declared: dict[str, float] = {}
    for node in ray.nodes():
        if node.get("Alive"):
            for name, amount in node["Resources"].items():
                declared[name] = declared.get(name, 0.0) + amount
    return capped(config, declared)


def _capped_section(
    section: ModelReplicaSection, left: dict[str, float], what: str
) -> ModelReplicaSection:
    resource = _RESOURCES.get(section.pool)
    if resource is None:
        return section
    room = int(left[resource] // section.num_cards)
    autoscaling = section.autoscaling
    if autoscaling is None:
        left[resource] = max(0.0, left[resource] - section.num_replicas * section.num_cards)
        return section
    most = max(1, autoscaling.min_replicas, min(autoscaling.max_replicas, room))
    left[resource] = max(0.0, left[resource] - most * section.num_cards)
    if most == autoscaling.max_replicas:
        return section
    logger.warning(
        "%s: max_replicas %d is lowered to %d, there are no more %s",
        what,
        autoscaling.max_replicas,
        most,
        resource,
    )
    return section.model_copy(
        update={"autoscaling": autoscaling.model_copy(update={"max_replicas": most})}
    )
