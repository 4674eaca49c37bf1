"""Profiles of the native engine on the tiny model, directly and through the engine's process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import EngineError, OverloadedError
from serve_app.core.sampling import SamplingParams
from serve_app.engine.client import EngineClient
from serve_app.engine.step_profiler import StepProfiler
from serve_app.engine.trace_summary import OUTSIDE
from serve_app.models.kernels.cpu import cpu_kernels

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)
SECTION = EngineSection(
    device="cpu", kv_cache_tokens=2048, max_num_seqs=4, num_threads=1, warmup=False
)


class Replaying:
    """Stands for captured graphs: what is recorded is run again, and counted."""

    is_capturing = True

    def __init__(self) -> None:
        self.num_replays = 0

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        result = function()

        def replay() -> torch.Tensor:
            self.num_replays += 1
            return result.copy_(function())

        return replay


def drive(engine, profiler: StepProfiler) -> None:
    while engine.has_work():
        profiler.before_step()
        engine.step()
        profiler.after_step()


def wait(profiler: StepProfiler) -> None:
    assert profiler._writer is not None
    profiler._writer.join(30)


def test_steps_are_traced_summed_up_and_the_trace_is_a_chrome_trace(make_engine, tmp_path):
    engine = make_engine()
    engine.submit("a", [5, 6, 7], GREEDY)
    profiler = StepProfiler(engine, 6, tmp_path / "trace.json")
    drive(engine, profiler)
    wait(profiler)
    figures = profiler.result
    assert isinstance(figures, dict)
    assert figures["num_steps"] == 6
    assert figures["operators"][0]["seconds"] >= figures["operators"][-1]["seconds"] > 0
    assert {"aten::mm", OUTSIDE} <= {each["name"] for each in figures["operators"]}
    assert 0.5 < sum(each["share"] for each in figures["operators"]) <= 1.05
    assert figures["copied_bytes"] > 0
    assert figures["read_bytes_per_s"] > 0
    assert figures["capture_speedup"] is None, "nothing is captured here"
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "engine step" for event in events) >= 6


def test_captured_steps_are_compared_with_uncaptured_ones(make_engine, tmp_path):
    graphs = Replaying()
    engine = make_engine(graphs=graphs)
    engine.submit("a", [5, 6, 7], GREEDY)
    profiler = StepProfiler(engine, 4, tmp_path / "trace.json")
    counts = []
    while engine.has_work():
        profiler.before_step()
        engine.step()
        profiler.after_step()
        counts.append(graphs.num_replays)
    wait(profiler)
    assert isinstance(profiler.result, dict)
    assert profiler.result["captured_step_s"] > 0
    assert profiler.result["uncaptured_step_s"] > 0
    assert profiler.result["capture_speedup"] == pytest.approx(
        profiler.result["uncaptured_step_s"] / profiler.result["captured_step_s"]
    )
    still = [i for i in range(2, len(counts)) if counts[i] == counts[i - 1]]
    assert len(still) == 6, "four steps, and two to settle, ran uncaptured"
    assert counts[-1] > counts[still[-1]], "and the rest is replayed again"


def test_a_step_that_computes_nothing_is_none(make_engine, tmp_path):
    engine = make_engine()

    def leave_an_abort() -> None:
        engine.submit("left", [5, 6, 7], GREEDY)
        engine.step()
        engine.abort("left")

    leave_an_abort()
    profiler = StepProfiler(engine, 4, tmp_path / "trace.json")
    drive(engine, profiler)
    profiler.finish()
    assert isinstance(profiler.result, EngineError)
    assert not (tmp_path / "trace.json").exists()

    leave_an_abort()
    profiler = StepProfiler(engine, 4, tmp_path / "trace.json")
    profiler.before_step()
    engine.step()
    profiler.after_step()
    engine.submit("a", [5, 6, 7], GREEDY)
    drive(engine, profiler)
    wait(profiler)
    assert isinstance(profiler.result, dict)
    assert profiler.result["num_steps"] == 4
    assert profiler._num_traced == 4


def test_no_step_is_an_error_and_no_file(make_engine, tmp_path):
    profiler = StepProfiler(make_engine(), 4, tmp_path / "trace.json")
    profiler.finish()
    assert isinstance(profiler.result, EngineError)
    assert not (tmp_path / "trace.json").exists()


async def test_through_the_process(tiny_folder: Path, tmp_path: Path):
    client = EngineClient(ModelSection(path=str(tiny_folder)), SECTION)
    await client.start()
    try:
        with pytest.raises(EngineError, match="no step ran"):
            await client.profile(5, str(tmp_path / "idle.json"), timeout_s=0.05)
        profile = asyncio.create_task(client.profile(5, str(tmp_path / "t.json"), timeout_s=30))
        await asyncio.sleep(0)  # its command goes first
        stream = client.submit("a", [5, 6, 7], GREEDY)
        with pytest.raises(OverloadedError, match="already"):
            await client.profile(5, str(tmp_path / "second.json"), timeout_s=30)
        tokens = [i async for events in stream for event in events for i in event.new_token_ids]
        figures = await profile
        assert len(tokens) == 40
        assert figures["num_steps"] == 5
        assert figures["trace"] == str(tmp_path / "t.json")
        assert (tmp_path / "t.json").exists()
        calls = {each["name"]: each["calls"] for each in figures["operators"]}
        if cpu_kernels(torch.empty(0)) is not None:
            assert calls["xeray::add_rms_norm"] == 5 * (2 * 2 + 1), "two a layer, and a last one"
        assert sum(each["share"] for each in figures["operators"]) > 0.5
        few = asyncio.create_task(client.profile(500, str(tmp_path / "few.json"), timeout_s=1))
        await asyncio.sleep(0)
        client.submit("b", [5], GREEDY)
        assert 1 <= (await few)["num_steps"] <= 42, "what came in time is enough"
    finally:
        await client.close()
