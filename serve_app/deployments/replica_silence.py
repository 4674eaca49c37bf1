"""Replicas that say nothing any more, though nobody reports their death: paused, or cut off.

Ray tells of a dead process at once, of a lost host or a stopped process after many seconds. A
stream whose replica neither sent it anything nor answered for its health for SILENT_S is given up
here, so that it can be tried or continued elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import TypeVar

from serve_app.core.errors import EngineError

SILENT_S = 4.0
_T = TypeVar("_T")


class WatchedCall:
    """One call to a replica. `heard()` whenever it sent something."""

    def __init__(self, replica_id: str | None, now: Callable[[], float]) -> None:
        self.replica_id = replica_id
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._now = now
        self.heard_s = now()

    def heard(self) -> None:
        """Note that the replica sent something."""
        self.heard_s = self._now()

    async def race(self, reading: asyncio.Future[_T]) -> _T:
        """Return what `reading` brings. Raises EngineError, and cancels it, on a silent replica."""
        try:
            await asyncio.wait({reading, self.lost}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            reading.cancel()
            raise
        if reading.done():
            self.heard()
            return reading.result()
        reading.cancel()
        raise EngineError("the model replica that worked on this request does not answer")


class SilenceWatch:
    """The calls that run. `now` is monotonic seconds; all calls come from one event loop."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._calls: set[WatchedCall] = set()

    def add(self, replica_id: str | None) -> WatchedCall:
        """Watch a call to a replica (None: unknown which, never given up); `remove` it after."""
        call = WatchedCall(replica_id, self._now)
        self._calls.add(call)
        return call

    def remove(self, call: WatchedCall) -> None:
        """Watch it no more."""
        self._calls.discard(call)

    def update(self, alive_ids: Collection[str]) -> None:
        """Give up calls that heard nothing for long; told right after the replicas were asked.

        `alive_ids`: those that answered for their health lately.
        """
        oldest_s = self._now() - SILENT_S
        for call in self._calls:
            is_gone = call.replica_id is not None and call.replica_id not in alive_ids
            if is_gone and call.heard_s < oldest_s and not call.lost.done():
                call.lost.set_result(None)
