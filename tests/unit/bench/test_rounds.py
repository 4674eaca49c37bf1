from __future__ import annotations

import statistics
from typing import Any

import pytest

from serve_app.bench.engine_bench import run_rounds
from serve_app.bench.floors import (
    FloorLine,
    engine_lines,
    http_aim_line,
    http_share_line,
    overhead_lines,
)
from serve_app.bench.rounds import RoundOptions, rounds_table
from serve_app.config.schema import EngineSection
from serve_app.core.clock import ManualClock
from serve_app.core.errors import EngineError
from serve_app.core.events import FinishReason, TokenEvent
from serve_app.engine.fixed_rate import FixedRateEngine

OPTIONS = RoundOptions(concurrencies=(1, 4), prompt_tokens=8, output_tokens=5, num_rounds=2)


def fixed_rate_engine(
    max_num_seqs: int = 4, kind: type[FixedRateEngine] = FixedRateEngine
) -> FixedRateEngine:
    clock = ManualClock()
    return kind(
        EngineSection(fixed_rate_tokens_per_s=100.0, max_num_seqs=max_num_seqs),
        model="clock",
        vocab_size=50_000,
        max_model_len=64,
        clock=clock,
        sleep=clock.advance,
    )


def test_rounds_alternate_and_count_every_token() -> None:
    seen: list[tuple[int, int]] = []

    figures = run_rounds(fixed_rate_engine(), OPTIONS, lambda n, c, _: seen.append((n, c)))

    assert seen == [(0, 1), (0, 4), (1, 1), (1, 4)]
    assert [entry["concurrency"] for entry in figures] == [1, 4]
    assert [entry["total_output_tokens"] for entry in figures] == [2 * 5, 2 * 4 * 5]
    assert all(len(entry["rounds"]) == 2 for entry in figures)
    for entry in figures:
        low, high = entry["min_output_throughput"], entry["max_output_throughput"]
        assert low <= entry["output_throughput"] <= high
    assert len(rounds_table(figures).splitlines()) == 4


def test_sizes_past_the_engines_limit_are_left_out() -> None:
    figures = run_rounds(fixed_rate_engine(max_num_seqs=2), OPTIONS)

    assert [entry["concurrency"] for entry in figures] == [1]


def test_every_prompt_is_new() -> None:
    seeds = {OPTIONS.workload(number, c).seed for number in range(50) for c in (1, 8, 32)}

    assert len(seeds) == 150


class FailingEngine(FixedRateEngine):
    """Ends every sequence with an error."""

    def step(self) -> list[TokenEvent]:
        error = EngineError("out of memory").info()
        return [
            TokenEvent(event.request_id, finish_reason=FinishReason.ERROR, error=error)
            for event in super().step()
        ]


def test_failing_engine_ends_the_measurement() -> None:
    with pytest.raises(EngineError, match="out of memory"):
        run_rounds(fixed_rate_engine(kind=FailingEngine), OPTIONS)


def figures(concurrency: int, *rates: float) -> dict[str, Any]:
    rate = statistics.median(rates)
    return {"concurrency": concurrency, "output_throughput": rate, "rounds": list(rates)}


def test_floor_lines_say_what_holds() -> None:
    engine = [figures(1, 30.0), figures(2, 40.0), figures(8, 80.0), figures(32, 100.0)]
    overhead = {
        "offered_throughput": 960.0,
        "output_throughput": 950.0,
        "cpu_us_per_token": 700.0,
        "median_first_token_ms": 12.0,
        "cpu_s_by_process": {"ProxyActor": 6.0},
    }
    behind_haproxy = {**overhead, "cpu_s_by_process": {"haproxy": 0.5}}

    share = http_share_line(engine, [figures(32, 90.0)])

    assert [line.is_held for line in engine_lines(engine)] == [True, False, False]
    assert share == FloorLine("HTTP at 32 of the engine alone", 90.0, 85.0, "%")
    assert share is not None
    assert str(share).endswith("(≥ 85.0): holds")
    assert http_share_line(engine, [figures(8, 1.0)]) is None
    drifting = [*engine, figures(32, 120.0, 130.0)]
    share = http_share_line(drifting, [figures(32, 60.0, 90.0, 96.0)])
    assert share is not None
    assert share.value == pytest.approx(100 * 90.0 / 120.0)
    aim = http_aim_line(engine, [figures(32, 88.0)])
    assert aim is not None
    assert (aim.name, aim.is_held) == ("aim: HTTP at 32 of the engine alone", False)
    assert http_aim_line(engine, [figures(8, 1.0)]) is None
    held = {line.name: line.is_held for line in overhead_lines(overhead)}
    assert held == {
        "delivered": True,
        "CPU per token (python proxy)": True,
        "first token": True,
        "aim: CPU per token": False,
        "aim: first token": False,
    }
    stricter = {line.name: line.is_held for line in overhead_lines(behind_haproxy)}
    assert stricter["CPU per token (haproxy proxy)"] is False
    assert "DOES NOT HOLD" in str(engine_lines(engine)[1])
