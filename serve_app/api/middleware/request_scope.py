"""The outermost layer: request id, access log, metrics, and every error's answer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.context import RequestInfo, attach_info
from serve_app.api.errors import ClientDisconnectedError, error_response, note_error
from serve_app.api.middleware.fallback import SERVED_BY
from serve_app.core.request_id import REQUEST_ID_HEADER, is_request_id
from serve_app.observability.logs import request_id_var
from serve_app.observability.metrics import IngressMetrics
from serve_app.observability.tracing import (
    TRACEPARENT,
    NullSpan,
    Span,
    Tracing,
    as_current,
    current_span,
    trace_headers,
    trace_id_of,
)

_access = logging.getLogger("serve_app.access")
STATUS_CLIENT_GONE = 499
_PROBES = frozenset({"/health", "/livez", "/readyz", "/metrics"})


class RequestScopeMiddleware:
    """Gives each request its id and answers whatever the layers below raise."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: IngressMetrics,
        endpoints: frozenset[str],
        timed: frozenset[str],
        host_echoes_id: bool = False,
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = endpoints
        self._timed = timed
        self._host_echoes_id = host_echoes_id
        self._tracing = tracing or Tracing()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other kinds of scope pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received_id = _received_id(scope)
        request_id = received_id or uuid.uuid4().hex
        info = RequestInfo(request_id, time.monotonic(), self._endpoint(scope))
        attach_info(scope, info)
        token = request_id_var.set(info.request_id)
        is_echoed = self._host_echoes_id and received_id is not None
        answer = _Answer(send, None if is_echoed else request_id)
        span = self._start_span(scope, info)
        try:
            with as_current(span):
                try:
                    await self._run(scope, receive, answer, info)
                finally:
                    self._report(scope, info, answer)
        finally:
            request_id_var.reset(token)
            span.end()

    def _start_span(self, scope: Scope, info: RequestInfo) -> Span:
        """Return the request's span: only inference makes one, all keep a caller's trace id."""
        carrier = trace_headers(scope["headers"])
        if info.endpoint not in self._timed:
            return NullSpan(trace_id_of(carrier.get(TRACEPARENT, "")))
        return self._tracing.start(
            f"{scope['method']} {info.endpoint}",
            carrier,
            is_server=True,
            attributes={
                "http.request.method": scope["method"],
                "http.route": info.endpoint,
                "url.path": scope["path"],
                "xeray.request_id": info.request_id,
            },
        )

    async def _run(
        self, scope: Scope, receive: Receive, answer: _Answer, info: RequestInfo
    ) -> None:
        try:
            await self._app(scope, receive, answer)
        except (ClientDisconnectedError, ClientDisconnect):
            info.is_client_gone = True
        except asyncio.CancelledError:
            info.is_client_gone = not answer.is_complete
            raise
        except Exception as error:
            response = error_response(error, info.request_id)
            note_error(self._metrics, info.endpoint, info.request_id, error)
            if answer.status is None:
                await response(scope, receive, answer)

    def _report(self, scope: Scope, info: RequestInfo, answer: _Answer) -> None:
        elapsed_s = time.monotonic() - info.arrival_s
        status = STATUS_CLIENT_GONE if info.is_client_gone else (answer.status or 500)
        self._metrics.count_request(info.endpoint, status)
        if info.endpoint in self._timed:
            self._metrics.observe_latency(elapsed_s)
            current_span().set({"http.response.status_code": status})
            if status < 400:
                self._metrics.count_served(answer.served_by)
        # Probes come every few seconds and say nothing while all is well.
        level = logging.DEBUG if info.endpoint in _PROBES and status < 400 else logging.INFO
        if _access.isEnabledFor(level):
            _access.log(
                level,
                "%s %s %d %.1f ms %d bytes",
                scope["method"],
                scope["path"],
                status,
                elapsed_s * 1000,
                answer.num_bytes,
            )

    def _endpoint(self, scope: Scope) -> str:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in self._endpoints:
            return path
        return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"


class _Answer:
    """The `send` of one request: adds the request id, and remembers what went out."""

    __slots__ = ("_request_id", "_send", "is_complete", "num_bytes", "served_by", "status")

    def __init__(self, send: Send, request_id: str | None) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None
        self.num_bytes = 0
        self.is_complete = False
        self.served_by = "local"

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.num_bytes += len(message.get("body", b""))
            self.is_complete = not message.get("more_body", False)
        elif message["type"] == "http.response.start":
            self.status = message["status"]
            if (SERVED_BY, b"fallback") in message.get("headers", ()):
                self.served_by = "fallback"
            if self._request_id is not None:
                MutableHeaders(scope=message)["X-Request-Id"] = self._request_id
        await self._send(message)


def _received_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == REQUEST_ID_HEADER and is_request_id(value):
            return str(value, "ascii")
    return None
