"""The policy engine_load on a live Serve: up under load, to zero when idle, back on demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

AUTOSCALING = {
    "policy": "engine_load",
    "targets": {"waiting_tokens": 20, "ttft_p95_s": 0.5},
    "min_replicas": 0,
    "max_replicas": 6,  # two cards exist
    "target_ongoing_requests": 4,
    "upscale_delay_s": 0.2,
    "downscale_delay_s": 1.0,
    "downscale_to_zero_delay_s": 1.0,
    "look_back_period_s": 1.0,
    "metrics_interval_s": 0.5,
}


def test_scales_up_to_the_cards_down_to_zero_and_back(deployed: Callable[..., Any]) -> None:
    app = deployed(
        {
            "engine": {"max_num_seqs": 2},
            "model_replica": {"pool": "arc", "autoscaling": AUTOSCALING},
        }
    )
    running = app.start_streams(12, max_tokens=200)  # six rounds on one replica: prompts wait
    app.wait_states("ModelReplica", lambda states: len(states) == 2)
    assert running.result(timeout=90) == ["done"] * 12

    app.wait_states("ModelReplica", lambda states: not states, timeout_s=30)
    assert app.chat().status_code == 200, "a request wakes a replica and waits for it"
