"""Tokens reach the client beside Ray's streams, in the mode that the local config starts."""

from __future__ import annotations

from typing import Any

import httpx


def count(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_all_but_the_first_token_travel_over_the_relay(service: Any, model: str) -> None:
    before = count(service.url, "xeray_relay_chunks_total")
    body = {"model": model, "prompt": "Once", "max_tokens": 40, "ignore_eos": True}

    answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=120)

    assert answer.json()["usage"]["completion_tokens"] == 40
    assert count(service.url, "xeray_relay_chunks_total") > before
    assert count(service.url, "xeray_relay_lost_requests_total") == 0
