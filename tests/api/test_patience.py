"""Clients that send drop by drop, stop reading, or vanish: none holds its place for long."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


async def test_a_body_that_does_not_come_is_a_408_and_leaves_its_place(make_app, backend, fakes):
    app = make_app(receive_timeout_s=0.05)
    exchange = fakes["Exchange"](app, CHAT, HELLO)
    first = exchange.inbox.get_nowait()
    exchange.inbox.put_nowait({**first, "body": first["body"][:10], "more_body": True})
    await asyncio.wait_for(exchange.run(), 5)
    assert exchange.sent[0]["status"] == 408
    error = json.loads(exchange.text)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_timeout")
    assert app.state.context.admission.num_in_flight == 0
    assert backend.requests == []


async def test_drops_count_together(make_app, fakes):
    exchange = fakes["Exchange"](make_app(receive_timeout_s=0.1), CHAT, HELLO)
    exchange.inbox.get_nowait()

    async def drip() -> None:
        while True:
            exchange.inbox.put_nowait({"type": "http.request", "body": b" ", "more_body": True})
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    await asyncio.wait_for(exchange.run(), 5)
    dripping.cancel()
    assert exchange.sent[0]["status"] == 408


async def test_a_client_may_leave_long_after_its_body(make_app, backend, fakes):
    """The bound is for the body: the wait for a disconnect takes as long as the answer."""
    gate = asyncio.Event()
    backend.script = [gate, *fakes["chunks"]("ok")]
    exchange = fakes["Exchange"](make_app(receive_timeout_s=0.05), CHAT, HELLO)
    running = asyncio.create_task(exchange.run())
    await backend.started.wait()
    await asyncio.sleep(0.1)
    gate.set()
    await running
    assert exchange.sent[0]["status"] == 200


@pytest.mark.parametrize("more", [{"stream": True}, {}])
async def test_an_answer_that_nobody_takes_ends_its_sequence(make_app, backend, fakes, more):
    backend.script = [*fakes["chunks"]("Hel", "lo")[:2], asyncio.Event()]
    if not more:
        backend.script = fakes["chunks"]("Hel", "lo")
    app = make_app(send_timeout_s=0.05)
    exchange = fakes["Exchange"](app, CHAT, {**HELLO, **more})
    blocked = asyncio.Event()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            blocked.set()
            await asyncio.Event().wait()

    exchange.send = send
    await asyncio.wait_for(exchange.run(), 5)
    assert blocked.is_set()
    assert backend.all_closed.is_set()
    assert app.state.context.admission.num_in_flight == 0


@pytest.fixture
def endless(backend: Any, fakes: dict[str, Any]) -> list[str]:
    """The backend streams long texts for ever, and tells which sequences were closed."""
    first = fakes["chunks"]("x" * 10_000)[0]

    async def generate(model_id, request):
        backend.requests.append(request)
        backend.started.set()
        try:
            place = 0
            while True:
                place += 1
                yield replace(first, num_generated=place)
                await asyncio.sleep(0)
        finally:
            backend.closed.append(request.request_id)

    backend.generate = generate
    return backend.closed


async def test_a_client_that_stops_reading_is_cut_off(
    make_app: Callable[..., Starlette],
    run_server: Callable[[Starlette], str],
    backend: Any,
    endless: list[str],
) -> None:
    """A real server and a real socket whose receiver never takes a byte: no FIN, no RST."""
    app = make_app(send_timeout_s=0.2)
    host, port = run_server(app).removeprefix("http://").split(":")
    body = json.dumps({**HELLO, "stream": True}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.to_thread(_connect, client, (host, int(port)))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        client.sendall(head + body)
        async with asyncio.timeout(10):
            while not endless:
                await asyncio.sleep(0.02)
            while app.state.context.admission.num_in_flight:
                await asyncio.sleep(0.02)
    assert len(endless) == len(backend.requests) == 1


def _connect(client: socket.socket, address: tuple[str, int]) -> None:
    """Connect, as soon as the server listens."""
    for _ in range(500):
        try:
            client.connect(address)
        except ConnectionRefusedError:
            time.sleep(0.01)
            continue
        return
    raise AssertionError("the server does not listen")
