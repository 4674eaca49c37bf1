"""What cannot be built, or started beside others, is one line and an end for `serve run`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import serve_app
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError
from serve_app.deployments import graph, preflight, rollout_cluster
from serve_app.deployments.graph import ServeArgs, build_app
from serve_app.hardware.affinity import PhysicalCore, claim_cores, core_holders

CORES = (PhysicalCore(0, 0, (0,)), PhysicalCore(0, 1, (1,)))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    for module in (graph, preflight):
        monkeypatch.setattr(module, "fail_serve_run", lambda *args: calls.append(args))
    return calls


def test_an_exception_of_the_builder_ends_the_run_with_one_line(
    monkeypatch: pytest.MonkeyPatch, told: list[tuple[Any, ...]]
) -> None:
    def broken(config: AppConfig) -> Any:
        raise RuntimeError("no such option\nsecond line")

    monkeypatch.setattr(graph, "compose", broken)
    args = {"ingress": {"num_replicas": 3}}

    with pytest.raises(ConfigError) as failure:
        build_app(ServeArgs.model_validate(args))

    message = "the application could not be built: RuntimeError: no such option"
    assert failure.value.message == message
    ((line, is_ours),) = told
    assert line == message
    assert is_ours(args)
    assert not is_ours({"ingress": {"num_replicas": 4}})


def test_a_module_that_is_missing_ends_the_run_with_one_line(
    monkeypatch: pytest.MonkeyPatch, told: list[tuple[Any, ...]]
) -> None:
    original = importlib.import_module

    def without_the_graph(name: str, *rest: Any) -> Any:
        if name == "serve_app.deployments.graph":
            raise ImportError("No module named 'starlette'")
        return original(name, *rest)

    monkeypatch.setenv("RAY_RAYLET_PID", "1")
    monkeypatch.setattr(importlib, "import_module", without_the_graph)

    with pytest.raises(ImportError):
        serve_app.__getattr__("build_app")

    ((line, _, import_path),) = told
    assert (
        line == "XeRay is not installed completely: No module named 'starlette'; install it again"
    )
    assert import_path == "serve_app:build_app"


def test_a_builder_that_does_not_exist_ends_the_run_with_one_line(
    monkeypatch: pytest.MonkeyPatch, told: list[tuple[Any, ...]]
) -> None:
    monkeypatch.setenv("RAY_RAYLET_PID", "1")

    with pytest.raises(AttributeError):
        _ = serve_app.bulid_app

    ((line, _, import_path),) = told
    assert line == "import_path: serve_app:bulid_app does not exist; write serve_app:build_app"
    assert import_path == "serve_app:bulid_app"


@pytest.mark.parametrize("name", ["__wrapped__", "bench"])
def test_other_lookups_end_nothing(
    monkeypatch: pytest.MonkeyPatch, told: list[tuple[Any, ...]], name: str
) -> None:
    monkeypatch.setenv("RAY_RAYLET_PID", "1")

    with pytest.raises(AttributeError):
        serve_app.__getattr__(name)

    assert told == []


def test_outside_of_ray_a_wrong_name_is_pythons_own_error(
    monkeypatch: pytest.MonkeyPatch, told: list[tuple[Any, ...]]
) -> None:
    monkeypatch.delenv("RAY_RAYLET_PID", raising=False)

    with pytest.raises(AttributeError):
        _ = serve_app.bulid_app

    assert told == []


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XERAY_LOCK_DIR", str(tmp_path))
    monkeypatch.setattr(preflight, "physical_cores", lambda: CORES)


@pytest.mark.usefixtures("two_cores")
def test_a_third_service_on_two_cores_is_refused_with_the_fix() -> None:
    others = [claim_cores(1, role="preprocessor", cores=CORES) for _ in range(2)]
    naps: list[float] = []

    with pytest.raises(ConfigError) as failure:
        preflight.check_free_cores(AppConfig(), timeout_s=0.0, sleep=naps.append)

    message = failure.value.message
    assert message.startswith(
        "preprocessor.xeon_cores: 1 of this host's 2 cores needed, but 0 free; the others are held"
    )
    assert "end that service, or lower preprocessor.num_replicas" in message
    others[0].release()
    preflight.check_free_cores(AppConfig(), timeout_s=0.0)
    others[1].release()


@pytest.mark.usefixtures("two_cores")
def test_a_service_that_is_just_ending_is_waited_for() -> None:
    others = [claim_cores(1, role="preprocessor", cores=CORES) for _ in range(2)]

    preflight.check_free_cores(AppConfig(), timeout_s=60.0, sleep=lambda _: others[0].release())

    others[1].release()


@pytest.mark.usefixtures("two_cores")
def test_more_cores_than_the_host_has_are_refused_at_once() -> None:
    config = AppConfig.model_validate({"preprocessor": {"num_replicas": 3}})

    with pytest.raises(ConfigError, match="3 cores asked for in all, but this host has 2; lower"):
        preflight.check_free_cores(config)


@pytest.mark.usefixtures("two_cores")
def test_a_rollout_beside_another_service_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [{"Alive": True}, {"Alive": False}]
    cluster = SimpleNamespace(available_resources=lambda: {"CPU": 8.0}, nodes=lambda: nodes)
    monkeypatch.setattr(rollout_cluster, "ray", cluster)
    application = {"args": {"preprocessor": {"reserve_xeon_cores": False}}}
    held = [claim_cores(1, role="preprocessor", cores=CORES)]
    rollout_cluster.check_room(application)
    held.append(claim_cores(1, role="preprocessor", cores=CORES))

    with pytest.raises(ConfigError) as failure:
        rollout_cluster.check_room(application, cores_wait_s=0.0)

    message = failure.value.message
    assert message.startswith("no room for the new version beside the old one: preprocessor.xeon_")
    assert message.endswith("or use --strategy in_place, which replaces replicas one by one")
    assert "\n" not in message
    nodes.append({"Alive": True})
    rollout_cluster.check_room(application)  # another host may have cores
    for claim in held:
        claim.release()


def test_asking_who_holds_a_core_changes_nothing(tmp_path: Path) -> None:
    claim = claim_cores(1, role="preprocessor", cores=CORES, folder=tmp_path)
    (held,) = claim.locks
    holder = held.holder()

    assert core_holders("preprocessor", CORES, tmp_path) == {"0.0": holder}
    assert core_holders("engine", CORES, tmp_path) == {}
    claim.release()
    assert core_holders("preprocessor", CORES, tmp_path) == {}
    assert held.holder() == holder, "who asks is not noted as a holder"
