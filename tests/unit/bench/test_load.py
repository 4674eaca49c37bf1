from __future__ import annotations

import asyncio
import re

import pytest

from serve_app.bench.load import LoadGenerator, LoadResult, Target
from serve_app.bench.workloads import RequestSpec, WorkloadOptions, make_workload
from serve_app.core.errors import ConfigError
from tests.unit.bench.fake_service import FakeService


def specs(count: int, num_output: int = 4) -> list[RequestSpec]:
    return make_workload("fixed", WorkloadOptions(count, prompt_tokens=8, output_tokens=num_output))


async def load(service: FakeService, count: int = 1, concurrency: int = 1) -> LoadResult:
    service.release.set()
    async with service.running():
        target = Target.from_url(service.url, "m", api_key="secret")
        return await LoadGenerator(target).run_closed(specs(count), concurrency)


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_stream_is_counted_and_timed_in_order(is_chunked: bool) -> None:
    service = FakeService(is_chunked=is_chunked)

    result = await load(service, count=3)

    assert [record.error for record in result.records] == [None] * 3
    for record in result.records:
        assert (record.num_prompt_tokens, record.num_output_tokens) == (8, 4)
        assert record.finish_reason == "length"
        assert record.ttft_s is not None
        assert 0 < record.ttft_s <= record.ttft_s + sum(record.itls_s) <= record.e2el_s
        assert record.tpot_s == pytest.approx((record.e2el_s - record.ttft_s) / 3)
    assert result.duration_s >= max(record.e2el_s for record in result.records)
    sent = [record.sent_at_s for record in result.records]
    assert sent == sorted(sent)


async def test_request_says_what_it_wants() -> None:
    service = FakeService()

    await load(service)

    body, head = service.bodies[0], service.heads[0]
    assert body["model"] == "m"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert len(body["prompt"]) == 8
    assert head.startswith("POST /v1/completions HTTP/1.1\r\n")
    assert "Authorization: Bearer secret\r\n" in head


async def test_closed_loop_keeps_its_number_in_flight() -> None:
    service = FakeService()
    async with service.running():
        generator = LoadGenerator(Target.from_url(service.url, "m"))
        run = asyncio.create_task(generator.run_closed(specs(10), 4))
        await service.wait_for_requests(4)
        held = len(service.bodies)
        service.release.set()
        result = await run

    assert held == 4
    assert service.max_open == 4
    assert result.max_in_flight == 4
    assert len(result.records) == len(service.bodies) == 10


async def test_open_loop_waits_for_nobody() -> None:
    service = FakeService()
    async with service.running():
        generator = LoadGenerator(Target.from_url(service.url, "m"))
        run = asyncio.create_task(generator.run_open(specs(6), requests_per_s=1e6, seed=1))
        await service.wait_for_requests(6)  # though none has been answered
        service.release.set()
        result = await run

    assert result.max_in_flight == 6
    assert all(record.error is None for record in result.records)


async def test_open_loop_arrivals_depend_on_the_seed_alone() -> None:
    service = FakeService()
    service.release.set()
    async with service.running():
        generator = LoadGenerator(Target.from_url(service.url, "m"))
        result = await generator.run_open(specs(5), requests_per_s=200.0, seed=3)

    sent = [record.sent_at_s for record in result.records]
    assert sent == sorted(sent)


@pytest.mark.parametrize(
    ("service", "message"),
    [
        (FakeService(status=503), "HTTP 503: queue is full"),
        (FakeService(cut_after=2, is_chunked=False), r"ended without \[DONE\]"),
        (FakeService(cut_after=2), r"ended without \[DONE\]"),
        (FakeService(error_after=1), "engine died"),
    ],
)
async def test_failures_are_recorded_and_do_not_stop_the_run(
    service: FakeService, message: str
) -> None:
    result = await load(service, count=2)

    assert len(result.records) == 2
    for record in result.records:
        assert record.error is not None
        assert re.search(message, record.error)


async def test_nobody_listening_is_recorded() -> None:
    target = Target("127.0.0.1", 1, "m")

    result = await LoadGenerator(target).run_closed(specs(1), 1)

    assert result.records[0].error is not None


async def test_an_answer_that_never_comes_is_given_up() -> None:
    service = FakeService()
    async with service.running():
        target = Target.from_url(service.url, "m", timeout_s=0.05)
        result = await LoadGenerator(target).run_closed(specs(1), 1)
        service.release.set()

    assert result.records[0].error == "no complete answer within 0.05 s"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_bad_url_is_one_line(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        Target.from_url(url, "m")
