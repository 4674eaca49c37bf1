"""A discrete-event simulation of replicas: real router, real BlockManager and prefix cache, no Ray.

A replica computes step after step: a token budget of prompt chunks plus one token for each running
sequence; a step takes STEP_S plus its tokens over the replica's speed. Two ingress replicas route,
each with a router of its own, and are told of the replicas once a second, as in the service.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.core.events import EngineInfo, EngineStats
from serve_app.core.requests import ReplicaHealth
from serve_app.core.sampling import SamplingParams
from serve_app.deployments.replica_load import LoadedSequence, LoadMeter
from serve_app.deployments.routing import ReplicaRouter, Ticket
from serve_app.engine.block_manager import BlockManager
from serve_app.engine.sequence import Sequence

STEP_S = 0.02
BUDGET_TOKENS = 256
REPORT_S = 1.0
NUM_INGRESSES = 2


@dataclass(frozen=True)
class Arrival:
    """A request: when, its prompt, how many tokens it generates."""

    at_s: float
    prompt: tuple[int, ...]
    num_output: int


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    ttfts_s: list[float]
    hit_tokens: int
    prompt_tokens: int
    chosen: list[int]

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens

    @property
    def ttft_p95_s(self) -> float:
        return sorted(self.ttfts_s)[int(0.95 * len(self.ttfts_s))]


@dataclass(eq=False)
class Job:
    arrival: Arrival
    sequence: Sequence
    finish: Callable[[], None]
    first: Callable[[], None]
    scope: object = None
    loaded: LoadedSequence | None = None
    num_hits: int = 0


@dataclass
class Replica:
    """One simulated replica: `tokens_per_s` of prompt, and its own KV cache."""

    number: int
    now: Callable[[], float]
    tokens_per_s: float
    num_blocks: int
    max_num_seqs: int = 8
    rank: int = 0
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    hit_tokens: int = 0
    is_stepping: bool = False

    def __post_init__(self) -> None:
        self.blocks = BlockManager(self.num_blocks, 16)
        self.meter = LoadMeter(self.now)
        self.step_time_s = 0.0
        self.scheduled = self.generated = 0

    @property
    def num_streams(self) -> int:
        return len(self.waiting) + len(self.running)

    def submit(self, job: Job) -> None:
        job.scope = self.meter.sequence(max(1, len(job.arrival.prompt) - job.num_hits))
        job.loaded = job.scope.__enter__()
        self.waiting.append(job)

    def withdraw(self, job: Job) -> None:
        """Give a job up that has no token yet, as a cancelled call does."""
        if job in self.running:
            self.running.remove(job)
            self.blocks.release(job.sequence)
        else:
            self.waiting.remove(job)
        job.scope.__exit__(None, None, None)  # type: ignore[attr-defined]

    def health(self) -> ReplicaHealth:
        stats = EngineStats(
            num_waiting=len(self.waiting),
            num_used_blocks=self.blocks.num_used_blocks,
            step_time_s_total=self.step_time_s,
            num_scheduled_tokens_total=self.scheduled,
            num_generation_tokens_total=self.generated,
        )
        info = EngineInfo(
            *("sim", "m", "none", "clock", "none"), 0, 4096, 8, 256, 16, self.num_blocks
        )
        load = self.meter.load(stats, info, self.max_num_seqs)
        return ReplicaHealth(f"replica-{self.number}", "ready", load=load)

    def step(self) -> tuple[float, Callable[[], None]]:
        """Schedule one step; returns its seconds, and what its end does."""
        self._admit()
        budget, work = BUDGET_TOKENS, []
        for job in self.running:
            missing = job.sequence.num_uncomputed_tokens
            num_tokens = 1 if job.sequence.is_decoding else min(budget, missing)
            budget -= num_tokens
            if num_tokens > 0:
                work.append((job, num_tokens))
        num_tokens = sum(count for _, count in work)
        seconds = STEP_S + num_tokens / self.tokens_per_s
        self.step_time_s += seconds
        self.scheduled += num_tokens
        return seconds, lambda: self._finish(work)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            job = self.waiting[0]
            sequence = job.sequence
            prefix = self.blocks.match_prefix(sequence, sequence.num_tokens - 1)
            total = sequence.num_tokens + job.arrival.num_output
            if not self.blocks.can_allocate(total, prefix):
                return
            self.blocks.allocate(sequence, prefix)
            self.blocks.grow(sequence, total)
            sequence.num_computed_tokens = len(prefix) * 16
            self.hit_tokens += sequence.num_computed_tokens
            self.running.append(self.waiting.pop(0))

    def _finish(self, work: list[tuple[Job, int]]) -> None:
        for job, count in work:
            if job not in self.running:
                continue  # withdrawn
            sequence = job.sequence
            sequence.num_computed_tokens += count
            if not sequence.is_decoding:
                continue
            if sequence.num_output_tokens == 0:
                self.blocks.register(sequence, sequence.num_prompt_tokens)
                assert job.loaded is not None
                job.loaded.note_first_token()
                job.first()
            sequence.token_ids.append(1)
            self.generated += 1
            if sequence.num_output_tokens >= job.arrival.num_output:
                self.running.remove(job)
                self.blocks.release(sequence)
                job.scope.__exit__(None, None, None)  # type: ignore[attr-defined]
                job.finish()


class Simulation:
    """Runs arrivals through replicas; `policy`: expected_start, or Serve's power_of_two.

    lets_move: what waits at a full replica goes to one that comes free, as in the service.
    """

    def __init__(
        self,
        seed: int,
        policy: str,
        speeds: list[float],
        num_blocks: int,
        *,
        lets_move: bool = True,
    ) -> None:
        self._lets_move = lets_move
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._random = random.Random(seed)
        self._policy = policy
        self.replicas = [
            Replica(i, lambda: self.now_s, speed, num_blocks) for i, speed in enumerate(speeds)
        ]
        self._routers = [ReplicaRouter(now=lambda: self.now_s) for _ in range(NUM_INGRESSES)]
        self._ttfts: list[float] = []
        self._chosen: list[int] = []
        self.num_moves = 0
        self._num_open = 0
        self._queue_cache: list[dict[int, int]] = [{} for _ in range(NUM_INGRESSES)]

    def run(self, arrivals: list[Arrival]) -> Outcome:
        self._num_open = len(arrivals)
        self._report()
        for number, arrival in enumerate(arrivals):
            self._at(arrival.at_s, lambda a=arrival, n=number: self._arrive(a, n))
        while self._num_open:
            self.now_s, _, action = heapq.heappop(self._events)
            action()
        return Outcome(
            self._ttfts,
            sum(replica.hit_tokens for replica in self.replicas),
            sum(len(arrival.prompt) for arrival in arrivals),
            self._chosen,
        )

    def _at(self, at_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._count), action))

    def _report(self) -> None:
        reports = [(replica.rank, replica.health()) for replica in self.replicas]
        for router in self._routers:
            router.update(reports, self.now_s)
        self._at(self.now_s + REPORT_S, self._report)

    def _arrive(self, arrival: Arrival, number: int) -> None:
        ingress = self._random.randrange(NUM_INGRESSES)
        replica, ticket = self._choose(ingress, arrival, f"request-{number}")
        self._chosen.append(replica.number)

        def first() -> None:
            self._ttfts.append(self.now_s - arrival.at_s)
            if ticket is not None:
                ticket.note_first_token(self._named(ticket.replica_id).health().load)

        def finish() -> None:
            self._num_open -= 1
            if replica.number in self._queue_cache[ingress]:
                self._queue_cache[ingress][replica.number] -= 1
            if ticket is not None:
                ticket.close()

        sequence = Sequence(f"request-{number}", arrival.prompt, SamplingParams(), number)
        job = Job(arrival, sequence, finish, first)
        job.num_hits = ticket.num_hit_tokens if ticket is not None else 0
        if ticket is not None and self._lets_move:
            ticket.on_moved = lambda: self._follow(job, ticket)
        self._submit(replica, job)

    def _submit(self, replica: Replica, job: Job) -> None:
        replica.submit(job)
        if not replica.is_stepping:
            self._step(replica)

    def _follow(self, job: Job, ticket: Ticket) -> None:
        """Take a job back and send it to where its place is now."""
        self.num_moves += 1
        next(r for r in self.replicas if job in r.waiting or job in r.running).withdraw(job)
        old = job.sequence
        job.sequence = Sequence(old.request_id, job.arrival.prompt, SamplingParams(), old.rank[1])
        job.num_hits = ticket.num_hit_tokens
        self._submit(self._named(ticket.replica_id), job)

    def _named(self, replica_id: str) -> Replica:
        return self.replicas[int(replica_id.removeprefix("replica-"))]

    def _choose(
        self, ingress: int, arrival: Arrival, request_id: str
    ) -> tuple[Replica, Ticket | None]:
        if self._policy == "power_of_two":
            return self._shorter_queue(ingress), None
        router = self._routers[ingress]
        ticket = router.choose(request_id, arrival.prompt)
        assert ticket is not None
        return self._named(ticket.replica_id), ticket

    def _shorter_queue(self, ingress: int) -> Replica:
        """Return what Serve's default chooses: see PowerOfTwoChoicesRequestRouter and its cache.

        A handle knows a queue's length as of its own last request there, less its own that ended.
        """
        cache = self._queue_cache[ingress]
        pair = self._random.sample(self.replicas, 2)
        replica = min(pair, key=lambda r: cache.get(r.number, r.num_streams))
        cache[replica.number] = replica.num_streams + 1
        return replica

    def _step(self, replica: Replica) -> None:
        replica.is_stepping = replica.num_streams > 0
        if not replica.is_stepping:
            return
        seconds, end = replica.step()

        def finish() -> None:
            end()
            self._step(replica)

        self._at(self.now_s + seconds, finish)


def shared_prefixes(seed: int, count: int = 400, rate: float = 7.0) -> list[Arrival]:
    """Questions about 24 documents of 768 tokens, drawn evenly: more than one cache can hold."""
    rng = random.Random(seed)
    documents = [_ids(rng, 768) for _ in range(24)]
    return _poisson(rng, count, rate, lambda: rng.choice(documents) + _ids(rng, 48), 24)


def mixed(seed: int, count: int = 400, rate: float = 5.0) -> list[Arrival]:
    """Prompts of their own, 16 to 1,024 tokens; a third begins with one of four system prompts."""
    rng = random.Random(seed)
    systems = [_ids(rng, 128) for _ in range(4)]

    def prompt() -> tuple[int, ...]:
        own = _ids(rng, int(2 ** rng.uniform(4, 10)))
        return rng.choice(systems) + own if rng.random() < 1 / 3 else own

    return _poisson(rng, count, rate, prompt, 48)


def _poisson(
    rng: random.Random,
    count: int,
    rate: float,
    prompt: Callable[[], tuple[int, ...]],
    mean_output: int,
) -> list[Arrival]:
    at_s, arrivals = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate)
        num_output = max(1, min(4 * mean_output, round(rng.expovariate(1 / mean_output))))
        arrivals.append(Arrival(at_s, prompt(), num_output))
    return arrivals


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(50_000) for _ in range(count))
