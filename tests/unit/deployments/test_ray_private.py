"""Every private name of Ray has a way to do without it, or an error that names the version."""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import ray

from serve_app.core.errors import ConfigError
from serve_app.deployments import ray_private

DOCUMENT = {"applications": [{"name": "a", "import_path": "serve_app:build_app"}]}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`without(name)`: importing that module fails, as in a Ray that lacks it."""

    def forbid(name: str) -> None:
        monkeypatch.delitem(sys.modules, name, raising=False)
        original = builtins.__import__

        def refuse(module: str, *args: Any, **kwargs: Any) -> Any:
            if module == name:
                raise ImportError(f"No module named {name!r}")
            return original(module, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)

    return forbid


def test_units_of_a_resource_come_from_the_worker_or_from_its_placement_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray._private import worker

    assignments = {
        "arc_gpu": [(1, 1.0)],
        "arc_gpu_group_ab12": [(3, 1.0)],
        "arc_gpu_group_0_ab12": [(3, 1.0)],
        "xeon_cores": [(0, 1.0)],
    }
    core = types.SimpleNamespace(resource_ids=lambda: assignments)
    monkeypatch.setattr(worker, "global_worker", types.SimpleNamespace(core_worker=core))

    assert ray_private.raylet_unit_ids("arc_gpu") == [1, 3]
    assert ray_private.raylet_unit_ids("igpu") == []


def test_a_ray_that_tells_no_units_leaves_them_to_the_locks(without: Callable[[str], None]) -> None:
    without("ray._private.worker")

    assert ray_private.raylet_unit_ids("arc_gpu") == []


def test_a_ray_that_lists_no_jobs_has_no_drivers(without: Callable[[str], None]) -> None:
    without("ray._private.state")

    assert ray_private.live_drivers() == []


def test_live_drivers_leave_out_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import state

    jobs = [
        {"DriverIPAddress": "127.0.0.1", "DriverPid": "7", "Entrypoint": "serve run", "IsDead": 0},
        {"DriverIPAddress": "127.0.0.1", "DriverPid": "8", "IsDead": True},
    ]
    monkeypatch.setattr(state, "state", types.SimpleNamespace(job_table=lambda: jobs))

    assert ray_private.live_drivers() == [ray_private.Driver("127.0.0.1", 7, "serve run")]


def test_replicas_listen_on_loopback_once_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private import replica

    asked: list[str] = []
    monkeypatch.setattr(
        replica, "add_port_to_grpc_server", lambda server, address: asked.append(address) or 5
    )

    assert ray_private.bind_replica_grpc_to_loopback()
    assert ray_private.bind_replica_grpc_to_loopback(), "twice is once"
    assert replica.add_port_to_grpc_server(None, "[::]:0") == 5
    assert asked == ["127.0.0.1:0"]


def test_a_ray_without_that_server_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray.serve._private import replica

    monkeypatch.delattr(replica, "add_port_to_grpc_server")

    assert not ray_private.bind_replica_grpc_to_loopback()
    assert "cannot be bound to the loopback interface" in caplog.text


def no_such_name(without: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    without("ray.serve.context")


def other_signature(without: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve import context

    monkeypatch.setattr(context, "_get_global_client", lambda: None)


@pytest.mark.parametrize("change", [no_such_name, other_signature])
@pytest.mark.parametrize(
    "call", [lambda: ray_private.deploy_document(DOCUMENT), ray_private.is_serve_running]
)
def test_another_ray_is_one_line_with_its_version(
    without: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., None],
    call: Callable[[], Any],
) -> None:
    change(without, monkeypatch)

    with pytest.raises(ConfigError) as failure:
        call()

    assert f"does not work with Ray {ray.__version__}" in failure.value.message
    assert "pip install 'ray[serve]==2.60.*'" in failure.value.message
    assert "\n" not in failure.value.message


def test_a_client_that_deploys_otherwise_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve import context

    client = types.SimpleNamespace(deploy_apps=lambda config: None)
    monkeypatch.setattr(context, "_get_global_client", lambda **_: client)

    with pytest.raises(
        ConfigError, match=f"deploying a config file does not work with Ray {ray.__version__}"
    ):
        ray_private.deploy_document(DOCUMENT)


def test_the_document_reaches_serve_as_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve import context

    seen: list[Any] = []
    client = types.SimpleNamespace(
        deploy_apps=lambda config, *, _blocking: seen.append((config, _blocking))
    )
    monkeypatch.setattr(context, "_get_global_client", lambda **_: client)

    ray_private.deploy_document(DOCUMENT)

    ((config, is_blocking),) = seen
    assert config.applications[0].import_path == "serve_app:build_app"
    assert not is_blocking


def test_a_ray_of_our_own_starts_without_the_helpers_that_nobody_listens_to() -> None:
    node = pytest.importorskip("ray._private.node").Node
    originals = node.start_log_monitor, node.start_monitor
    with ray_private.without_idle_helpers():
        assert node.start_log_monitor(None) is None
        assert node.start_monitor(None) is None
    assert (node.start_log_monitor, node.start_monitor) == originals


def test_a_ray_whose_helpers_have_other_names_starts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = pytest.importorskip("ray._private.node").Node
    monkeypatch.delattr(node, "start_monitor")
    original = node.start_log_monitor
    with ray_private.without_idle_helpers():
        assert node.start_log_monitor is original
