"""Batching toggles change on the running process, through `user_config`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest


def test_batching_modes_under_sixteen_streams(shared_app: Any) -> None:
    app = shared_app
    before = app.one("ModelReplica")
    running = app.start_streams(16, max_tokens=800)

    app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 16)
    for mode in ("static", "off", "continuous"):
        # A bare `off` in YAML is False.
        app.reconfigure("ModelReplica", {"batching": {"mode": False if mode == "off" else mode}})
        (after,) = app.wait_states(
            "ModelReplica", lambda s, m=mode: s and s[0]["toggles"]["batching"]["mode"] == m
        )
        stats = app.one("ModelReplica", "stats")
        assert stats.mode == mode
        assert (after["pid"], after["engine_pid"]) == (before["pid"], before["engine_pid"])

    assert running.result(timeout=120) == ["done"] * 16


def test_toggles_that_cannot_be_leave_everything_as_it_was(shared_app: Any) -> None:
    app = shared_app
    before = app.one("ModelReplica")

    app.reconfigure("ModelReplica", {"batching": {"max_num_seqs": 10_000}})

    app.wait_states(
        "ModelReplica", lambda s: s and "user_config refused" in s[0].detail, method="health"
    )
    after = app.one("ModelReplica")
    assert (after["pid"], after["toggles"]) == (before["pid"], before["toggles"])
    assert app.chat().status_code == 200


@pytest.mark.parametrize("enabled", [False, True])
def test_micro_batching(shared_app: Any, enabled: bool) -> None:
    from serve_app.core.requests import PrepareRequest

    app = shared_app
    before = app.one("Preprocessor")
    toggles = {"enabled": enabled, "max_batch_size": 16, "batch_wait_timeout_s": 0.2}
    app.reconfigure("Preprocessor", {"micro_batching": toggles})
    app.wait_states("Preprocessor", lambda s: s and s[0]["micro_batching"] == toggles)
    prepare = app.handle("Preprocessor").prepare

    calls = [prepare.remote(PrepareRequest(str(i), text=f"text {i}")) for i in range(16)]
    answers = [call.result(timeout_s=30) for call in calls]

    assert len({answer.token_ids for answer in answers}) == 16, "each got its own"
    after = app.one("Preprocessor")
    assert after["pid"] == before["pid"]
    sizes = Counter(after["batch_sizes"]) - Counter(before["batch_sizes"])
    assert sum(size * count for size, count in sizes.items()) == 16
    mean = 16 / sum(sizes.values())
    assert mean > 1 if enabled else mean == 1


def test_off_runs_one_at_a_time(deployed: Callable[..., Any]) -> None:
    app = deployed({"model_replica": {"batching": {"mode": "off"}}})

    assert app.run_streams(4, max_tokens=20) == ["done"] * 4

    stats = app.one("ModelReplica", "stats")
    assert stats.max_num_running == 1
