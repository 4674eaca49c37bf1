"""The client's side of calls that the engine answers with its statistics."""

from __future__ import annotations

import asyncio
from typing import Any

from serve_app.core.errors import XeRayError
from serve_app.core.events import EngineStats
from serve_app.engine.engine_process import EngineProcess
from serve_app.engine.wire import unpack_error


class EngineCalls:
    """Open calls by number. All calls come from the client's event loop."""

    def __init__(self) -> None:
        self._open: dict[int, asyncio.Future[EngineStats]] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    async def ask(
        self, process: EngineProcess, number: int, kind: str, args: tuple[Any, ...]
    ) -> EngineStats:
        """Send a call and wait for its answer. Raises what the engine raised."""
        future: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._open[number] = future
        try:
            process.send(kind, number, *args)
            return await future
        finally:
            self._open.pop(number, None)

    def on_reply(self, number: int, stats: EngineStats, error: list[Any] | None) -> None:
        """Take the engine's answer; one that nobody waits for any more is dropped."""
        future = self._open.get(number)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(stats)
        else:
            future.set_exception(unpack_error(error))

    def fail(self, error: XeRayError) -> None:
        """End all of them: the engine is lost."""
        for future in self._open.values():
            if not future.done():
                future.set_exception(error)
