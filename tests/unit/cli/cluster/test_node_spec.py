from __future__ import annotations

import json

import pytest

from serve_app.cli.cluster.node import resolve
from serve_app.cli.cluster.node_spec import HERE, NodeSpec
from serve_app.deployments.environment import serve_environment

WORKER = NodeSpec(
    name="b", cluster="lab", role="worker", address="10.0.0.2", head="10.0.0.1:6379", folder="/x/b"
)
HEAD = WORKER.model_copy(update={"name": "a", "role": "head", "address": "10.0.0.1"})


def test_a_worker_joins_the_head_with_what_it_has() -> None:
    arguments = WORKER.ray_start({"arc_gpu": 2, "xeon_cores": 8}, {"xeray/card-driver": "xe"})

    assert arguments[:3] == ["start", "--address=10.0.0.1:6379", "--node-ip-address=10.0.0.2"]
    (resources,) = [word for word in arguments if word.startswith("--resources=")]
    assert json.loads(resources.partition("=")[2]) == {"arc_gpu": 2, "xeon_cores": 8}
    assert "--labels=xeray/card-driver=xe,xeray/node=b" in arguments
    assert arguments[-1] == "--block"


def test_the_head_listens_and_its_dashboard_does_not() -> None:
    arguments = HEAD.ray_start({}, {})
    assert arguments[:3] == ["start", "--head", "--port=6379"]
    assert "--dashboard-host=127.0.0.1" in arguments
    assert not any(word.startswith("--resources") for word in arguments)


def test_zero_cpus_are_said() -> None:
    assert "--num-cpus=0" in HEAD.model_copy(update={"num_cpus": 0}).ray_start({}, {})
    assert not any(word.startswith("--num-cpus") for word in HEAD.ray_start({}, {}))


def test_the_users_labels_win_and_more_arguments_come_last() -> None:
    spec = WORKER.model_copy(update={"labels": {"room": "b12"}, "ray_args": ("--num-gpus=0",)})
    arguments = spec.ray_start({}, {"room": "none"}, block=False)
    assert "--labels=room=b12,xeray/node=b" in arguments
    assert arguments[-1] == "--num-gpus=0"


def test_every_node_authenticates_and_the_head_keeps_its_state() -> None:
    for spec in (HEAD, WORKER):
        variables = spec.variables()
        assert serve_environment("haproxy").items() <= variables.items()
        assert variables["RAY_AUTH_MODE"] == "token"
        assert variables["RAY_AUTH_TOKEN_PATH"] == "/x/b/auth_token"
        assert int(variables["RAY_gcs_rpc_server_reconnect_timeout_s"]) > 60
    assert HEAD.variables()["RAY_gcs_storage"] == "rocksdb"
    assert "RAY_gcs_storage" not in WORKER.variables()
    in_memory = HEAD.model_copy(update={"gcs_storage": "memory"})
    assert "RAY_gcs_storage" not in in_memory.variables()


def test_the_inventorys_environment_wins() -> None:
    spec = WORKER.model_copy(update={"environment": {"RAY_health_check_period_ms": "500"}})
    assert spec.variables()["RAY_health_check_period_ms"] == "500"


def test_a_host_fills_in_its_own_name_and_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "WS7.example.org")
    spec = WORKER.model_copy(
        update={"name": HERE, "address": HERE, "head": "127.0.0.1:6379", "folder": f"~/x/{HERE}"}
    )
    resolved = resolve(spec)
    assert (resolved.name, resolved.address) == ("ws7-example-org", "127.0.0.1")
    assert resolved.folder == "~/x/ws7-example-org"
    assert resolve(WORKER) == WORKER
