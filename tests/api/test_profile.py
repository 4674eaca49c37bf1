"""POST /admin/profile over a scripted backend."""

from __future__ import annotations

import pytest

from serve_app.core.errors import EngineError

FIGURES = {
    "replica_id": "r1", "host": "ws1", "trace": "/tmp/xeray-profile-x/trace.json", "device": "CPU",
    "num_steps": 7, "step_s": 0.01,
    "operators": [{"name": "aten::mm", "calls": 70, "seconds": 0.05, "share": 0.7}],
    "host_operators": [], "copied_bytes": 4096.0, "synchronisations": 0.0, "kernel_launches": 0.0,
    "operator_calls": 120.0, "idle_s": None, "idle_share": None, "read_bytes_per_s": 1e9,
    "bandwidth_share": None, "captured_step_s": None, "uncaptured_step_s": None,
    "capture_speedup": None,
}  # fmt: skip


async def test_a_profile_is_asked_for_and_answered_whole(client, backend):
    backend.figures = FIGURES
    answer = await client.post("/admin/profile", json={"steps": 7, "timeout_s": 3})
    assert answer.status_code == 200
    assert answer.json() == FIGURES
    await client.post("/admin/profile")
    assert backend.profiles == [(7, 3.0), (20, 30.0)], "an empty body takes the defaults"


@pytest.mark.parametrize("body", [{"steps": 0}, {"steps": 501}, {"timeout_s": 0}])
async def test_limits_name_their_parameter(client, backend, body):
    answer = await client.post("/admin/profile", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(body))
    assert backend.profiles == []


async def test_only_administrators_may_profile(make_client, backend):
    answer = await make_client(peer="192.0.2.7").post("/admin/profile")
    assert answer.status_code == 403
    assert backend.profiles == []


async def test_an_idle_engine_is_told_so(client, backend):
    backend.failure = EngineError("no step ran while it was profiled; send requests meanwhile")
    answer = await client.post("/admin/profile")
    assert answer.status_code == 500
    assert "no step ran" in answer.json()["error"]["message"]
