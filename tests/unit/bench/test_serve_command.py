"""`xeray bench serve` against servers of this process: sweeps, goodput, plots, limits, Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from serve_app.bench.load import RequestRecord
from serve_app.bench.main import add_parsers
from serve_app.bench.progress import LoadProgress
from serve_app.bench.serve_command import run_serve
from serve_app.core.errors import ConfigError
from tests.unit.bench.timed_service import TimedService

SMALL = ("--prompt-tokens", "5", "--output-tokens", "3", "--num-requests", "4")


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xeray bench")
    add_parsers(parser)
    return parser.parse_args(["serve", *words])


async def test_a_sweep_of_rates_is_drawn_and_counts_goodput(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    service = TimedService(0.01, 0.001)
    plot, figures = tmp_path / "sweep.svg", tmp_path / "figures.json"
    async with service.running():
        options = parse(
            *("--url", service.url, "--request-rate", "100", "200", *SMALL),
            *("--slo", "ttft_ms=60000", "--plot", str(plot), "--json", str(figures)),
        )
        code = await asyncio.to_thread(run_serve, options)

    loads = json.loads(figures.read_text())["serve"]
    out, err = capsys.readouterr()
    assert code == 0
    assert [load["load"] for load in loads] == ["fixed, 100/s", "fixed, 200/s"]
    assert [load["slo_met"] for load in loads] == [1.0, 1.0]
    assert all(load["request_goodput"] == load["request_throughput"] for load in loads)
    assert "goodput/s" in out
    assert f"drawn: {plot}" in out
    assert "fixed, 200/s" in plot.read_text()
    assert "fixed, 100/s: 4 of 4 requests, 12 tokens" in err


async def test_a_load_that_takes_too_long_says_what_it_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    service = TimedService(0.1, 0.0)
    async with service.running():
        options = parse(
            *("--url", service.url, "--concurrency", "1", "--max-duration", "0.05", *SMALL)
        )
        code = await asyncio.to_thread(run_serve, options)

    assert code == 0
    assert "fixed × 1: 3 requests were not sent: the time was up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--slo", "speed=1"), "--slo: speed=1"),
        (("--plot", "a.gif"), r"--plot: a\.gif must end in"),
        (("--request-rate", "0"), "--request-rate: 0 is not above 0"),
        (("--num-requests", "0"), "--num-requests: 0 is less than 1"),
        (("--max-duration", "0"), "--max-duration: 0 is not above 0"),
        (("--request-timeout", "-1"), "--request-timeout: -1 is not above 0"),
    ],
)
def test_nonsense_is_refused_before_anything_starts(words: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        run_serve(parse("--url", "http://127.0.0.1:1", *words))


async def test_ctrl_c_prints_what_was_measured_so_far() -> None:
    """A real process gets a real signal once some requests are complete."""
    service = TimedService(0.01, 0.0)
    async with service.running():
        command = ["-m", "serve_app.cli.main", "bench", "serve", "--url", service.url]
        command += ["--concurrency", "2", "4", "--num-requests", "100000"]
        command += ["--prompt-tokens", "2", "--output-tokens", "3"]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        while len(service.late_s) < 60 and process.returncode is None:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 60)

    assert process.returncode == 130
    assert b"Traceback" not in err
    assert "fixed × 2: interrupted; these are the requests that were complete" in err.decode()
    (row,) = [line for line in out.decode().splitlines() if line.startswith("fixed × 2")]
    num_complete, num_failed = row.split()[3:5]
    assert 15 <= int(num_complete.replace(",", "")) < 100_000
    assert num_failed == "0"
    assert "fixed × 4" not in out.decode(), "the next load is not begun"


def record(**changes: Any) -> RequestRecord:
    made = RequestRecord("k", 0.0, 0.1, 1.0, num_output_tokens=5)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_progress_off_a_terminal_is_a_line_per_quarter() -> None:
    out = io.StringIO()
    with LoadProgress("fixed × 8", 8, Console(file=out)) as progress:
        for index in range(8):
            progress.take(record(error="HTTP 503" if index == 7 else None))

    assert out.getvalue().splitlines() == [
        "  fixed × 8: 2 of 8 requests, 10 tokens",
        "  fixed × 8: 4 of 8 requests, 20 tokens",
        "  fixed × 8: 6 of 8 requests, 30 tokens",
        "  fixed × 8: 8 of 8 requests, 40 tokens, 1 failed",
    ]


def test_progress_on_a_terminal_is_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with LoadProgress("fixed × 8", 8, console) as progress:
        for _ in range(8):
            progress.take(record())

    assert "8/8" in out.getvalue()
    assert "40 tokens" in out.getvalue()
