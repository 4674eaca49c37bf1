"""Sends a generation request to the upstream where this service is slow or has no replica.

It asks the policy before the local service is tried (latency), and again after the local service
refused a request that it had not begun to answer (no replica, queue full). An answer that has begun
is never moved. Embeddings stay here: vectors of two models do not compare.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.context import RequestInfo, info_of
from serve_app.api.errors import ClientDisconnectedError
from serve_app.api.fallback.passage import (
    CHAT_PATH,
    RESPONSES_PATH,
    BrokenAnswerError,
    Passage,
    passage_of,
)
from serve_app.api.fallback.policy import FallbackPolicy
from serve_app.api.fallback.upstream import NO_ANSWER, Upstream, UpstreamAnswer, UpstreamError
from serve_app.core.errors import ClientError, EngineError, OverloadedError

_logger = logging.getLogger(__name__)

PATHS = frozenset({CHAT_PATH, "/v1/completions", RESPONSES_PATH})
"""What an OpenAI-compatible upstream can answer."""
SERVED_BY = b"x-xeray-served-by"
_LOCAL_ONLY = b"x-xeray-local-only"


class FallbackMiddleware:
    """Passes everything through but for what the policy lets go."""

    def __init__(self, app: ASGIApp, policy: FallbackPolicy, upstream: Upstream) -> None:
        self._app = app
        self._policy = policy
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other kinds of scope pass through."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in PATHS:
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive)
        asked = _asked(body)
        if asked is None or _must_stay(scope, asked):
            await self._app(scope, _replay(body, receive), _Marked(send, "local"))
            return
        if self._policy.is_slow() and (passage := self._passage(path, body, asked)) is not None:
            try:
                await self._divert(passage, scope, send)
                return
            except UpstreamError:
                _logger.info("fallback: slow is better than nothing")
        marked = _Marked(send, "local")
        try:
            await self._app(scope, _replay(body, receive), marked)
        except (OverloadedError, EngineError) as error:
            passage = None if marked.has_begun else self._passage(path, body, asked)
            if passage is None:
                raise
            _logger.info("fallback: the service refused (%s)", error.code)
            await self._divert(passage, scope, send)

    def _passage(self, path: str, body: bytes, asked: dict[str, Any]) -> Passage | None:
        """Return how the request may go to the upstream now, None where it may not."""
        try:
            passage = passage_of(path, body, asked, self._upstream.model)
        except ClientError:  # the local service tells the client what is wrong
            return None
        return passage if self._policy.try_enter() else None

    async def _divert(self, passage: Passage, scope: Scope, send: Send) -> None:
        """Answer from the upstream. Raises UpstreamError before anything was sent."""
        breaker = self._policy.breaker
        info = info_of(scope)
        try:
            answer = await self._upstream.send(passage.path, passage.body, info.request_id)
        except UpstreamError:
            breaker.failed()
            raise
        except BaseException:
            breaker.abandoned()
            raise
        async with answer.stack:
            await self._pass_on(passage, answer, info, send)

    async def _pass_on(
        self, passage: Passage, answer: UpstreamAnswer, info: RequestInfo, send: Send
    ) -> None:
        is_stream = answer.content_type.startswith("text/event-stream")
        headers = [(b"content-type", answer.content_type.encode()), (SERVED_BY, b"fallback")]
        start = {"type": "http.response.start", "status": answer.status, "headers": headers}
        closing, has_begun = b"", False
        try:
            async for data in passage.pieces(_counted(answer, is_stream), is_stream):
                if not has_begun:
                    await send(start)
                    has_begun = True
                await send({"type": "http.response.body", "body": data, "more_body": True})
            answer.counter.finish(is_stream=is_stream)
            self._policy.breaker.succeeded()
        except (httpx.HTTPError, BrokenAnswerError) as error:
            self._policy.breaker.failed()
            _logger.warning("fallback: the upstream broke off: %s", type(error).__name__)
            broken = EngineError("The upstream broke the answer off.")
            if not has_begun:
                raise UpstreamError(NO_ANSWER) from error
            if not is_stream:
                raise ClientDisconnectedError from None  # the length is told: all we can do is end
            closing = passage.failure(broken, info.request_id)
        except BaseException:
            self._policy.breaker.abandoned()
            raise
        finally:
            num_tokens = answer.counter.num_tokens
            self._policy.budget.charge(num_tokens)
            if info.lease is not None and num_tokens:
                info.lease.add_tokens(num_tokens)
        if not has_begun:
            await send(start)
        await send({"type": "http.response.body", "body": closing})


async def _counted(answer: UpstreamAnswer, is_stream: bool) -> AsyncIterator[bytes]:
    async for data in answer.body:
        answer.counter.feed(data, is_stream=is_stream)
        yield data


class _Marked:
    """A `send` that names who answers, and knows whether the answer has begun."""

    def __init__(self, send: Send, served_by: str) -> None:
        self._send = send
        self._served_by = served_by.encode()
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            message = {
                **message,
                "headers": [*message.get("headers", ()), (SERVED_BY, self._served_by)],
            }
        await self._send(message)


async def _read_body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body once, then what really comes."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _asked(body: bytes) -> dict[str, Any] | None:
    """Return the request's object; None where it is none, and the local service says so."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _must_stay(scope: Scope, asked: dict[str, Any]) -> bool:
    """Whether key, header or metadata keep the request here.

    A key for some models leaves with one of their ids alone: what else a name may stand for, only
    the local service knows.
    """
    key = info_of(scope).key
    if key is not None and (key.local_only or not key.allows_model(str(asked.get("model")))):
        return True
    if any(name == _LOCAL_ONLY and value != b"false" for name, value in scope["headers"]):
        return True
    metadata = asked.get("metadata")
    return isinstance(metadata, dict) and str(metadata.get("local_only", "")).lower() == "true"
