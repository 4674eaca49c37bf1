from pathlib import Path
from typing import Any

import pytest

from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError
from serve_app.deployments.device_claim import claim_device, numbered_resources
from serve_app.deployments.environment import (
    LOOPBACK_VARIABLE,
    UNIT_INSTANCE_VARIABLE,
    is_loopback,
    serve_environment,
)
from serve_app.hardware.card_lock import CardLock


@pytest.fixture(autouse=True)
def two_simulated_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XERAY_LOCK_DIR", str(tmp_path))
    monkeypatch.setenv("XERAY_SIMULATED_ARC_CARDS", "2")
    monkeypatch.setenv("XERAY_SIMULATED_IGPUS", "1")
    monkeypatch.setenv("XERAY_CARD_LOCK_TIMEOUT_S", "0")


def config(pool: str, engine: dict[str, Any] | None = None, **section: Any) -> AppConfig:
    return AppConfig.model_validate(
        {"engine": engine or {}, "model_replica": {"pool": pool, **section}}
    )


def test_the_card_that_ray_assigned_is_taken() -> None:
    claim = claim_device(config("arc"), {"arc_gpu": [1]})

    assert claim.card_indices == (1,)
    assert claim.device == "cpu", "a simulated card computes on the CPU"
    assert claim.env["ZE_AFFINITY_MASK"] == "1"
    assert len(claim.pass_fds) == 1
    claim.release()


def test_without_numbers_the_first_free_cards_are_taken() -> None:
    claims = [claim_device(config("arc"), {}) for _ in range(2)]

    assert [claim.card_indices for claim in claims] == [(0,), (1,)]
    with pytest.raises(ConfigError, match="only 0 came free"):
        claim_device(config("arc"), {})
    claims[0].release()
    again = claim_device(config("arc"), {})
    assert again.card_indices == (0,)
    for claim in (claims[1], again):
        claim.release()


def test_a_card_in_use_is_not_shared_and_its_holder_is_named(tmp_path: Path) -> None:
    lock = CardLock("arc-0", tmp_path)
    assert lock.try_acquire()

    with pytest.raises(ConfigError, match="arc-0 is in use by pid"):
        claim_device(config("arc"), {"arc_gpu": [0]})
    lock.release()


def test_several_cards_are_one_claim() -> None:
    claim = claim_device(config("arc", num_cards=2), {"arc_gpu": [0, 1]})

    assert claim.card_indices == (0, 1)
    assert claim.env["ZE_AFFINITY_MASK"] == "0,1"
    claim.release()


def test_more_cards_than_the_host_has() -> None:
    for assigned in ({}, {"arc_gpu": [0, 1, 2]}):
        with pytest.raises(ConfigError, match="3 Arc cards, but this host has 2"):
            claim_device(config("arc", num_cards=3), assigned)


def test_an_igpu_has_a_lock_of_its_own() -> None:
    arc, igpu = claim_device(config("arc"), {}), claim_device(config("igpu"), {"igpu": [0]})

    assert (arc.card_indices, igpu.card_indices) == ((0,), (0,))
    arc.release()
    igpu.release()


def test_cuda_takes_what_ray_assigned() -> None:
    claim = claim_device(config("cuda", num_cards=2), {"GPU": [1, 3]})

    assert claim.device == "cuda"
    assert claim.env == {"CUDA_VISIBLE_DEVICES": "1,3"}
    claim.release()
    with pytest.raises(ConfigError, match="0 GPUs of 1"):
        claim_device(config("cuda"), {})


def test_cpu_replicas_with_threads_of_their_own_do_not_share_cores() -> None:
    first = claim_device(config("cpu", {"num_threads": 1}), {})
    second = claim_device(config("cpu", {"num_threads": 1}), {})

    assert first.device == "cpu"
    assert first.cpu_ids is not None
    if second.cpu_ids is not None:  # a machine with one core has none left
        assert not set(first.cpu_ids) & set(second.cpu_ids)
    first.release()
    second.release()


def test_the_device_of_the_config_wins() -> None:
    claim = claim_device(config("arc", {"device": "xpu"}), {})

    assert claim.device == "xpu"
    claim.release()


def test_rays_numbers_count_only_where_its_node_was_told() -> None:
    assert numbered_resources({}) == ()
    assert numbered_resources({UNIT_INSTANCE_VARIABLE: "TPU,arc_gpu"}) == ("arc_gpu",)
    assert numbered_resources(serve_environment("python")) == ("arc_gpu", "igpu")


def test_rays_own_list_is_kept() -> None:
    listed = serve_environment("haproxy")[UNIT_INSTANCE_VARIABLE].split(",")

    assert listed[:2] == ["neuron_cores", "TPU"]
    assert listed[-3:] == ["arc_gpu", "igpu", "xeon_cores"]


def test_loopback_keeps_rays_servers_on_it_in_both_modes() -> None:
    for mode in ("python", "haproxy"):
        assert serve_environment(mode, loopback=True)[LOOPBACK_VARIABLE] == "0"
        assert LOOPBACK_VARIABLE not in serve_environment(mode)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
    assert not is_loopback("example.com")
