"""Who may run under the batching toggles, for engines that schedule tokens somewhere else."""

from __future__ import annotations

from typing import Generic, TypeVar

from serve_app.core.errors import ConfigError
from serve_app.core.events import BatchingMode, BatchingOptions

T = TypeVar("T")


class Admission(Generic[T]):
    """Waiting and running requests by id; lets waiting ones run as the mode and the limit allow."""

    def __init__(self, max_num_seqs: int) -> None:
        self.waiting: dict[str, T] = {}
        self.running: dict[str, T] = {}
        self.mode = BatchingMode.CONTINUOUS
        self.max_num_seqs = max_num_seqs
        self.num_joins_total = 0
        self.max_num_running = 0
        self._limit = max_num_seqs

    def configure(self, options: BatchingOptions) -> None:
        """Change the toggles; those that run go on. Raises ConfigError beyond the limit."""
        max_num_seqs = options.max_num_seqs or self.max_num_seqs
        if max_num_seqs > self._limit:
            raise ConfigError(
                f"batching.max_num_seqs: {max_num_seqs} is more than engine.max_num_seqs"
                f" ({self._limit})",
                param="batching.max_num_seqs",
            )
        self.mode = BatchingMode(options.mode)
        self.max_num_seqs = max_num_seqs
        self.max_num_running = 0

    def admit(self) -> list[T]:
        """Move what may start now from waiting to running, oldest first, and return it."""
        if self.mode is BatchingMode.STATIC and self.running:
            return []
        limit = 1 if self.mode is BatchingMode.OFF else self.max_num_seqs
        was_running = bool(self.running)
        starting: list[T] = []
        while self.waiting and len(self.running) < limit:
            request_id = next(iter(self.waiting))
            item = self.waiting.pop(request_id)
            self.running[request_id] = item
            starting.append(item)
            self.num_joins_total += was_running
        self.max_num_running = max(self.max_num_running, len(self.running))
        return starting

    def remove(self, request_id: str) -> T | None:
        """Take a request out, wherever it is."""
        return self.running.pop(request_id, None) or self.waiting.pop(request_id, None)
