"""Tokens reach the client beside Ray's streams, in the mode that the local config starts."""

from __future__ import annotations

import time
from typing import Any

import httpx

PUBLISHED_WITHIN_S = 20.0  # an ingress publishes its counters every few seconds


def count(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_all_but_the_first_token_travel_over_the_relay(service: Any, model: str) -> None:
    before = count(service.url, "xeray_relay_chunks_total")
    body = {"model": model, "prompt": "Once", "max_tokens": 40, "ignore_eos": True}

    answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=120)

    assert answer.json()["usage"]["completion_tokens"] == 40
    deadline_s = time.monotonic() + PUBLISHED_WITHIN_S
    while count(service.url, "xeray_relay_chunks_total") == before:
        assert time.monotonic() < deadline_s, "no token travelled over the relay"
        time.sleep(0.25)
    assert count(service.url, "xeray_relay_lost_requests_total") == 0
