from __future__ import annotations

import pytest

from serve_app.config.schema import EngineSection
from serve_app.core.clock import ManualClock
from serve_app.core.events import BatchingMode, BatchingOptions, FinishReason
from serve_app.core.sampling import SamplingParams
from serve_app.engine.fixed_rate import FixedRateEngine, token_id_at


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def engine(clock: ManualClock) -> FixedRateEngine:
    section = EngineSection(fixed_rate_tokens_per_s=10, max_num_seqs=2)
    return FixedRateEngine(
        section, model="m", vocab_size=100, max_model_len=64, clock=clock, sleep=clock.advance
    )


def run_until(engine: FixedRateEngine, clock: ManualClock, end_s: float) -> list[int]:
    counts: dict[str, int] = {}
    while clock.now() < end_s and engine.has_work():
        for event in engine.step():
            counts[event.request_id] = counts.get(event.request_id, 0) + len(event.new_token_ids)
    return [counts[name] for name in sorted(counts)]


def test_each_stream_gets_the_rate(engine, clock):
    for name in ("a", "b"):
        engine.submit(name, [5], SamplingParams(max_tokens=40))
    counts = run_until(engine, clock, 2.005)
    assert counts == [20, 20]


def test_a_late_step_makes_up_for_what_was_due(engine, clock):
    engine.submit("a", [5], SamplingParams(max_tokens=40))
    engine.step()
    clock.advance(1.0)
    (event,) = engine.step()
    assert event.new_token_ids == tuple(token_id_at(5, place, 100) for place in range(10))


def test_limits_modes_and_ends(engine, clock):
    engine.configure(BatchingOptions(BatchingMode.OFF))
    for name in ("a", "b", "c"):
        engine.submit(name, [5], SamplingParams(max_tokens=3))
    ends = []
    while engine.has_work():
        ends += [event for event in engine.step() if event.finish_reason]
    assert [(event.request_id, event.finish_reason) for event in ends] == [
        (name, FinishReason.LENGTH) for name in ("a", "b", "c")
    ]
    assert engine.stats().max_num_running == 1
    assert engine.stats().num_generation_tokens_total == 9


def test_abort_ends_a_waiting_and_a_running_stream(engine):
    for name in ("a", "b", "c"):
        engine.submit(name, [5], SamplingParams(max_tokens=30))
    engine.step()
    engine.abort("a")
    engine.abort("c")
    reasons = {e.request_id: e.finish_reason for e in engine.step() if e.finish_reason}
    assert reasons == {"a": FinishReason.ABORTED, "c": FinishReason.ABORTED}


def test_stop_ids_are_never_emitted(engine):
    stop = token_id_at(5, 1, 100)
    engine.submit("a", [5], SamplingParams(max_tokens=5, stop_token_ids=(stop,)))
    ids = []
    while engine.has_work():
        ids += [i for event in engine.step() for i in event.new_token_ids]
    assert len(ids) == 5
    assert stop not in ids
