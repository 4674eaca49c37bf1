from typing import Any

import pytest

from serve_app.config.schema import AppConfig
from serve_app.deployments.options import (
    ingress_options,
    model_replica_options,
    preprocessor_options,
    required_resources,
)


def config(**sections: Any) -> AppConfig:
    return AppConfig.model_validate(sections)


def test_limits_follow_from_the_engines_capacity() -> None:
    options = model_replica_options(
        config(engine={"max_num_seqs": 10}, model_replica={"max_queued_requests": 30})
    )

    # Above what we admit, so that our typed refusal comes before Serve's.
    assert 40 < options["max_ongoing_requests"] < 60
    assert options["max_queued_requests"] >= 4 * 40


def test_streams_may_end_before_a_replica_does() -> None:
    settings = config(model_replica={"graceful_shutdown_timeout_s": 77})

    assert model_replica_options(settings)["graceful_shutdown_timeout_s"] == 77
    # The ingress holds the client's connection, so it must not leave first.
    assert ingress_options(settings)["graceful_shutdown_timeout_s"] > 77


@pytest.mark.parametrize(
    ("section", "resources", "num_gpus"),
    [
        ({"pool": "arc", "num_cards": 2}, {"arc_gpu": 2}, None),
        ({"pool": "igpu"}, {"igpu": 1}, None),
        ({"pool": "cuda", "num_cards": 3}, None, 3),
        ({"pool": "cpu"}, None, None),
    ],
)
def test_each_pool_asks_for_its_own_resource(
    section: dict[str, Any], resources: dict[str, int] | None, num_gpus: int | None
) -> None:
    actor = model_replica_options(config(model_replica=section))["ray_actor_options"]

    assert actor.get("resources") == resources
    assert actor.get("num_gpus") == num_gpus


def test_cores_are_a_ray_resource_only_where_reserved() -> None:
    reserved = preprocessor_options(config(preprocessor={"xeon_cores": 3}))
    free = preprocessor_options(config(preprocessor={"reserve_xeon_cores": False}))

    assert reserved["ray_actor_options"]["resources"] == {"xeon_cores": 3}
    assert "resources" not in free["ray_actor_options"]


def test_autoscaling_replaces_the_number_of_replicas() -> None:
    options = model_replica_options(config(model_replica={"autoscaling": {"max_replicas": 2}}))

    assert "num_replicas" not in options
    assert options["autoscaling_config"]["max_replicas"] == 2


def test_toggles_of_the_args_are_the_first_user_config() -> None:
    options = model_replica_options(config(model_replica={"batching": {"mode": "static"}}))

    assert options["user_config"]["batching"]["mode"] == "static"


def test_required_resources_count_all_replicas() -> None:
    settings = config(
        ingress={"num_replicas": 2, "num_cpus": 0.5},
        preprocessor={"num_replicas": 2, "xeon_cores": 2},
        model_replica={
            "pool": "arc",
            "num_cpus": 1,
            "autoscaling": {"min_replicas": 1, "max_replicas": 3},
        },
    )

    least, most = required_resources(settings), required_resources(settings, most=True)

    assert (least["arc_gpu"], most["arc_gpu"]) == (1, 3)
    assert least["xeon_cores"] == 4
    assert least["CPU"] == pytest.approx(2 * 0.5 + 2 * 0.1 + 1)
    assert "GPU" not in least
