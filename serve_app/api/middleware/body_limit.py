"""Bodies over the limit get 413, whether they announce their length or come in chunks.

Compressed ones get 400: a small body could unpack to a large one.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.core.errors import ClientError, RequestTooLargeError

_MAX_DISCARDED = 4
"""This many times the limit is read and dropped, so that a client still sending sees the answer."""


class BodyLimitMiddleware:
    """Counts the body as it is read.

    Raises RequestTooLargeError past `max_body_bytes`, and ClientError for a compressed body.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other kinds of scope pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _check_encoding(scope)
        if (_content_length(scope) or 0) > self._max_body_bytes:
            await self._discard(receive, 0)
            raise self._error()
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_body_bytes:
                    if message.get("more_body", False):
                        await self._discard(receive, num_bytes)
                    raise self._error()
            return message

        await self._app(scope, counted, send)

    async def _discard(self, receive: Receive, num_bytes: int) -> None:
        while num_bytes <= _MAX_DISCARDED * self._max_body_bytes:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    def _error(self) -> RequestTooLargeError:
        return RequestTooLargeError(
            f"The request body is larger than the {self._max_body_bytes} bytes allowed here."
        )


def _check_encoding(scope: Scope) -> None:
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise ClientError("Content-Encoding is not supported; send the body uncompressed.")


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit():
                raise ClientError("The Content-Length header is not a number.")
            return int(value)
    return None
