from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.requests import ReplicaHealth, ReplicaLoad
from serve_app.deployments.prefix_table import prefix_chain
from serve_app.deployments.routing import FORGET_AFTER_S, ReplicaRouter, Ticket


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def health(replica_id: str, state: str = "ready", **load: object) -> ReplicaHealth:
    values = {"max_num_seqs": 4, "prefill_tokens_per_s": 1000.0, "mean_service_s": 2.0, **load}
    return ReplicaHealth(replica_id, state, load=ReplicaLoad(**values))  # type: ignore[arg-type]


def router_of(*reports: tuple[int, ReplicaHealth], clock: Clock | None = None) -> ReplicaRouter:
    clock = clock or Clock()
    router = ReplicaRouter(now=clock)
    router.update(reports, clock.now_s)
    clock.now_s += 0.01
    return router


def prompt(first: int, num_tokens: int = 256) -> list[int]:
    return [first * 10_000 + i for i in range(num_tokens)]


def test_nothing_is_chosen_where_no_replica_is_ready() -> None:
    assert router_of().choose("r", [1]) is None
    assert router_of((0, health("a", "loading"))).choose("r", [1]) is None


def test_the_replica_that_can_begin_soonest_is_chosen() -> None:
    router = router_of((0, health("busy", num_waiting_tokens=5000)), (0, health("idle")))

    assert {router.choose(f"r{i}", prompt(i)).replica_id for i in range(3)} == {"idle"}


def test_speed_counts_as_much_as_the_queue() -> None:
    slow = health("slow", num_waiting_tokens=100, prefill_tokens_per_s=100.0)
    fast = health("fast", num_waiting_tokens=1000, prefill_tokens_per_s=10_000.0)

    assert router_of((0, slow), (0, fast)).choose("r", prompt(1)).replica_id == "fast"


def test_own_requests_count_at_once_and_give_their_place_back() -> None:
    router = router_of((0, health("a")), (0, health("b")))

    tickets = [router.choose(f"r{i}", prompt(i)) for i in range(8)]
    counts = {i: sum(ticket.replica_id == i for ticket in tickets) for i in "ab"}
    assert counts == {"a": 4, "b": 4}

    for ticket in tickets:
        if ticket.replica_id == "a":
            ticket.close()
            ticket.close()  # the second one gives nothing back
    assert {router.choose(f"s{i}", prompt(50 + i)).replica_id for i in range(4)} == {"a"}


def test_requests_spill_down_the_ranks_only_when_the_upper_pool_is_full() -> None:
    router = router_of((0, health("arc", max_num_seqs=2)), (1, health("cpu", max_num_seqs=2)))

    tickets = [router.choose(f"r{i}", prompt(i)) for i in range(4)]
    assert [ticket.replica_id for ticket in tickets] == ["arc", "arc", "cpu", "cpu"]

    tickets[0].close()
    assert router.choose("next", prompt(9)).replica_id == "arc"


def test_a_pool_without_kv_room_is_full() -> None:
    full = health("arc", num_blocks=100, num_used_blocks=95, block_size=16)
    router = router_of((0, full), (1, health("cpu", prefill_tokens_per_s=50.0)))

    assert router.choose("long", prompt(1, 256)).replica_id == "cpu"
    assert router.choose("short", prompt(2, 32)).replica_id == "arc"


def test_where_all_are_full_the_shortest_wait_wins() -> None:
    long = health("arc", max_num_seqs=4, num_streams=40)
    short = health("cpu", max_num_seqs=4, num_streams=5)

    assert router_of((0, long), (1, short)).choose("r", prompt(1)).replica_id == "cpu"


def test_a_prefix_goes_where_it_was_served_last() -> None:
    router = router_of(*((0, health(name)) for name in "abc"))
    first = router.choose("r0", prompt(1))
    first.close()
    assert first.num_hit_tokens == 0

    again = router.choose("r1", [*prompt(1), 7, 7, 7])
    assert (again.replica_id, again.num_hit_tokens) == (first.replica_id, 256)


def test_affinity_yields_to_a_long_queue() -> None:
    clock = Clock()
    router = router_of((0, health("a")), (0, health("b")), clock=clock)
    favourite = router.choose("r0", prompt(1)).replica_id
    other = "b" if favourite == "a" else "a"

    reports = [(0, health(favourite, num_waiting_tokens=3000)), (0, health(other))]
    router.update(reports, clock.now_s + 1)

    assert router.choose("r1", prompt(1)).replica_id == other


def test_routers_that_know_nothing_of_each_other_agree_on_a_new_prefix() -> None:
    names = [(0, health(name)) for name in "abcd"]
    chosen = [
        [router_of(*names).choose(f"{n}-{i}", prompt(i)).replica_id for i in range(20)]
        for n in range(3)
    ]

    assert chosen[0] == chosen[1] == chosen[2]
    assert len(set(chosen[0])) == 4, "different prefixes spread"


def test_a_refusing_replica_is_asked_again_only_where_there_is_no_other() -> None:
    router = router_of((0, health("a")), (0, health("b", num_waiting_tokens=9000)))

    assert router.choose("r", prompt(1)).replica_id == "a"
    assert router.choose("r", prompt(1), exclude=["a"]).replica_id == "b"
    assert router.choose("r", prompt(1), exclude=["a", "b"]) is not None


class Waiting:
    """A replica that is full and one that is nearly: what is sent beyond waits at one of them."""

    def __init__(self, **options: object) -> None:
        self.clock = Clock()
        self.router = ReplicaRouter(now=self.clock, **options)  # type: ignore[arg-type]
        self.report(a=0, b=0)
        self.moved: list[str] = []

    def report(self, **num_streams: int) -> None:
        self.clock.now_s += 0.01
        reports = [(0, health(i, max_num_seqs=2, num_streams=n)) for i, n in num_streams.items()]
        self.router.update(reports, self.clock.now_s)
        self.clock.now_s += 0.01

    def send(self, name: str, first: int) -> Ticket:
        ticket = self.router.choose(name, prompt(first, 32))
        assert ticket is not None
        ticket.on_moved = lambda: self.moved.append(name)
        return ticket

    def fill(self, num_waiting: int) -> tuple[list[Ticket], list[Ticket]]:
        """Take every place, and send more; returns what runs and what waits."""
        assert self.has_room()
        running = [self.send(f"running{i}", i) for i in range(4)]
        for ticket in running:
            ticket.note_first_token()
        assert not self.has_room()
        return running, [self.send(f"waiting{i}", 10 + i) for i in range(num_waiting)]

    def has_room(self) -> bool:
        return any(known.has_room(1) for known in self.router._replicas.values())


def test_a_request_that_waits_moves_to_the_replica_that_comes_free() -> None:
    load = Waiting()
    running, (waiting,) = load.fill(1)
    full = waiting.replica_id
    other = next(ticket for ticket in running if ticket.replica_id != full)

    other.close()

    assert load.moved == ["waiting0"]
    assert waiting.replica_id == other.replica_id
    assert not load.has_room(), "its place is taken"
    waiting.close()
    assert load.has_room(), "and is given back"


def test_the_oldest_of_those_that_wait_moves_and_only_as_many_as_there_is_room_for() -> None:
    load = Waiting()
    running, waiting = load.fill(4)
    free = running[0].replica_id
    queued_there = sum(ticket.replica_id == free for ticket in waiting)
    assert queued_there == 2

    # Its own queue takes the first two places that come free there; a third is for the others.
    for ticket in [t for t in running if t.replica_id == free]:
        ticket.close()
    assert load.moved == []
    for ticket in [t for t in waiting if t.replica_id == free][:1]:
        ticket.note_first_token()
        ticket.close()

    elsewhere = [f"waiting{i}" for i, t in enumerate(waiting) if t.replica_id != free]
    assert len(load.moved) == 1
    assert load.moved[0] not in elsewhere, "it is the oldest, and counts here now"
    assert waiting[int(load.moved[0][-1])].replica_id == free


def test_one_that_met_a_full_replica_unexpectedly_moves_as_well() -> None:
    load = Waiting()
    tickets = [load.send(f"r{i}", i) for i in range(3)]
    here = tickets[0].replica_id
    there = "b" if here == "a" else "a"

    load.report(**{here: 2 + sum(t.replica_id == here for t in tickets), there: 0})

    assert load.moved[0] == "r0", "others had taken both places"
    assert tickets[0].replica_id == there


def test_what_has_its_first_token_or_ended_does_not_move() -> None:
    load = Waiting()
    running, waiting = load.fill(2)
    waiting[0].note_first_token()
    waiting[1].close()
    for ticket in running:
        ticket.close()

    assert load.moved == []


def test_a_new_replica_takes_over_what_waits_as_far_as_it_has_room() -> None:
    load = Waiting()
    _, waiting = load.fill(4)

    load.report(a=4, b=4, c=0)

    assert load.moved == ["waiting0", "waiting1"]
    assert [ticket.replica_id == "c" for ticket in waiting] == [True, True, False, False]


def test_what_waits_moves_neither_to_who_refused_it_nor_without_being_asked_to() -> None:
    load = Waiting()
    running, _ = load.fill(0)
    refused = load.router.choose("refused", prompt(20, 32), exclude=["a"])
    refused.on_moved = lambda: load.moved.append("refused")
    kept = load.router.choose("kept", prompt(21, 32))
    assert (refused.replica_id, kept.on_moved) == ("b", None)

    next(ticket for ticket in running if ticket.replica_id == "a").close()

    assert load.moved == []


def test_a_request_stays_where_it_begins_sooner_than_in_the_free_place() -> None:
    clock = Clock()
    fast = health("fast", max_num_seqs=8, num_streams=8, mean_service_s=0.1)
    slow = health("slow", max_num_seqs=8, num_streams=8, prefill_tokens_per_s=100.0)
    router = router_of((0, fast), (1, slow), clock=clock)
    moved: list[str] = []
    ticket = router.choose("r", prompt(1))
    ticket.on_moved = lambda: moved.append(ticket.replica_id)
    assert ticket.replica_id == "fast"

    queued = health("fast", max_num_seqs=8, num_streams=9, mean_service_s=0.1)
    reports = [(0, queued), (1, health("slow", prefill_tokens_per_s=100.0))]
    router.update(reports, clock.now_s)
    assert moved == []

    clock.now_s += 3.0  # much longer than streams took there lately
    router.update(reports, clock.now_s)
    assert moved == ["slow"]


def test_with_widths_as_ranks_a_request_keeps_its_own() -> None:
    for is_bound in (True, False):
        router = ReplicaRouter(is_bound_to_rank=is_bound, now=Clock())
        full = (0, health("a", max_num_seqs=1, num_streams=3))
        router.update([full], 100.0)
        ticket = router.choose("r", prompt(1))
        ticket.on_moved = lambda: None
        router.update([full, (1, health("b"))], 100.0)
        assert ticket.replica_id == ("a" if is_bound else "b")


def test_a_move_that_came_too_late_is_taken_back() -> None:
    load = Waiting()
    running, (waiting,) = load.fill(1)
    full = waiting.replica_id
    next(ticket for ticket in running if ticket.replica_id != full).close()
    assert waiting.replica_id != full

    waiting.return_to(full)
    waiting.note_first_token()

    assert waiting.replica_id == full
    assert load.has_room(), "the free place is free again"


def test_a_queue_for_want_of_kv_blocks_counts_as_one() -> None:
    clock = Clock()
    full = {"num_blocks": 100, "block_size": 16, "max_num_seqs": 8, "num_streams": 2}
    short = health("a", num_used_blocks=99, **full)
    router = router_of((0, short), clock=clock)
    ticket = router.choose("r", prompt(1))
    ticket.on_moved = lambda: None

    begun = health("a", num_used_blocks=99, **full)
    router.update([(0, begun), (0, health("b"))], clock.now_s)
    assert ticket.replica_id == "a", "the engine has begun it"
    queued = health("a", num_used_blocks=99, num_queued=1, **full)
    router.update([(0, queued), (0, health("b"))], clock.now_s)
    assert ticket.replica_id == "b"


def test_a_replica_that_leaves_is_forgotten_with_its_prefixes() -> None:
    clock = Clock()
    router = router_of((0, health("a")), clock=clock)
    ticket = router.choose("r", prompt(1))
    router.update([(0, health("a", "draining"))], clock.now_s)
    ticket.close()  # of a replica that is gone

    assert router.choose("r", prompt(1)) is None
    router.update([(0, health("a"))], clock.now_s)
    assert router.choose("r", prompt(1)).num_hit_tokens == 0


def test_a_replica_that_missed_a_question_comes_last_and_is_forgotten_later() -> None:
    clock = Clock()
    quiet, slow = (0, health("quiet")), (0, health("slow", num_waiting_tokens=9000))
    router = router_of(quiet, slow, clock=clock)
    assert router.choose("r", prompt(1)).replica_id == "quiet"

    router.update([slow], clock.now_s + 1)
    assert router.choose("r", prompt(1)).replica_id == "slow"
    router.update([quiet, slow], clock.now_s + 2)
    again = router.choose("r", prompt(1))
    assert (again.replica_id, again.num_hit_tokens) == ("quiet", 255), "its prefixes were kept"

    router.update([slow], clock.now_s + 2 + FORGET_AFTER_S + 1)
    assert router.replica_ids == ("slow",)


def test_a_report_replaces_what_was_counted_but_keeps_what_it_cannot_know() -> None:
    clock = Clock()
    router = router_of((0, health("a", max_num_seqs=3)), (1, health("b")), clock=clock)
    for i in range(2):
        router.choose(f"old{i}", prompt(i))
    asked_s = clock.now_s + 0.5
    clock.now_s += 1.0
    router.choose("new", prompt(5))  # after the question: the report does not contain it

    full = health("a", max_num_seqs=3, num_streams=2, num_waiting_tokens=0)
    router.update([(0, full), (1, health("b"))], asked_s)

    assert router.choose("r", prompt(6)).replica_id == "b"


def test_what_is_on_its_way_for_long_counts_whatever_a_report_says() -> None:
    clock = Clock()
    router = router_of(
        (0, health("arc", max_num_seqs=2)), (1, health("cpu", max_num_seqs=2)), clock=clock
    )
    first = router.choose("first", prompt(1))
    slow = router.choose("slow", prompt(2))
    assert first is not None
    assert slow is not None

    clock.now_s += 1.0  # the second call has not arrived: the replica knows of one stream
    first.note_first_token(ReplicaLoad(num_streams=1, max_num_seqs=2))
    router.update(
        [
            (0, health("arc", max_num_seqs=2, num_streams=1)),
            (1, health("cpu", max_num_seqs=2)),
        ],
        clock.now_s,
    )

    assert router.choose("next", prompt(3)).replica_id == "cpu"


def test_what_a_replica_pushes_counts_at_once_and_brings_the_prefixes_of_others() -> None:
    router = router_of((0, health("a")), (0, health("b")))
    shared = prompt(7)
    favourite = router.choose("before", shared)
    assert favourite is not None
    favourite.close()
    other = {"a": "b", "b": "a"}[favourite.replica_id]
    fresh = prompt(8)
    load = health(other).load
    assert load is not None

    router.hear(other, load, [prefix_chain(fresh)])  # another ingress has sent it there
    assert router.choose("hit", fresh).replica_id == other
    assert router.choose("hit again", fresh).num_hit_tokens == 255

    busy = health(other, num_streams=4, num_waiting_tokens=9000).load
    assert busy is not None
    router.hear(other, busy, [])
    assert router.choose("elsewhere", prompt(9)).replica_id == favourite.replica_id
    late = [(0, health("a")), (0, health("b"))]
    router.update(late, asked_s=100.0)  # asked before, answered after
    assert router.choose("still elsewhere", prompt(10)).replica_id == favourite.replica_id
    router.hear("gone", busy, [prefix_chain(fresh)])  # one that nobody knows is not taken up
    assert set(router.replica_ids) == {"a", "b"}


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60))
def test_every_place_comes_back(steps: list[tuple[int, bool]]) -> None:
    clock = Clock()
    router = router_of((0, health("a")), (1, health("b")), clock=clock)
    open_tickets = []
    for first, is_sent in steps:
        clock.now_s += 0.01
        if is_sent:
            ticket = router.choose(f"r{clock.now_s}", prompt(first))
            ticket.on_moved = lambda: None
            open_tickets.append(ticket)
        elif open_tickets:
            open_tickets.pop(first % len(open_tickets)).close()
    for ticket in open_tickets:
        ticket.note_first_token()
        ticket.close()

    for known in router._replicas.values():
        assert (known.num_streams, known.num_waiting_tokens, known.open) == (0, 0, set())
