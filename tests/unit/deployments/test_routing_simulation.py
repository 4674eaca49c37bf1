"""The router against Serve's default one, simulated: the same arrivals, five seeds."""

from statistics import mean

from tests.unit.deployments.routing_simulation import (
    Arrival,
    Outcome,
    Simulation,
    mixed,
    shared_prefixes,
)

SPEEDS = [2000.0] * 4


def both(seed: int, arrivals: list[Arrival], speeds: list[float]) -> tuple[Outcome, Outcome]:
    """Return what Serve's default and what our router came to."""
    default, ours = (
        Simulation(seed, policy, speeds, num_blocks=600).run(arrivals)
        for policy in ("power_of_two", "expected_start")
    )
    assert len(ours.ttfts_s) == len(default.ttfts_s) == len(arrivals)
    return default, ours


def test_shared_prefixes_are_found_again_and_answers_begin_sooner() -> None:
    runs = [both(seed, shared_prefixes(seed, count=800), SPEEDS) for seed in range(5)]

    assert mean(ours.hit_rate / default.hit_rate for default, ours in runs) >= 1.5
    assert mean(ours.ttft_p95_s / default.ttft_p95_s for default, ours in runs) <= 0.8
    assert all(ours.hit_rate > 1.3 * default.hit_rate for default, ours in runs)
    assert all(ours.ttft_p95_s < 0.9 * default.ttft_p95_s for default, ours in runs)


def test_a_mixed_load_is_served_no_worse() -> None:
    runs = [both(seed, mixed(seed), SPEEDS) for seed in range(5)]

    assert mean(ours.ttft_p95_s / default.ttft_p95_s for default, ours in runs) <= 1.02
    assert mean(ours.hit_rate / default.hit_rate for default, ours in runs) >= 1.0


def test_slow_replicas_get_less_of_the_load() -> None:
    default, ours = both(0, mixed(0), [4000.0, 4000.0, 1000.0, 1000.0])

    share = sum(number < 2 for number in ours.chosen) / len(ours.chosen)
    assert share > 0.7
    assert ours.ttft_p95_s < 0.8 * default.ttft_p95_s


def test_waiting_requests_that_move_begin_sooner_under_a_burst() -> None:
    """Five times the rate that the replicas bear, on replicas of unlike speed."""
    speeds = [4000.0, 4000.0, 1000.0, 1000.0]
    ratios, num_moves = [], 0
    for seed in range(3):
        arrivals = mixed(seed, count=200, rate=25.0)
        stay, move = (
            Simulation(seed, "expected_start", speeds, num_blocks=600, lets_move=lets_move)
            for lets_move in (False, True)
        )
        before, after = stay.run(arrivals), move.run(arrivals)
        assert len(after.ttfts_s) == len(before.ttfts_s) == len(arrivals)
        ratios.append(after.ttft_p95_s / before.ttft_p95_s)
        num_moves += move.num_moves

    assert num_moves > 0
    assert mean(ratios) < 1.0
