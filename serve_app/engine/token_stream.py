"""The reading end of one request: events gathered until the reader takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve_app.core.events import TokenEvent


class TokenStream:
    """``async for events in stream``: all that came since the last read, up to the terminal event.

    A slow reader only finds longer lists; at most `max_tokens` events ever wait. Only the event
    loop that made it may touch it.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._listener: Callable[[TokenEvent], None] | None = None
        self._is_terminated = False
        self._is_closed = False

    @property
    def is_terminated(self) -> bool:
        """Whether the terminal event has come, read or not."""
        return self._is_terminated

    def close(self) -> None:
        """Stop listening; what still runs is aborted. Safe to call again."""
        if not self._is_closed:
            self._is_closed = True
            self._events.clear()
            if not self._is_terminated:
                self._abort(self.request_id)
            self._wake()

    def divert(self, listener: Callable[[TokenEvent], None]) -> None:
        """Hand events to `listener` in place of the iterator, those that wait first."""
        self._listener = listener
        events, self._events = self._events, []
        for event in events:
            listener(event)

    def put(self, event: TokenEvent) -> None:
        """Add an event; nothing may follow a terminal one."""
        assert not self._is_terminated, f"{self.request_id}: an event after the terminal one"
        self._is_terminated = event.finish_reason is not None
        if self._is_closed:
            return
        if self._listener is not None:
            self._listener(event)
            return
        self._events.append(event)
        self._wake()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        while not self._events:
            if self._is_terminated or self._is_closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
