"""A replica that dies or hangs under greedy streams: each goes on elsewhere, word for word."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

NUM_STREAMS = 8
MAX_TOKENS = 240
TWO_CARDS = {"model_replica": {"pool": "arc", "num_replicas": 2}}


def num_moved(app: Any) -> float:
    """Return how many requests went on elsewhere, after their first token or before it."""
    names = ("xeray_streams_continued_total", "xeray_requests_retried_total")
    text = httpx.get(f"{app.url}/metrics", timeout=10).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in names
    )


async def stream(client: httpx.AsyncClient, app: Any, number: int) -> tuple[str, dict[str, Any]]:
    """Return a greedy stream's text and usage. Raises AssertionError on an error event."""
    body = {
        "model": "any",
        "prompt": f"Stream {number}",
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, usage = "", {}
    async with client.stream("POST", f"{app.url}/v1/completions", json=body) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
            usage = event.get("usage") or usage
    return text, usage


def start_streams(app: Any) -> Future[list[tuple[str, dict[str, Any]]]]:
    async def run() -> list[tuple[str, dict[str, Any]]]:
        async with httpx.AsyncClient(timeout=90) as client:
            return await asyncio.gather(*(stream(client, app, n) for n in range(NUM_STREAMS)))

    executor = ThreadPoolExecutor(1)
    future = executor.submit(asyncio.run, run())
    executor.shutdown(wait=False)
    return future


def busy(states: list[Any]) -> bool:
    """Whether the two replicas work on all the streams."""
    counts = [state["num_streams"] for state in states]
    return len(counts) == 2 and sum(counts) == NUM_STREAMS


def test_greedy_streams_outlive_their_replica(deployed: Callable[..., Any]) -> None:
    app = deployed(TWO_CARDS)
    app.wait_states("ModelReplica", lambda s: len(s) == 2)
    undisturbed = start_streams(app).result(timeout=60)
    assert {usage["completion_tokens"] for _, usage in undisturbed} == {MAX_TOKENS}

    running = start_streams(app)
    victim = max(app.wait_states("ModelReplica", busy), key=lambda s: s["num_streams"])
    app.kill(victim["pid"])

    assert running.result(timeout=60) == undisturbed
    assert num_moved(app) == victim["num_streams"]

    # The same with one that is stopped: nobody reports its death, its silence is enough.
    app.wait_states("ModelReplica", lambda s: len(s) == 2)
    running = start_streams(app)
    victim = max(app.wait_states("ModelReplica", busy), key=lambda s: s["num_streams"])
    app.kill(victim["pid"], signal.SIGSTOP)
    wake = threading.Timer(25.0, app.kill, (victim["pid"], signal.SIGCONT))
    wake.start()
    try:
        assert running.result(timeout=60) == undisturbed
        assert wake.is_alive(), "no stream waited for it"
    finally:
        wake.cancel()
        app.kill(victim["pid"])
