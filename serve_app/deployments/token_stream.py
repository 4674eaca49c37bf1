"""Gathering of a token stream: few messages, none late that matters, no step that waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from serve_app.core.events import TokenEvent


async def paced(
    stream: AsyncIterator[list[TokenEvent]], interval_s: Callable[[], float]
) -> AsyncIterator[list[TokenEvent]]:
    """Yield a stream's events: the first at once, then what has gathered, once per interval.

    `interval_s` is asked each time, so the pace follows the load. The terminal event does not wait.
    The stream buffers, so a reader that is slow to take what is yielded delays no step.
    """
    loop = asyncio.get_running_loop()
    gathered: list[TokenEvent] = []
    due_s = loop.time()
    while True:
        try:
            async with asyncio.timeout_at(due_s if gathered else None):
                gathered += await anext(stream)
        except TimeoutError:
            pass
        except StopAsyncIteration:
            if gathered:
                yield gathered
            return
        if gathered[-1].finish_reason is not None or loop.time() >= due_s:
            yield gathered
            gathered = []
            due_s = loop.time() + interval_s()
