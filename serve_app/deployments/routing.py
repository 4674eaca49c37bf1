"""Which replica takes a request: the one with the best expected start, in the best pool with room.

Pure logic, without Ray and without a clock of its own. What it knows of a replica is its last
reported ReplicaLoad, plus what this router has sent since. Pools are ranked: a lower rank is tried
only when no replica above has a free place and KV room. Within a rank the score is

    (waiting tokens + own tokens that its prefix cache lacks) / prefill speed
        + the wait for a place or for KV blocks, where there is none
        + a share for the sequences that run already, which slow each other down

The prefix part comes from PrefixTable: which replica last served the blocks that a prompt begins
with, as chained hashes. They are of the engine's kind (engine.block_manager) but coarser and
shorter: a wrong guess costs time only.
"""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from serve_app.core.requests import ReplicaHealth, ReplicaLoad

CHUNK_TOKENS = 32
"""Tokens per entry of the prefix table."""
MAX_CHUNKS = 64
"""Chunks of a prompt that are looked at: shared prefixes longer than this count as this long."""
FORGET_AFTER_S = 4.0
"""A replica that did not answer for this long is gone."""
STALE_PREFIX_S = 900.0
"""An entry not used for this long is not believed: the engine may have restarted or evicted it."""

_HASH_BYTES = 8
_UNKNOWN_TOKENS_PER_S = 2000.0
_UNKNOWN_SERVICE_S = 2.0
_UNKNOWN_CACHE_TOKENS = 65536
_MAX_ENTRIES = 32768
_CROWD_SHARE = 0.15
"""Part of a mean service time by which a replica that is full of sequences is worse than idle."""
_SAME_START = 0.05
_IN_FLIGHT_S = 0.005
_SAME_START_S = 0.002


def prefix_chain(token_ids: Sequence[int], cache_salt: str | None = None) -> tuple[bytes, ...]:
    """Return the chained hashes of a prompt's first full chunks, at most MAX_CHUNKS."""
    num_chunks = min(len(token_ids) // CHUNK_TOKENS, MAX_CHUNKS)
    parent = hashlib.blake2b((cache_salt or "").encode(), digest_size=_HASH_BYTES).digest()
    chain = []
    for start in range(0, num_chunks * CHUNK_TOKENS, CHUNK_TOKENS):
        ids = array("q", token_ids[start : start + CHUNK_TOKENS]).tobytes()
        parent = hashlib.blake2b(parent + ids, digest_size=_HASH_BYTES).digest()
        chain.append(parent)
    return tuple(chain)


class PrefixTable:
    """The chunks that each replica has likely cached: least recently used go first, as there."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._chunks: dict[str, OrderedDict[bytes, float]] = {}

    def num_hit_tokens(self, replica_id: str, chain: Sequence[bytes]) -> int:
        """Return how many tokens of the chain the replica likely has."""
        chunks = self._chunks.get(replica_id)
        if not chunks:
            return 0
        oldest_s = self._now() - STALE_PREFIX_S
        num_hits = 0
        for chunk in chain:
            if chunks.get(chunk, -math.inf) < oldest_s:
                break
            num_hits += 1
        return num_hits * CHUNK_TOKENS

    def remember(self, replica_id: str, chain: Sequence[bytes], capacity_tokens: int) -> None:
        """Note that a replica got this prompt, and forget what it had to evict for it."""
        chunks = self._chunks.setdefault(replica_id, OrderedDict())
        now = self._now()
        for chunk in reversed(chain):  # the deepest is evicted first, as in the engine
            chunks[chunk] = now
            chunks.move_to_end(chunk)
        limit = min(_MAX_ENTRIES, max(MAX_CHUNKS, capacity_tokens // CHUNK_TOKENS))
        while len(chunks) > limit:
            chunks.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """Drop what is known of a replica that is gone."""
        self._chunks.pop(replica_id, None)

    def num_entries(self) -> int:
        """Return how many chunks are held, of all replicas."""
        return sum(map(len, self._chunks.values()))


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that this router sent: its place, until `close`."""

    replica_id: str
    num_tokens: int
    num_hit_tokens: int
    sent_s: float
    _router: ReplicaRouter
    _is_open: bool = True

    def note_first_token(self, load: ReplicaLoad | None = None) -> None:
        """Tell that the prompt is computed, and the replica's load where it came along."""
        self._router._settle(self, load)

    def close(self) -> None:
        """Give the place back; more calls do nothing."""
        if self._is_open:
            self._is_open = False
            self._router._close(self)


@dataclass(slots=True)
class _Known:
    """A replica: its last report, and what was sent to it or ended there since."""

    rank: int
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    reported_s: float = -math.inf
    is_missing: bool = False
    num_streams: int = 0
    num_waiting_tokens: int = 0
    num_new_blocks: int = 0
    open: set[Ticket] = field(default_factory=set)

    def report(self, load: ReplicaLoad, asked_s: float) -> None:
        """Take over a report that was asked for at `asked_s`; later tickets come on top."""
        self.load, self.reported_s, self.is_missing = load, asked_s, False
        self.num_streams = load.num_streams
        self.num_waiting_tokens = load.num_waiting_tokens
        self.num_new_blocks = 0
        for ticket in self.open:
            if ticket.sent_s >= asked_s:
                self.add(ticket)

    def add(self, ticket: Ticket) -> None:
        """Count a ticket that the last report cannot contain."""
        self.num_streams += 1
        self.num_waiting_tokens += ticket.num_tokens
        self.num_new_blocks += math.ceil(ticket.num_tokens / self.load.block_size)

    def has_room(self, num_new_tokens: int) -> bool:
        """Whether one more sequence would start at once."""
        load = self.load
        if self.num_streams >= load.max_num_seqs:
            return False
        return load.num_blocks == 0 or self._missing_blocks(num_new_tokens) <= 0

    def expected_start_s(self, num_new_tokens: int) -> float:
        """Return the score of the module's docstring, in seconds."""
        load = self.load
        speed = load.prefill_tokens_per_s or _UNKNOWN_TOKENS_PER_S
        service_s = load.mean_service_s or _UNKNOWN_SERVICE_S
        start_s = (self.num_waiting_tokens + num_new_tokens) / speed
        num_over = self.num_streams + 1 - load.max_num_seqs
        if num_over > 0:
            start_s += service_s * num_over / load.max_num_seqs
        missing = self._missing_blocks(num_new_tokens) if load.num_blocks else 0
        if missing > 0:
            start_s += service_s * min(1.0, missing / load.num_blocks * load.max_num_seqs)
        return start_s + _CROWD_SHARE * service_s * self.num_streams / load.max_num_seqs

    def _missing_blocks(self, num_new_tokens: int) -> int:
        load = self.load
        needed = math.ceil(max(1, num_new_tokens) / load.block_size)
        return needed + load.num_used_blocks + self.num_new_blocks - load.num_blocks


class ReplicaRouter:
    """Chooses replicas for one ingress replica.

    prefix_affinity: prefer the replica that has a prompt's beginning in its cache.
    `now` is monotonic seconds. All calls come from one event loop.
    """

    def __init__(
        self, *, prefix_affinity: bool = True, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._now = now
        self._prefix_affinity = prefix_affinity
        self._prefixes = PrefixTable(now)
        self._replicas: dict[str, _Known] = {}

    @property
    def replica_ids(self) -> tuple[str, ...]:
        """The replicas that can be chosen."""
        return tuple(self._replicas)

    def update(self, reports: Iterable[tuple[int, ReplicaHealth]], asked_s: float) -> None:
        """Take over the (rank, health) of every replica that answered a question of `asked_s`.

        One that is not ready is not chosen. One that did not answer is chosen only where there is
        no other, and forgotten with its prefixes after FORGET_AFTER_S.
        """
        answers = {health.replica_id: (rank, health) for rank, health in reports}
        for replica_id, known in [*self._replicas.items()]:
            known.is_missing = replica_id not in answers
            if known.is_missing:
                is_gone = asked_s - known.reported_s > FORGET_AFTER_S
            else:
                is_gone = answers[replica_id][1].state != "ready"
            if is_gone:
                del self._replicas[replica_id]
                self._prefixes.forget(replica_id)
        for replica_id, (rank, health) in answers.items():
            if health.state == "ready":
                known = self._replicas.setdefault(replica_id, _Known(rank))
                known.rank = rank
                known.report(health.load or ReplicaLoad(max_num_seqs=1 << 16), asked_s)

    def choose(
        self,
        request_id: str,
        token_ids: Sequence[int],
        cache_salt: str | None = None,
        exclude: Collection[str] = (),
    ) -> Ticket | None:
        """Return a ticket for the best replica; None where none is known.

        Replicas in `exclude` (they have just refused or died) come last.
        """
        wanted = {i: r for i, r in self._replicas.items() if i not in exclude}
        candidates = {i: r for i, r in wanted.items() if not r.is_missing}
        candidates = candidates or wanted or self._replicas
        if not candidates:
            return None
        chain = prefix_chain(token_ids, cache_salt) if self._prefix_affinity else ()
        missing = {
            replica_id: max(1, len(token_ids) - self._prefixes.num_hit_tokens(replica_id, chain))
            for replica_id in candidates
        }
        best = self._best(candidates, missing, chain[0] if chain else request_id.encode())
        known = candidates[best]
        capacity = known.load.num_blocks * known.load.block_size or _UNKNOWN_CACHE_TOKENS
        self._prefixes.remember(best, chain, capacity)
        num_hits = len(token_ids) - missing[best]
        ticket = Ticket(best, missing[best], num_hits, self._now(), self)
        known.open.add(ticket)
        known.add(ticket)
        return ticket

    def rank_of(self, replica_id: str) -> int | None:
        """Return the rank of a replica's pool; None where it is gone."""
        known = self._replicas.get(replica_id)
        return None if known is None else known.rank

    def _best(
        self, candidates: dict[str, _Known], missing: dict[str, int], affinity_key: bytes
    ) -> str:
        """Return the first in rank and start; among equals always the same for the same prefix."""
        open_ids = [i for i, known in candidates.items() if known.has_room(missing[i])]
        if open_ids:
            first_rank = min(candidates[i].rank for i in open_ids)
            open_ids = [i for i in open_ids if candidates[i].rank == first_rank]
        starts = {i: candidates[i].expected_start_s(missing[i]) for i in (open_ids or candidates)}
        soonest = min(starts.values())
        limit = soonest * (1 + _SAME_START) + _SAME_START_S
        # Rendezvous hashing: several ingress replicas agree without talking to each other.
        return max(
            (i for i, start_s in starts.items() if start_s <= limit),
            key=lambda i: hashlib.blake2b(affinity_key + i.encode(), digest_size=8).digest(),
        )

    def _settle(self, ticket: Ticket, load: ReplicaLoad | None = None) -> None:
        known = self._replicas.get(ticket.replica_id)
        if known is not None and load is not None:
            # What was sent within the last moment cannot be in it yet.
            known.report(load, max(known.reported_s, self._now() - _IN_FLIGHT_S))
        if known is not None and ticket in known.open and ticket.num_tokens:
            known.num_waiting_tokens = max(0, known.num_waiting_tokens - ticket.num_tokens)
        ticket.num_tokens = 0

    def _close(self, ticket: Ticket) -> None:
        self._settle(ticket)
        known = self._replicas.get(ticket.replica_id)
        if known is not None and ticket in known.open:
            known.open.discard(ticket)
            known.num_streams = max(0, known.num_streams - 1)
