"""Faults of the engine's process and device: each stream ends once, typed, and service is back."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import EngineError
from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.sampling import SamplingParams
from serve_app.engine import native
from serve_app.engine.client import EngineClient
from serve_app.engine.token_stream import TokenStream

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


async def terminal(stream: TokenStream) -> TokenEvent:
    events = [event async for batch in stream for event in batch]
    (end,) = [event for event in events if event.finish_reason is not None]
    assert events[-1] is end
    return end


@pytest.mark.parametrize("fault", ["device_lost", "bug"])
async def test_an_engine_that_breaks_down_ends_its_streams_and_comes_back(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("XERAY_FAULT_INJECTION", "1")
    states: list[str] = []
    client = EngineClient(
        ModelSection(path=str(tiny_folder)),
        EngineSection(fixed_rate_tokens_per_s=200.0, max_num_seqs=8),
        on_state_change=lambda state, detail: states.append(state),
    )
    await client.start()
    running = [client.submit(f"r{i}", (5,), SamplingParams(max_tokens=400)) for i in range(12)]
    await anext(running[0])
    client.inject_fault(fault)
    ends = await asyncio.gather(*map(terminal, running))
    assert {end.finish_reason for end in ends} == {FinishReason.ERROR}
    assert all(end.error is not None and end.error.is_retryable for end in ends)
    async with asyncio.timeout(20):
        while client.state != "ready":
            await asyncio.sleep(0.01)
    assert states == ["ready", "dead", "loading", "ready"]
    again = await terminal(client.submit("again", (5,), SamplingParams(max_tokens=2)))
    assert again.finish_reason is FinishReason.LENGTH
    stats = await client.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    await client.close()


@pytest.mark.parametrize("is_seen_at_once", [True, False])
def test_a_lost_device_leaves_no_sequence_without_an_end(
    make_engine: Callable[..., native.NativeEngine],
    monkeypatch: pytest.MonkeyPatch,
    is_seen_at_once: bool,
) -> None:
    """Told by the device itself, or by the third step that fails in a row."""
    engine = make_engine(max_num_seqs=2)
    network = engine._runner.network
    for place in range(7):
        engine.submit(str(place), [5, 6 + place], GREEDY)
    before = engine.step()
    assert before
    assert engine.stats().num_used_blocks > 0

    def broken(*args: object) -> None:
        raise RuntimeError("device error: UR_RESULT_ERROR_DEVICE_LOST")

    monkeypatch.setattr(network, "forward", broken)
    monkeypatch.setattr(native, "is_device_lost", lambda device: is_seen_at_once)
    events = [event for _ in range(1 if is_seen_at_once else 3) for event in engine.step()]
    with pytest.raises(EngineError, match="no longer answers"):
        engine.step()
    ends = [event.request_id for event in events if event.finish_reason is FinishReason.ERROR]
    assert sorted(ends) == [str(place) for place in range(7)], "one end each, the waiting ones too"
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    engine.check_integrity()


_ON_A_FULL_DISK = """
import asyncio, logging, sys
from serve_app.config.schema import EngineSection, LoggingSection, ModelSection
from serve_app.core.sampling import SamplingParams
from serve_app.engine.client import EngineClient
from serve_app.observability.logs import SteadyHandler, setup_logging

async def main():
    logger = setup_logging(LoggingSection())
    section = EngineSection(fixed_rate_tokens_per_s=500.0, max_num_seqs=4)
    client = EngineClient(ModelSection(path=sys.argv[1]), section)
    await client.start()
    num_tokens = 0
    async for events in client.submit("a", (5,), SamplingParams(max_tokens=50)):
        logger.error("a line for each step")
        num_tokens += sum(len(event.new_token_ids) for event in events)
    await client.close()
    print(num_tokens, SteadyHandler.num_lost_in_all > 0)

asyncio.run(main())
"""


def test_a_full_disk_under_the_logs_costs_no_token(tiny_folder: Path) -> None:
    """Client and engine process both write their logs to a device without room."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", _ON_A_FULL_DISK, str(tiny_folder)],
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=60,
            check=False,
            text=True,
        )
    assert done.stdout == "50 True\n"
