"""The client's side of profiles: what was asked of the engine's process and is not answered yet."""

from __future__ import annotations

import asyncio
from typing import Any

from serve_app.core.errors import XeRayError
from serve_app.engine.engine_process import EngineProcess
from serve_app.engine.wire import unpack_error


class ProfileCalls:
    """Open profiles by number. All calls come from the client's event loop."""

    def __init__(self) -> None:
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}

    @property
    def is_active(self) -> bool:
        """Whether a profile is being taken: its steps are slower, and its trace takes time."""
        return bool(self._open)

    async def take(
        self, process: EngineProcess, number: int, num_steps: int, path: str, timeout_s: float
    ) -> dict[str, Any]:
        """Ask for a profile and wait; after `timeout_s` the steps so far must do."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[number] = future
        try:
            process.send("profile", number, num_steps, path)
            done, _ = await asyncio.wait({future}, timeout=timeout_s)
            if not done:
                process.send("profile_end", number)
            return await future
        finally:
            if not future.done():
                process.send("profile_end", number)
            self._open.pop(number, None)

    def on_reply(
        self, number: int, figures: dict[str, Any] | None, error: list[Any] | None
    ) -> None:
        """Take the engine's answer; one that nobody waits for any more is dropped."""
        future = self._open.get(number)
        if future is None or future.done():
            return
        if error is not None:
            future.set_exception(unpack_error(error))
        else:
            future.set_result(figures or {})

    def fail(self, error: XeRayError) -> None:
        """End all of them: the engine is lost."""
        for future in self._open.values():
            if not future.done():
                future.set_exception(error)
