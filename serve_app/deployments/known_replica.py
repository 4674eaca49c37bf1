"""What a router knows of one replica: its last report, what was sent there since, its queue."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from serve_app.core.requests import ReplicaLoad

_UNKNOWN_TOKENS_PER_S = 2000.0
_UNKNOWN_SERVICE_S = 2.0
_CROWD_SHARE = 0.15
"""Part of a mean service time by which a replica that is full of sequences is worse than idle."""


class SentRequest(Protocol):
    """A request that its router sent: when (monotonic), and its prompt tokens yet to compute."""

    sent_s: float
    num_tokens: int


@dataclass(slots=True)
class KnownReplica:
    """A replica: its last report, and what was sent to it or ended there since."""

    rank: int
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    reported_s: float = -math.inf
    is_missing: bool = False
    num_streams: int = 0
    num_waiting_tokens: int = 0
    num_new_blocks: int = 0
    open: set[SentRequest] = field(default_factory=set)

    def report(self, load: ReplicaLoad, asked_s: float) -> None:
        """Take over a report that was asked for at `asked_s`; later tickets come on top.

        The answer to a poll may come after news that are younger: it changes nothing then.
        """
        self.is_missing = False
        if asked_s < self.reported_s:
            return
        self.load, self.reported_s = load, asked_s
        self.num_streams = load.num_streams
        self.num_waiting_tokens = load.num_waiting_tokens
        self.num_new_blocks = 0
        for ticket in self.open:
            if ticket.sent_s >= asked_s:
                self.add(ticket)
        # A call can take longer than any guess: what is open here runs there or is on its way.
        self.num_streams = max(self.num_streams, len(self.open))
        num_tokens = sum(ticket.num_tokens for ticket in self.open)
        self.num_waiting_tokens = max(self.num_waiting_tokens, num_tokens)

    def add(self, ticket: SentRequest) -> None:
        """Count a ticket that the last report cannot contain."""
        self.num_streams += 1
        self.num_waiting_tokens += ticket.num_tokens
        self.num_new_blocks += math.ceil(ticket.num_tokens / self.load.block_size)

    def remove(self, ticket: SentRequest) -> None:
        """Count a ticket no more; one that is not here changes nothing."""
        if ticket in self.open:
            self.open.discard(ticket)
            self.num_streams = max(0, self.num_streams - 1)
            self.num_waiting_tokens = max(0, self.num_waiting_tokens - ticket.num_tokens)

    def num_queued(self, num_new_tokens: int) -> int:
        """Return how many streams likely wait for a place or, with that many tokens, for blocks."""
        num_over = self.num_streams - self.load.max_num_seqs
        if self.load.num_blocks and self._missing_blocks(num_new_tokens) > 0:
            return max(num_over, self.load.num_queued)
        return num_over

    def queue_wait_s(self, position: int, num_new_tokens: int) -> float:
        """Return how long the stream at that position (from 1) of the queue likely waits yet."""
        load = self.load
        service_s = load.mean_service_s or _UNKNOWN_SERVICE_S
        return service_s * position / load.max_num_seqs + self.prefill_s(num_new_tokens)

    def has_room(self, num_new_tokens: int) -> bool:
        """Whether one more sequence would start at once."""
        load = self.load
        if self.num_streams >= load.max_num_seqs:
            return False
        return load.num_blocks == 0 or self._missing_blocks(num_new_tokens) <= 0

    def expected_start_s(self, num_new_tokens: int) -> float:
        """Return the score of the module's docstring, in seconds."""
        load = self.load
        service_s = load.mean_service_s or _UNKNOWN_SERVICE_S
        start_s = self.prefill_s(self.num_waiting_tokens + num_new_tokens)
        num_over = self.num_streams + 1 - load.max_num_seqs
        if num_over > 0:
            start_s += service_s * num_over / load.max_num_seqs
        missing = self._missing_blocks(num_new_tokens) if load.num_blocks else 0
        if missing > 0:
            start_s += service_s * min(1.0, missing / load.num_blocks * load.max_num_seqs)
        return start_s + _CROWD_SHARE * service_s * self.num_streams / load.max_num_seqs

    def prefill_s(self, num_tokens: int) -> float:
        """Return how long the engine likely computes at so many prompt tokens."""
        return num_tokens / (self.load.prefill_tokens_per_s or _UNKNOWN_TOKENS_PER_S)

    def _missing_blocks(self, num_new_tokens: int) -> int:
        load = self.load
        needed = math.ceil(max(1, num_new_tokens) / load.block_size)
        return needed + load.num_used_blocks + self.num_new_blocks - load.num_blocks
