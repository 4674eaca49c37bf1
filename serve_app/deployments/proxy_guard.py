"""What stands before Serve's own HTTP server: no switches from outside, no client that never reads.

Serve asks `layers` wherever it makes such a server (its Python proxy on each node; each ingress
replica behind HAProxy), as `serve_environment` tells it to.
"""

from __future__ import annotations

import logging
import socket

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.config.env import PROXY_SEND_TIMEOUT_S, read_seconds
from serve_app.core.request_id import REQUEST_ID_HEADER, is_request_id

logger = logging.getLogger(__name__)

_SERVE_HEADERS = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"x-session-id",
        b"serve-multiplexed-model-id",
    }
)
"""What Serve obeys from any client, `-` or `_` between the words: the first two change its
deadline and its watch over clients that leave, the others choose the replica."""


def layers() -> list[Middleware]:
    """Return the middleware of one of Serve's HTTP servers."""
    return [Middleware(ProxyGuard, send_timeout_s=read_seconds(PROXY_SEND_TIMEOUT_S))]


class ProxyGuard:
    """Drops the headers that are Serve's own switches, and ends clients that do not read.

    A request id that cannot stand in logs goes too: Serve would echo it as it is, beside ours.

    The bound is the kernel's (TCP_USER_TIMEOUT): once a client's receive window is full, or it is
    gone without a word, for `send_timeout_s`, its connection is reset, and the request ends as
    with any client that leaves. Waiting for `send` would not do: megabytes fit into the socket's
    buffers first, more than most answers have.
    """

    def __init__(self, app: ASGIApp, send_timeout_s: float) -> None:
        self._app = app
        self._send_timeout_ms = min(round(send_timeout_s * 1000), 2**31 - 1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other kinds of scope pass through."""
        if scope["type"] == "http":
            headers = scope["headers"]
            scope["headers"] = [pair for pair in headers if _may_pass(*pair)]
            self._bound(send)
        await self._app(scope, receive, send)

    def _bound(self, send: Send) -> None:
        # ASGI has no name for the connection; uvicorn's `send` is a method of what holds it.
        transport = getattr(getattr(send, "__self__", None), "transport", None)
        connection = transport.get_extra_info("socket") if transport is not None else None
        if connection is None or not hasattr(socket, "TCP_USER_TIMEOUT"):
            return
        try:
            connection.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._send_timeout_ms
            )
        except OSError as error:  # the client may be gone already
            logger.debug("no bound on a connection's unread bytes: %s", error)


def _may_pass(name: bytes, value: bytes) -> bool:
    if name == REQUEST_ID_HEADER:
        return is_request_id(value)
    return name.replace(b"_", b"-") not in _SERVE_HEADERS
