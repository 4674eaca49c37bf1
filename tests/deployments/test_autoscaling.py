"""Replicas follow the load, never beyond the cards, and nobody notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 4,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 1.0,
    "look_back_period_s": 1.0,
    "metrics_interval_s": 0.5,
}


def test_one_two_one_under_load(deployed: Callable[..., Any]) -> None:
    app = deployed({"model_replica": {"pool": "arc", "autoscaling": AUTOSCALING}})
    assert len(app.states("ModelReplica")) == 1

    running = app.start_streams(16, max_tokens=1000)
    scaled = app.wait_states("ModelReplica", lambda s: len(s) == 2)
    assert sorted(state["card_indices"] for state in scaled) == [(0,), (1,)]
    more = app.run_streams(16, max_tokens=100)

    assert more + running.result(timeout=90) == ["done"] * 32
    app.wait_states("ModelReplica", lambda s: len(s) == 1, timeout_s=40)
    assert app.chat().status_code == 200
