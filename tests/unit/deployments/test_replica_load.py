from dataclasses import replace

import pytest

from serve_app.core.events import EngineInfo, EngineStats
from serve_app.deployments.replica_load import WINDOW_S, LoadMeter, autoscaling_stats

INFO = EngineInfo("e", "m", "cpu", "cpu", "f32", 10, 100, 8, 256, 16, 200)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> LoadMeter:
    return LoadMeter(clock)


def test_prompts_wait_until_their_first_token(meter: LoadMeter, clock: Clock) -> None:
    with meter.sequence(100) as first, meter.sequence(50):
        assert meter.load(EngineStats(), INFO, 8).num_waiting_tokens == 150
        clock.now_s = 2.0
        first.note_first_token()
        first.note_first_token()
        load = meter.load(EngineStats(), INFO, 8)
        assert (load.num_streams, load.num_waiting_tokens) == (2, 50)
        assert load.ttft_p95_s == 2.0, "who still waits counts with the wait so far"
    load = meter.load(EngineStats(), INFO, 8)
    assert (load.num_streams, load.num_waiting_tokens, load.mean_service_s) == (0, 0, 2.0)


def test_a_failure_gives_its_place_back_and_says_nothing_of_the_service(meter: LoadMeter) -> None:
    with pytest.raises(KeyError), meter.sequence(10):
        raise KeyError
    load = meter.load(EngineStats(), INFO, 8)
    assert (load.num_streams, load.num_waiting_tokens, load.mean_service_s) == (0, 0, 0.0)


def test_old_times_are_forgotten(meter: LoadMeter, clock: Clock) -> None:
    with meter.sequence(1) as sequence:
        clock.now_s = 3.0
        sequence.note_first_token()
    assert meter.ttft_p95_s() == 3.0
    clock.now_s += WINDOW_S + 1
    assert meter.ttft_p95_s() == 0.0


def test_speed_is_taken_from_steps_that_mostly_compute_prompts(meter: LoadMeter) -> None:
    stats = EngineStats(
        num_scheduled_tokens_total=1000, num_generation_tokens_total=10, step_time_s_total=2.0
    )
    assert meter.load(stats, INFO, 8).prefill_tokens_per_s == 500.0
    decoding = replace(
        stats,
        num_scheduled_tokens_total=1100,
        num_generation_tokens_total=110,
        step_time_s_total=12.0,
    )
    assert meter.load(decoding, INFO, 8).prefill_tokens_per_s == 500.0, "decode steps do not count"


def test_an_idle_replica_holds_no_blocks_whatever_the_last_step_said(meter: LoadMeter) -> None:
    stats = EngineStats(num_used_blocks=50)
    assert meter.load(stats, INFO, 8).num_used_blocks == 0
    with meter.sequence(1):
        load = meter.load(stats, INFO, 8)
    assert autoscaling_stats(load) == {
        "num_waiting_tokens": 1.0,
        "kv_usage": 0.25,
        "ttft_p95_s": 0.0,
        "num_streams": 1.0,
    }
