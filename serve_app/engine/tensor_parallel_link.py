"""The socket between rank 0 and another rank, frame by frame."""

from __future__ import annotations

from collections import deque
from typing import Any

from serve_app.engine.worker import Connection


class Inbox:
    """Frames in the order they came; none is lost when several come at once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[list[Any]] = deque()

    def next(self) -> list[Any]:
        """Wait for the next frame. Raises ClientGone when the other end has died."""
        while not self._waiting:
            self._waiting.extend(self._connection.receive(None))
        return self._waiting.popleft()
