from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.requests import ReplicaHealth, ReplicaLoad
from serve_app.deployments.routing import (
    CHUNK_TOKENS,
    FORGET_AFTER_S,
    MAX_CHUNKS,
    STALE_PREFIX_S,
    PrefixTable,
    ReplicaRouter,
    prefix_chain,
)


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


def test_a_salt_separates_prefixes() -> None:
    assert prefix_chain(prompt(1), "a") != prefix_chain(prompt(1), "b")
    assert prefix_chain(prompt(1), None) == prefix_chain(prompt(1), "")


def test_a_refusing_replica_is_asked_again_only_where_there_is_no_other() -> None:
    router = router_of((0, health("a")), (0, health("b", num_waiting_tokens=9000)))

    assert router.choose("r", prompt(1)).replica_id == "a"
    assert router.choose("r", prompt(1), exclude=["a"]).replica_id == "b"
    assert router.choose("r", prompt(1), exclude=["a", "b"]) is not None


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


def test_prefixes_go_stale_and_the_table_is_bounded() -> None:
    clock = Clock()
    table = PrefixTable(clock)
    chain = prefix_chain(prompt(1))
    table.remember("a", chain, capacity_tokens=1 << 20)
    assert table.num_hit_tokens("a", chain) == 256
    clock.now_s += STALE_PREFIX_S + 1
    assert table.num_hit_tokens("a", chain) == 0

    for i in range(100):
        table.remember("a", prefix_chain(prompt(i)), capacity_tokens=100 * CHUNK_TOKENS)
    assert table.num_entries() <= 100
    assert table.num_hit_tokens("a", prefix_chain(prompt(99))) == 256
    assert table.num_hit_tokens("a", prefix_chain(prompt(3))) == 0


@given(st.lists(st.integers(0, 3), max_size=300), st.lists(st.integers(0, 3), max_size=300))
def test_chains_share_exactly_the_common_full_chunks(left: list[int], right: list[int]) -> None:
    common = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
    chains = prefix_chain(left), prefix_chain(right)
    shared = sum(a == b for a, b in zip(*chains, strict=False))

    assert shared == common // CHUNK_TOKENS
    assert len(prefix_chain(left * 30)) <= MAX_CHUNKS


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60))
def test_every_place_comes_back(steps: list[tuple[int, bool]]) -> None:
    clock = Clock()
    router = router_of((0, health("a")), (1, health("b")), clock=clock)
    open_tickets = []
    for first, is_sent in steps:
        clock.now_s += 0.01
        if is_sent:
            open_tickets.append(router.choose(f"r{clock.now_s}", prompt(first)))
        elif open_tickets:
            open_tickets.pop(first % len(open_tickets)).close()
    for ticket in open_tickets:
        ticket.note_first_token()
        ticket.close()

    for known in router._replicas.values():
        assert (known.num_streams, known.num_waiting_tokens, known.open) == (0, 0, set())
