"""What clients see when a part dies, hangs, or they leave: an answer, and service again soon."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import httpx

BACK_WITHIN_S = 15.0
TYPED = {"done", "internal_error", "queue_full", "no_replica", "model_loading"}


def wait_for_answer(app: Any, since_s: float) -> float:
    """Ask until an answer comes; returns the seconds since `since_s`."""
    while True:
        response = app.chat()
        if response.status_code == 200:
            return time.monotonic() - since_s
        assert response.status_code in (500, 503), response.text
        assert response.json()["error"]["code"]
        assert time.monotonic() - since_s < 60
        time.sleep(0.2)


def test_killed_replica_under_64_streams(shared_app: Any) -> None:
    app = shared_app
    running = app.start_streams(64, max_tokens=800)
    (victim,) = app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 64)

    app.kill(victim["pid"])
    killed_s = time.monotonic()

    assert wait_for_answer(app, killed_s) < BACK_WITHIN_S
    ends = running.result(timeout=60)
    assert set(ends) <= TYPED, ends
    assert "internal_error" in ends, "a stream whose replica died says so"


def test_hung_engine_under_64_streams(shared_app: Any) -> None:
    app = shared_app
    running = app.start_streams(64, max_tokens=800)
    (before,) = app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 64)

    app.kill(before["engine_pid"], signal.SIGSTOP)
    stopped_s = time.monotonic()

    assert wait_for_answer(app, stopped_s) < BACK_WITHIN_S
    ends = running.result(timeout=60)
    assert set(ends) <= TYPED, ends
    assert "internal_error" in ends
    after = app.one("ModelReplica")
    assert after["pid"] == before["pid"], "the engine alone is restarted"
    assert after["engine_pid"] != before["engine_pid"]


def test_a_client_that_leaves_ends_its_sequence(shared_app: Any) -> None:
    app = shared_app
    url = f"{app.url}/v1/completions"
    body = {"model": "any", "prompt": "Go", "max_tokens": 2000}
    num_aborted = app.one("ModelReplica", "stats").num_aborted_total

    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=30) as response:
        pieces = response.iter_text()
        next(pieces)
        app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 1)
    app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 0, timeout_s=5)

    try:
        httpx.post(url, json=body, timeout=1.0)
    except httpx.ReadTimeout:
        pass
    else:
        raise AssertionError("2000 tokens at 100 a second take longer")
    app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 0, timeout_s=5)
    stats = app.one("ModelReplica", "stats")
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_aborted_total - num_aborted == 2


def test_killed_ingress_leaves_the_other(deployed: Callable[..., Any]) -> None:
    app = deployed({"ingress": {"num_replicas": 2}})
    states = app.wait_states("Ingress", lambda s: len(s) == 2)

    app.kill(states[0]["pid"])

    assert wait_for_answer(app, time.monotonic()) < BACK_WITHIN_S
    app.wait_states("Ingress", lambda s: len(s) == 2)


def test_a_full_queue_is_a_typed_error(deployed: Callable[..., Any]) -> None:
    app = deployed({"engine": {"max_num_seqs": 1}, "model_replica": {"max_queued_requests": 1}})
    running = app.start_streams(2, max_tokens=300)
    app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 2)

    response = app.chat()

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "queue_full"
    assert "retry-after" in response.headers
    samples = httpx.get(f"{app.url}/metrics", timeout=10).text.splitlines()
    retried = [line for line in samples if line.startswith("xeray_requests_retried_total{")]
    assert [float(line.split()[-1]) for line in retried] == [0.0], "the only queue is full: no use"
    assert running.result(timeout=60) == ["done"] * 2


def test_drain_lets_streams_finish(deployed: Callable[..., Any]) -> None:
    app = deployed()
    running = app.start_streams(4, max_tokens=400)
    app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 4)

    assert httpx.post(f"{app.url}/admin/drain", timeout=10).status_code == 200

    assert httpx.get(f"{app.url}/readyz", timeout=10).json()["status"] == "draining"
    assert app.chat().json()["error"]["code"] == "draining"
    assert running.result(timeout=60) == ["done"] * 4
