"""The middleware that Serve puts before its own HTTP servers."""

from __future__ import annotations

import asyncio
import importlib
import socket
from typing import Any

import pytest
import uvicorn

from serve_app.core.errors import ConfigError
from serve_app.deployments.environment import serve_environment
from serve_app.deployments.proxy_guard import ProxyGuard, layers


def test_serve_is_told_of_the_layers_in_both_modes() -> None:
    for mode in ("python", "haproxy"):
        path = serve_environment(mode)["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
        module, _, name = path.partition(":")
        assert getattr(importlib.import_module(module), name) is layers


def test_the_bound_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XERAY_PROXY_SEND_TIMEOUT_S", "2.5")
    (layer,) = layers()
    assert layer.cls is ProxyGuard
    assert layer.kwargs == {"send_timeout_s": 2.5}
    monkeypatch.setenv("XERAY_PROXY_SEND_TIMEOUT_S", "soon")
    with pytest.raises(ConfigError, match="XERAY_PROXY_SEND_TIMEOUT_S: expected seconds"):
        layers()


async def test_serves_own_headers_are_dropped() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    guard = ProxyGuard(app, send_timeout_s=1.0)
    kept = [(b"x-request-id", b"1"), (b"authorization", b"Bearer k")]
    dropped = [
        (b"x-request-timeout-seconds", b"-1"),
        (b"x-request-disconnect-disabled", b"?1"),
        (b"x-session-id", b"a"),
        (b"x_session_id", b"b"),
        (b"serve_multiplexed_model_id", b"c"),
        (b"serve-multiplexed_model-id", b"d"),
        (b"x-request-id", b"not an id"),
        (b"x-request-id", b"a" * 129),
    ]
    scope = {"type": "http", "headers": [*dropped, *kept]}
    await guard(scope, None, None)  # type: ignore[arg-type]
    await guard({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == [{"type": "http", "headers": kept}, {"type": "lifespan"}]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone bounds it")
async def test_a_client_that_never_reads_is_ended_as_one_that_left() -> None:
    ended = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        watching = asyncio.create_task(watch())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not watching.done():
            await send({"type": "http.response.body", "body": b"x" * 1024, "more_body": True})
            await asyncio.sleep(0)
        ended.set()

    listener = socket.create_server(("127.0.0.1", 0))
    app = ProxyGuard(endless, send_timeout_s=0.3)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
    serving = asyncio.create_task(server.serve([listener]))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(ended.wait(), 10)
    server.should_exit = True
    await serving
