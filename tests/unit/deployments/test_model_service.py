"""A ModelReplica's logic over a real engine process whose engine is a clock; no Ray, no torch."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import AppConfig
from serve_app.core.errors import EngineError
from serve_app.core.requests import GenerateChunk, GenerateRequest
from serve_app.core.sampling import SamplingParams
from serve_app.deployments import model_service
from serve_app.deployments.model_service import ModelService
from serve_app.deployments.relay_receiver import RelayReceiver
from serve_app.engine.client import EngineClient
from serve_app.text.tokenizer import Tokenizer, load_tokenizer

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model(AppConfig().model))


@pytest.fixture
async def start(tokenizer: Tokenizer) -> AsyncIterator[Start]:
    clients: list[EngineClient] = []

    async def begin(rate: float = 500.0, **section: Any) -> ModelService:
        config = AppConfig.model_validate(
            {
                "engine": {
                    "fixed_rate_tokens_per_s": rate,
                    "max_num_seqs": 4,
                    "watchdog_min_s": 0.5,
                },
                "model_replica": section,
            }
        )
        client = EngineClient(config.model, config.engine)
        clients.append(client)
        await client.start()
        service = ModelService(config, client, tokenizer, "r1")
        await service.apply_toggles()
        return service

    yield begin
    for client in clients:
        await client.close()


@pytest.fixture
async def relay() -> AsyncIterator[RelayReceiver]:
    made = RelayReceiver()
    await made.start("127.0.0.1")
    yield made
    made.close()
    for _ in range(5):  # asyncio closes in a later round of the loop
        await asyncio.sleep(0)


def request(name: str, max_tokens: int = 8, **changes: Any) -> GenerateRequest:
    return GenerateRequest(name, (1, 2, 3), SamplingParams(max_tokens=max_tokens), **changes)


async def collect(service: ModelService, wanted: GenerateRequest) -> list[GenerateChunk]:
    return [chunk async for chunk in service.generate(wanted)]


async def wait_for(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_true():
            await asyncio.sleep(0.01)


async def test_a_stream_has_all_tokens_and_one_end(start: Start) -> None:
    service = await start(rate=50, stream_interval_ms=60_000)

    chunks = await collect(service, request("a", max_tokens=50))

    assert len(chunks) == 2, "neither the first token nor the last waits for the interval"
    assert len(chunks[0].token_ids) < 25
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].num_generated == sum(len(chunk.token_ids) for chunk in chunks) == 50
    assert chunks[0].engine_ttft_s is not None
    assert service.num_streams == 0


async def test_many_streams_are_gathered_into_few_messages(start: Start) -> None:
    service = await start(stream_interval_ms=80)

    chunks = await collect(service, request("a", max_tokens=200))

    assert len(chunks) < 30, "200 tokens in 0.4 s at a message per 80 ms"


async def test_a_stop_string_ends_stream_and_sequence(start: Start, tokenizer: Tokenizer) -> None:
    service = await start()
    text = "".join(chunk.text for chunk in await collect(service, request("a", max_tokens=30)))
    stop = text[10:14]

    chunks = await collect(service, request("b", max_tokens=2000, stop=(stop,)))

    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", stop)
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
    stats = await service.stats()
    assert (stats.num_running, stats.num_aborted_total) == (0, 1)


async def test_closing_a_stream_aborts_it(start: Start) -> None:
    service = await start()
    stream = service.generate(request("a", max_tokens=5000))
    await anext(stream)

    await stream.aclose()

    assert service.num_streams == 0
    stats = await service.stats()
    assert (stats.num_running, stats.num_aborted_total) == (0, 1)


async def test_a_full_queue_is_refused_as_data(start: Start) -> None:
    service = await start(max_queued_requests=1)
    tasks = [asyncio.create_task(collect(service, request(str(i), 2000))) for i in range(5)]
    await wait_for(lambda: service.num_streams == 5)

    (refusal,) = await collect(service, request("late"))

    assert refusal.error is not None
    assert (refusal.error.status, refusal.error.code) == (503, "queue_full")
    assert refusal.error.is_retryable
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_overload_stays_within_the_queue_and_costs_the_engine_nothing(
    start: Start,
) -> None:
    """Ten times what fits: 4 run, 2 wait, the engine never hears of the others."""
    service = await start(max_queued_requests=2)
    peak = 0

    async def ask(number: int) -> GenerateChunk:
        nonlocal peak
        chunks = []
        async for chunk in service.generate(request(str(number), max_tokens=40)):
            chunks.append(chunk)
            peak = max(peak, service.num_streams)
        return chunks[-1]

    ends = await asyncio.gather(*map(ask, range(60)))

    refused = [end for end in ends if end.error is not None]
    assert {end.error.code for end in refused if end.error} == {"queue_full"}
    assert {end.error.retry_after_s for end in refused if end.error} == {1.0}
    assert (len(ends) - len(refused), peak) == (6, 6)
    stats = await service.stats()
    assert stats.num_prompt_tokens_total == 6 * 3, "three tokens of each admitted prompt"
    assert stats.num_generation_tokens_total == 6 * 40
    assert (stats.num_running, stats.num_waiting, service.num_streams) == (0, 0, 0)
    late = await collect(service, request("late"))
    assert late[-1].finish_reason == "length", "it recovers at once"


async def test_a_draining_replica_refuses_new_requests_and_finishes_old_ones(start: Start) -> None:
    service = await start()
    running = asyncio.create_task(collect(service, request("a", max_tokens=100)))
    await wait_for(lambda: service.num_streams == 1)

    service.drain()

    (refusal,) = await collect(service, request("b"))
    assert refusal.error is not None
    assert refusal.error.code == "draining"
    assert (await running)[-1].finish_reason == "length"
    assert service.health().state == "draining"


async def test_a_request_that_cannot_be_is_an_error_of_the_client(start: Start) -> None:
    service = await start()

    (refusal,) = await collect(service, GenerateRequest("a", (), SamplingParams()))

    assert refusal.error is not None
    assert refusal.error.status == 400
    assert not refusal.error.is_retryable


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_lost_engine_ends_streams_with_an_error_and_comes_back(
    start: Start, number: signal.Signals
) -> None:
    service = await start()
    client = service._client
    running = asyncio.create_task(collect(service, request("a", max_tokens=5000)))
    await wait_for(lambda: service.num_streams == 1)

    os.kill(client.pid, number)

    last = (await running)[-1]
    assert last.error is not None
    assert (last.error.status, last.error.is_retryable) == (500, True)
    (refusal,) = await collect(service, request("b"))
    assert refusal.error is not None
    assert refusal.error.code == "model_loading"
    await service.check_health()  # it is being brought back, which is quicker than a new replica
    await wait_for(lambda: client.state == "ready")
    assert (await collect(service, request("c")))[-1].finish_reason == "length"


async def test_an_engine_that_does_not_come_back_takes_the_replica_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start()
    await service._client.close()
    await service.check_health()

    monkeypatch.setattr(model_service, "_DEAD_S", 0.0)

    with pytest.raises(EngineError, match="did not come back"):
        await service.check_health()


async def test_an_idle_engine_proves_itself_with_a_token(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_service, "_CANARY_IDLE_S", 0.0)
    service = await start(health_check_timeout_s=0.3)

    await service.check_health()
    stats = await service.stats()
    assert stats.num_generation_tokens_total == 1

    os.kill(service._client.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match=r"no token within 0\.24 s"):
        await service.check_health()
    os.kill(service._client.pid, signal.SIGKILL)


async def test_toggles_change_and_what_cannot_be_is_refused(start: Start) -> None:
    service = await start()

    await service.reconfigure({"batching": {"mode": "static", "max_num_seqs": 2}})
    assert (await service.stats()).mode == "static"

    for bad in ({"batching": {"max_num_seqs": 100}}, {"batchin": {}}):
        await service.reconfigure(bad)
        assert "user_config refused" in service.health().detail
        assert service.state()["toggles"]["batching"]["mode"] == "static"
    await service.reconfigure({"batching": {"mode": False}})
    assert service.health().detail == ""
    assert (await service.stats()).mode == "off"


async def test_metrics_tell_of_the_engine(start: Start) -> None:
    service = await start()
    await collect(service, request("a", max_tokens=7))

    text = await service.metrics_text()

    assert 'xeray_generation_tokens_total{model_name="SmolLM2-135M-Instruct"} 7.0' in text


async def test_a_relayed_stream_has_its_first_chunk_here_and_the_rest_at_the_relay(
    start: Start, relay: RelayReceiver
) -> None:
    service = await start(stream_interval_ms=20)
    inbox = relay.add()
    assert inbox is not None
    came: list[GenerateChunk] = []
    inbox.open(came.append)

    (first,) = await collect(service, request("a", max_tokens=100, relay=inbox.target))
    await wait_for(lambda: inbox.is_finished)

    assert first.is_relayed
    assert first.engine_ttft_s is not None
    assert [chunk.finish_reason for chunk in came[:-1]] == [None] * (len(came) - 1)
    assert came[-1].finish_reason == "length"
    tokens = [token for chunk in (first, *came) for token in chunk.token_ids]
    assert len(tokens) == came[-1].num_generated == 100
    assert 1 < len(came) < 60, "gathered"
    whole = await collect(service, request("b", max_tokens=100))
    assert "".join(c.text for c in (first, *came)) == "".join(c.text for c in whole)
    assert service.num_streams == 0
    service.close()


async def test_closing_a_relayed_stream_aborts_it(start: Start, relay: RelayReceiver) -> None:
    service = await start()
    inbox = relay.add()
    assert inbox is not None
    stream = service.generate(request("a", max_tokens=5000, relay=inbox.target))
    assert (await anext(stream)).is_relayed

    await stream.aclose()

    stats = await service.stats()
    assert (service.num_streams, stats.num_running, stats.num_aborted_total) == (0, 0, 1)
    service.close()


async def test_a_relay_that_cannot_be_reached_leaves_all_to_this_stream(
    start: Start, relay: RelayReceiver
) -> None:
    service = await start()
    inbox = relay.add()
    assert inbox is not None
    relay.close()

    chunks = await collect(service, request("a", max_tokens=20, relay=inbox.target))

    assert not any(chunk.is_relayed for chunk in chunks)
    assert chunks[-1].num_generated == 20
    service.close()


async def test_a_relay_that_is_lost_ends_the_stream_with_an_error(
    start: Start, relay: RelayReceiver
) -> None:
    service = await start()
    inbox = relay.add()
    assert inbox is not None
    stream = service.generate(request("a", max_tokens=5000, relay=inbox.target))
    await anext(stream)

    relay.close()

    async with asyncio.timeout(10):
        last = await anext(stream)
    assert last.error is not None
    assert last.error.status == 500
    assert "xeray_relay_lost_requests_total 1.0" in await service.metrics_text()
    await stream.aclose()
    service.close()
