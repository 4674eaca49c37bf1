"""Several pools of one model: ranks, spilling, waiting, and prefixes, on simulated cards."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

import httpx

POOLS = {
    "engine": {"max_num_seqs": 2, "fixed_rate_tokens_per_s": 50},
    "model_replica": {"max_queued_requests": 8},
    "pools": [
        {"name": "arc", "model_replica": {"pool": "arc", "num_replicas": 2}},
        {"name": "cpu", "model_replica": {"pool": "cpu"}, "engine": {"max_num_seqs": 8}},
    ],
}


def streams_of(app: Any) -> dict[str, int]:
    """Return how many sequences run on each replica, by its card or pool."""
    states = [*app.states("ModelReplica"), *app.states("ModelReplica-cpu")]
    return {
        f"arc{state['card_indices'][0]}" if state["card_indices"] else "cpu": state["num_streams"]
        for state in states
    }


def wait_until_the_ingress_knows(app: Any, num_replicas: int) -> None:
    """Serve tells of replicas before the ingress has asked them: until then it spills."""
    deadline_s = time.monotonic() + 20
    while (known := num_ready(app)) != num_replicas:
        assert time.monotonic() < deadline_s, known
        time.sleep(0.1)


def num_ready(app: Any) -> int:
    replicas = httpx.get(f"{app.url}/health", timeout=10).json()["replicas"]
    return sum(replica["state"] == "ready" for replica in replicas)


def test_requests_fill_the_first_pool_then_spill_and_prefixes_stay(
    deployed: Callable[..., Any],
) -> None:
    app = deployed(POOLS)
    app.wait_states("ModelReplica-cpu", lambda states: len(states) == 1)
    app.wait_states("ModelReplica", lambda states: len(states) == 2)
    wait_until_the_ingress_knows(app, 3)

    # The same long prompt each time, one after the other: one replica gets them all.
    prompt = "The same long beginning of a question. " * 20
    for _ in range(6):
        answer = app.chat(messages=[{"role": "user", "content": prompt}], max_tokens=2)
        assert answer.status_code == 200
    totals = [stats.num_prompt_tokens_total for stats in app.states("ModelReplica", "stats")]
    assert sorted(total > 0 for total in totals) == [False, True], totals

    url = f"{app.url}/v1/completions"
    body = {"model": "any", "prompt": "Go", "max_tokens": 1000, "stream": True}
    with concurrent.futures.ThreadPoolExecutor() as executor:
        with httpx.stream("POST", url, json=body, timeout=60):  # the first pool's first place
            running = executor.submit(app.run_streams, 11, 200)
            wait_for_streams(app, 12)
            assert (found := streams_of(app)) == {"arc0": 2, "arc1": 2, "cpu": 8}, found
            waiting = executor.submit(app.run_streams, 3, 5)
            wait_for_streams(app, 15)
        # One place comes free: what waits at the other replicas moves there, one after the other.
        assert waiting.result(timeout=60) == ["done"] * 3
        assert "xeray_requests_moved_total 0.0" not in httpx.get(f"{app.url}/metrics").text
        assert running.result(timeout=60) == ["done"] * 11


def wait_for_streams(app: Any, count: int) -> None:
    deadline_s = time.monotonic() + 20
    while (found := sum(streams_of(app).values())) != count:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.05)
