"""Bounds on how long a client may take to send its request, and to take its answer.

Without them a client that stops reading, or that vanished without a word, would hold its place in
the admission for as long as its connection looks alive, which may be for ever.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.errors import ClientDisconnectedError
from serve_app.core.errors import ClientError


class RequestTimeoutError(ClientError):
    """The request's body did not come in time."""

    status = 408
    code = "request_timeout"


class PatienceMiddleware:
    """Raises RequestTimeoutError for a body that is late, ends an answer that nobody takes.

    receive_timeout_s: for the whole body. send_timeout_s: for one piece of the answer to leave;
    only a full send buffer makes a piece wait.
    """

    def __init__(self, app: ASGIApp, receive_timeout_s: float, send_timeout_s: float) -> None:
        self._app = app
        self._receive_timeout_s = receive_timeout_s
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other kinds of scope pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        due_s = asyncio.get_running_loop().time() + self._receive_timeout_s
        is_complete = False

        async def receive_in_time() -> Message:
            nonlocal is_complete
            if is_complete:  # what follows is the client's leaving: any time is right
                return await receive()
            try:
                async with asyncio.timeout_at(due_s):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeoutError(
                    f"The request's body did not come within {self._receive_timeout_s:g} s."
                ) from None
            is_complete = not message.get("more_body", False)
            return message

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnectedError from None

        await self._app(scope, receive_in_time, send_in_time)
