"""Pools in the config, as deployments, and Serve's side of a chosen replica."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.config.load import validate_args
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError
from serve_app.core.requests import GenerateRequest
from serve_app.core.sampling import SamplingParams
from serve_app.deployments.graph import compose
from serve_app.deployments.options import (
    model_deployments,
    model_replica_options,
    preprocessor_options,
    required_resources,
)
from serve_app.deployments.request_router import TargetedRequestRouter

POOLS = [
    {"name": "arc", "model_replica": {"pool": "arc", "num_replicas": 2, "num_cards": 2}},
    {"name": "cpu", "engine": {"max_num_seqs": 4}},
]


def test_one_section_is_one_pool() -> None:
    config = AppConfig()
    assert model_deployments(config) == {"ModelReplica": config}


def test_each_pool_is_a_deployment_with_its_own_engine_and_cards() -> None:
    config = validate_args({"pools": POOLS, "model_replica": {"max_queued_requests": 7}})
    arc, cpu = model_deployments(config).items()

    assert (arc[0], cpu[0]) == ("ModelReplica", "ModelReplica-cpu")
    assert arc[1].engine.max_num_seqs == 32
    assert cpu[1].engine.max_num_seqs == 4
    assert {arc[1].model_replica.max_queued_requests, cpu[1].model_replica.max_queued_requests} == {
        7
    }
    assert model_replica_options(arc[1])["ray_actor_options"]["resources"] == {"arc_gpu": 2}
    assert "resources" not in model_replica_options(cpu[1], cpu[0])["ray_actor_options"]
    assert required_resources(config)["arc_gpu"] == 4
    assert compose(config)._bound_deployment.name == "Ingress"


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"pools": [{"name": "a"}, {"name": "a"}]}, "name of its own"),
        ({"pools": [{"name": "a", "engine": {"block_size": 17}}]}, "pool a: block_size"),
        ({"pools": [{"name": "a", "engin": {}}]}, "did you mean 'engine'"),
        (
            {"pools": [{"name": "a"}, {"name": "b"}], "routing": {"policy": "power_of_two"}},
            "several pools need expected_start",
        ),
    ],
)
def test_bad_pools_are_one_line(args: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        validate_args(args)


def test_a_pool_may_scale_where_the_section_says_a_number() -> None:
    config = validate_args(
        {
            "model_replica": {"num_replicas": 2},
            "pools": [
                {"name": "a", "model_replica": {"autoscaling": {"max_replicas": 3}}},
                {"name": "b"},
            ],
        }
    )
    scaled, fixed = map(model_replica_options, config.pool_configs())
    assert scaled["autoscaling_config"]["max_replicas"] == 3
    assert fixed["num_replicas"] == 2


def test_serves_own_choice_can_be_had() -> None:
    ours = model_replica_options(AppConfig())
    serves = model_replica_options(validate_args({"routing": {"policy": "power_of_two"}}))

    assert "request_router_config" in ours
    assert "request_router_config" not in serves


def test_preprocessors_land_only_where_cores_are() -> None:
    # A node that declares no xeon_cores cannot take an actor that asks for some.
    options = preprocessor_options(validate_args({"preprocessor": {"xeon_cores": 2}}))
    assert options["ray_actor_options"]["resources"] == {"xeon_cores": 2}


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


async def ranks(target: str | None, names: str) -> list[list[str]]:
    request = GenerateRequest("r", (1,), SamplingParams(), target_replica=target)
    pending = SimpleNamespace(args=[request], routing_context=SimpleNamespace(should_backoff=False))
    router = object.__new__(TargetedRequestRouter)  # its base wants a running Serve
    chosen = await router.choose_replicas([replica(name) for name in names], pending)  # type: ignore[arg-type]
    assert pending.routing_context.should_backoff, "or a full deployment is asked without a pause"
    return [[r.replica_id.unique_id for r in rank] for rank in chosen]


async def test_the_chosen_replica_comes_first_then_two_others() -> None:
    first, others = await ranks("c", "abcde")
    assert first == ["c"]
    assert len(set(others)) == 2
    assert "c" not in others


@pytest.mark.parametrize("target", [None, "gone"])
async def test_without_the_chosen_one_two_random_ones_are_tried(target: str | None) -> None:
    first, others = await ranks(target, "abc")
    assert first == []
    assert len(set(others)) == 2
    assert await ranks(target, "a") == [[], ["a"]]
    assert await ranks(target, "") == [[], []]
