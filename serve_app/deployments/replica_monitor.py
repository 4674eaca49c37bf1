"""What an ingress replica knows of the model replicas: asked often, so that no request waits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from serve_app.core.errors import OverloadedError
from serve_app.core.requests import ReplicaHealth, ServiceHealth

logger = logging.getLogger(__name__)

POLL_PERIOD_S = 1.0
LOADING_POLL_PERIOD_S = 0.25
MISSED_S = 4.0
"""A replica that did not answer for this long is no longer counted."""


class ReplicaMonitor:
    """Keeps the last known health of each model replica.

    `ask` returns the health of every replica that answers. `now` is monotonic seconds.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[list[ReplicaHealth]]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._now = now
        self._last_seen: dict[str, tuple[float, ReplicaHealth]] = {}
        self._was_ready = False
        self._task: asyncio.Task[None] | None = None
        self.is_draining = False
        self.can_sleep = False
        self.on_refreshed: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin to ask, in the running loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def refresh(self) -> None:
        """Ask all replicas once."""
        answers = await self._ask()
        now = self._now()
        for health in answers:
            self._last_seen[health.replica_id] = (now, health)
            self._was_ready = self._was_ready or health.state == "ready"
        self._last_seen = {
            replica_id: seen
            for replica_id, seen in self._last_seen.items()
            if now - seen[0] < MISSED_S
        }
        self.on_refreshed()

    def replicas(self) -> tuple[ReplicaHealth, ...]:
        """Return the replicas that answered lately."""
        now = self._now()
        return tuple(health for seen, health in self._last_seen.values() if now - seen < MISSED_S)

    def has_live_replica(self) -> bool:
        """Whether a replica answered lately, whatever its state."""
        return bool(self.replicas())

    def health(self) -> ServiceHealth:
        """Return the state: ready | sleeping | loading | draining | stuck | dead | no_replica."""
        replicas = self.replicas()
        states = {health.state for health in replicas}
        if self.is_draining:
            status = "draining"
        elif "ready" in states:
            status = "ready"
        elif not states and self.can_sleep:
            status = "sleeping"  # a request wakes a replica
        elif not states:
            status = "no_replica" if self._was_ready else "loading"
        else:
            status = next(
                s for s in ("loading", "stuck", "draining", "dead", *states) if s in states
            )
        is_ready = status in ("ready", "sleeping")
        return ServiceHealth(is_ready=is_ready, status=status, replicas=replicas)

    def unavailable(self) -> OverloadedError:
        """Return the error for a request that no replica can take now."""
        if not self._was_ready:
            return OverloadedError("the model is loading", code="model_loading", retry_after_s=2.0)
        return OverloadedError("no model replica is up", code="no_replica", retry_after_s=2.0)

    async def _poll(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception:
                logger.warning("asking the model replicas failed", exc_info=True)
            is_up = self.has_live_replica()
            await asyncio.sleep(POLL_PERIOD_S if is_up else LOADING_POLL_PERIOD_S)
