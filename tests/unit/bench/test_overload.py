from __future__ import annotations

import asyncio

import pytest

from serve_app.bench import overload as module
from serve_app.bench.footprint import Growth
from serve_app.bench.load import LoadGenerator, LoadResult, RequestRecord, Target
from serve_app.bench.overload import OverloadOptions, OverloadReport, report_of
from serve_app.bench.workloads import WorkloadOptions, make_workload
from tests.unit.bench.fake_service import FakeService

OPTIONS = OverloadOptions()


def answered(seconds: float) -> RequestRecord:
    return RequestRecord("fixed", 0.0, ttft_s=0.1, e2el_s=seconds, status=200)


def refused(seconds: float, status: int = 503, retry_after_s: float | None = 1.0) -> RequestRecord:
    return RequestRecord(
        "fixed", 0.0, e2el_s=seconds, error="full", status=status, retry_after_s=retry_after_s
    )


def report(
    loaded: list[RequestRecord], recovery_ms: float = 2000.0, grew: float = 0
) -> OverloadReport:
    unloaded = LoadResult(tuple(answered(2.0) for _ in range(20)), 60.0, 0.1, 3)
    result = LoadResult(tuple(loaded), 60.0, 0.1, 50)
    growth = Growth("num_fds", grew, 8.0, 100.0)
    return report_of(unloaded, result, recovery_ms, [growth], OPTIONS)


GOOD = [answered(2.1)] * 10 + [refused(0.01)] * 80 + [refused(0.02, 429)] * 10


def broken(seen: OverloadReport) -> list[str]:
    return [line.name for line in seen.lines() if not line.is_held]


def test_all_limits_hold() -> None:
    seen = report(GOOD)
    assert broken(seen) == []
    assert (seen.num_admitted, seen.num_refused) == (10, 90)
    assert seen.refusal_p95_ms == pytest.approx(20)
    assert seen.admitted_p95_e2el_ms / seen.unloaded_p95_e2el_ms == pytest.approx(1.05)


@pytest.mark.parametrize(
    ("seen", "name"),
    [
        (report([*GOOD, *[refused(0.06)] * 20]), "refusal p95, ms"),
        (report([*GOOD, refused(0.01, retry_after_s=None)]), "refusals without Retry-After"),
        (report([*GOOD, refused(0.01, 500)]), "other failures"),
        (report([*GOOD, *[answered(2.5)] * 10]), "admitted p95 / unloaded p95"),
        (report(GOOD, recovery_ms=4001.0), "back to normal after, ms"),
        (report(GOOD, recovery_ms=float("nan")), "back to normal after, ms"),
        (report(GOOD, grew=9), "growth of fds"),
        (report([answered(2.0)]), "refusals"),
    ],
)
def test_each_limit_can_break(seen: OverloadReport, name: str) -> None:
    assert name in broken(seen)


def test_capacity_is_what_the_clock_can_carry() -> None:
    options = OverloadOptions(num_streams=8, tokens_per_s=20, output_tokens=40)
    assert options.capacity == 4.0


async def test_a_refusal_is_noted_with_its_retry_after() -> None:
    service = FakeService(status=503)
    service.release.set()
    async with service.running():
        target = Target.from_url(service.url, "m")
        specs = make_workload("fixed", WorkloadOptions(2, 4, 2))
        result = await LoadGenerator(target).run_closed(specs, 1)
    assert {record.status for record in result.records} == {503}
    assert {record.retry_after_s for record in result.records} == {None}, "this one tells none"


async def test_recovery_is_the_time_to_the_first_whole_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_RECOVERY_PERIOD_S", 0.0)
    service = FakeService(status=503)
    service.release.set()
    async with service.running():
        waiting = asyncio.create_task(
            module._recovery_ms(Target.from_url(service.url, "m"), OPTIONS)
        )
        await service.wait_for_requests(3)
        assert not waiting.done()
        service.status = 200
        assert 0 < await waiting < 10_000
