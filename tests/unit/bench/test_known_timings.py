"""The load generator against a server of known timings: counts exact, times within tolerance.

The tolerance is how late the server itself was, which only another program on the machine decides,
and a share of the figure: a generator that measured anything else would be off by whole periods.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve_app.bench.goodput import parse_slo
from serve_app.bench.load import LoadGenerator, LoadResult, Target
from serve_app.bench.report import summarise
from serve_app.bench.workloads import RequestSpec, WorkloadOptions, make_workload
from tests.unit.bench.timed_service import TimedService

TTFT_S = 0.12
ITL_S = 0.04
NUM_TOKENS = 9
E2EL_S = TTFT_S + (NUM_TOKENS - 1) * ITL_S


def specs(count: int) -> list[RequestSpec]:
    options = WorkloadOptions(count, prompt_tokens=7, output_tokens=NUM_TOKENS)
    return make_workload("fixed", options)


async def measure(
    service: TimedService, *, count: int, concurrency: int | None = None, rate: float | None = None
) -> tuple[LoadResult, float]:
    """Return the result and the tolerance in seconds."""
    async with service.running():
        generator = LoadGenerator(Target.from_url(service.url, "m"))
        if rate is not None:
            result = await generator.run_open(specs(count), rate, seed=4)
        else:
            assert concurrency is not None
            result = await generator.run_closed(specs(count), concurrency)
    return result, 0.012 + 2 * max(service.late_s)


def figures_of(result: LoadResult) -> dict[str, Any]:
    return summarise(result, parse_slo(f"ttft_ms={1e3 * (TTFT_S + 10)}"))


async def test_closed_loop_measures_what_the_server_does() -> None:
    result, tolerance_s = await measure(TimedService(TTFT_S, ITL_S), count=12, concurrency=4)

    figures = figures_of(result)
    assert (figures["completed"], figures["failed"]) == (12, 0)
    assert figures["total_input_tokens"] == 12 * 7
    assert figures["total_output_tokens"] == 12 * NUM_TOKENS
    assert figures["max_concurrent_requests"] == 4
    assert [len(record.itls_s) for record in result.records] == [NUM_TOKENS - 1] * 12
    for statistic in ("mean", "median", "p50", "p90", "p99"):
        near = {"rel": 0.02, "abs": 1e3 * tolerance_s}
        assert figures[f"{statistic}_ttft_ms"] == pytest.approx(1e3 * TTFT_S, **near)
        assert figures[f"{statistic}_itl_ms"] == pytest.approx(1e3 * ITL_S, **near)
        assert figures[f"{statistic}_tpot_ms"] == pytest.approx(1e3 * ITL_S, **near)
        assert figures[f"{statistic}_e2el_ms"] == pytest.approx(1e3 * E2EL_S, **near)
    duration_s = pytest.approx(3 * E2EL_S, abs=4 * tolerance_s)
    assert figures["duration"] == duration_s
    assert figures["output_throughput"] == 12 * NUM_TOKENS / figures["duration"]
    assert figures["request_throughput"] == 12 / figures["duration"]
    assert figures["request_goodput"] == figures["request_throughput"]
    assert figures["client_cpu_us_per_token"] > 0


async def test_no_time_is_shorter_than_the_server_can_be() -> None:
    result, _ = await measure(TimedService(TTFT_S, ITL_S), count=6, concurrency=6)

    for record in result.records:
        assert record.ttft_s is not None
        assert record.ttft_s >= TTFT_S
        assert record.e2el_s >= E2EL_S
        assert sum(record.itls_s) == pytest.approx(record.e2el_s - record.ttft_s, abs=0.05)


async def test_gathered_tokens_count_once_per_chunk_in_itl_and_each_in_tpot() -> None:
    service = TimedService(TTFT_S, ITL_S, tokens_per_chunk=4)

    result, tolerance_s = await measure(service, count=2, concurrency=2)

    figures = figures_of(result)
    assert figures["total_output_tokens"] == 2 * NUM_TOKENS
    assert [len(record.itls_s) for record in result.records] == [2, 2]
    assert [record.chunk_chars for record in result.records] == [[4, 4, 1]] * 2
    assert figures["median_itl_ms"] == pytest.approx(4e3 * ITL_S, abs=1e3 * tolerance_s)
    assert figures["median_tpot_ms"] == pytest.approx(1e3 * ITL_S, abs=1e3 * tolerance_s)


async def test_open_loop_is_not_slowed_by_a_slow_server() -> None:
    """Forty arrivals a second at a server that holds each for 0.44 s: they pile up, none waits."""
    service = TimedService(TTFT_S, ITL_S)

    result, tolerance_s = await measure(service, count=12, rate=40.0)

    figures = figures_of(result)
    assert figures["completed"] == 12
    assert service.max_open > 4
    assert figures["max_concurrent_requests"] >= service.max_open
    assert figures["median_ttft_ms"] == pytest.approx(1e3 * TTFT_S, abs=1e3 * tolerance_s)
    sent = [record.sent_at_s for record in result.records]
    assert figures["duration"] == pytest.approx(sent[-1] - sent[0] + E2EL_S, abs=2 * tolerance_s)


async def test_goodput_counts_the_requests_that_met_every_bound() -> None:
    result, _ = await measure(TimedService(TTFT_S, ITL_S), count=4, concurrency=4)
    seconds = [record.e2el_s for record in result.records]

    strict = summarise(result, parse_slo("ttft_ms=1,tpot_ms=10000"))
    middle = summarise(result, parse_slo(f"e2el_ms={1e3 * sorted(seconds)[1]}"))

    assert (strict["request_goodput"], strict["slo_met"]) == (0.0, 0.0)
    assert strict["slo"] == {"ttft_ms": 1.0, "tpot_ms": 10000.0}
    assert middle["slo_met"] == 0.5
    assert middle["request_goodput"] == pytest.approx(2 / middle["duration"])


async def test_nothing_is_sent_after_the_time_limit() -> None:
    service = TimedService(0.1, 0.0)
    async with service.running():
        target = Target.from_url(service.url, "m")
        closed = await LoadGenerator(target, max_duration_s=0.05).run_closed(specs(5), 2)
        late = await LoadGenerator(target, max_duration_s=0.5).run_open(specs(50), 10.0, seed=1)

    assert (len(closed.records), closed.num_unsent) == (2, 3)
    assert all(record.error is None for record in closed.records)
    assert len(late.records) + late.num_unsent == 50
    assert 0 < len(late.records) < 25
    assert not closed.is_cut


async def test_an_interrupted_run_keeps_what_is_complete() -> None:
    complete = asyncio.Event()
    service = TimedService(0.02, 0.0)
    async with service.running():
        target = Target.from_url(service.url, "m")
        generator = LoadGenerator(target, on_record=lambda record: complete.set())
        run = asyncio.create_task(generator.run_closed(specs(1000), 1))
        await complete.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        result = generator.so_far()

    figures = summarise(result)
    assert figures["is_cut"]
    assert 1 <= figures["completed"] < 1000
    assert figures["failed"] == 0
    assert figures["total_output_tokens"] == NUM_TOKENS * figures["completed"]
