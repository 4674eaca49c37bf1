from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.bench import floors, main
from serve_app.bench import options as common
from serve_app.bench.main import add_parsers, run_all, run_engine, run_overhead, run_serve
from serve_app.bench.overhead import OverheadOptions
from serve_app.bench.service import Service
from serve_app.core.errors import ConfigError
from tests.unit.bench.fake_service import FakeService


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xeray bench")
    add_parsers(parser)
    return parser.parse_args(words)


def test_each_subcommand_has_its_function_and_all_is_the_default() -> None:
    assert parse().run is run_all
    assert parse("all").run is run_all
    assert parse("engine").run is run_engine
    assert parse("serve").run is run_serve
    assert parse("overhead").run is run_overhead


def test_options_before_and_behind_the_subcommand_count() -> None:
    options = parse(
        "--json", "a.json", "engine", "--rounds", "2", "--set", "a.b=1", "--set", "c.d=2"
    )

    assert (options.json, options.rounds) == (Path("a.json"), 2)
    assert options.overrides == ["a.b=1", "c.d=2"]


async def test_serve_loads_a_running_service_and_writes_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = FakeService()
    service.release.set()
    path = tmp_path / "figures.json"
    async with service.running():
        options = parse(
            *("serve", "--url", service.url, "--concurrency", "1", "2"),
            *("--num-requests", "3", "--output-tokens", "4", "--json", str(path)),
        )
        code = await asyncio.to_thread(run_serve, options)

    loads = json.loads(path.read_text())["serve"]
    assert code == 0
    assert [load["load"] for load in loads] == ["fixed × 1", "fixed × 2"]
    assert [load["completed"] for load in loads] == [3, 3]
    assert {body["model"] for body in service.bodies} == {"bench"}
    assert "fixed × 2" in capsys.readouterr().out


async def test_serve_tells_of_failures(capsys: pytest.CaptureFixture[str]) -> None:
    service = FakeService(status=503)
    service.release.set()
    async with service.running():
        options = parse(
            *("serve", "--url", service.url, "--request-rate", "1000", "--num-requests", "2")
        )
        code = await asyncio.to_thread(run_serve, options)

    assert code == 1
    assert "queue is full" in capsys.readouterr().err


def test_nonsense_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="--rounds: 0 is less than 1"):
        run_serve(parse("serve", "--url", "http://127.0.0.1:1", "--rounds", "0"))


def test_configs_are_named_as_for_serve() -> None:
    assert common.config_path(parse("engine")).name == "local.yaml"
    assert common.config_path(parse("engine", "--config", "arc")).name == "arc.yaml"
    with pytest.raises(ConfigError, match=r"config: none\.yaml does not exist"):
        common.config_path(parse("engine", "--config", "none.yaml"))


def overhead_figures(delivered: float, cpu_us: float = 1.0) -> dict[str, Any]:
    return {
        "num_streams": 32,
        "offered_throughput": 960.0,
        "output_throughput": delivered,
        "cpu_us_per_token": cpu_us,
        "cpu_us_per_token_by_process": {"ProxyActor": cpu_us},
        "tokens_per_s_per_ingress_core": None,
        "cpu_s_by_process": {"python": 1.0},
        "client_cpu_us_per_token": 1.0,
        "median_first_token_ms": 1.0,
    }


@pytest.mark.parametrize(
    ("delivered", "words", "code"),
    [(960.0, (), 0), (500.0, (), 1), (500.0, ("--report-only",), 0)],
)
def test_a_floor_that_does_not_hold_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    delivered: float,
    words: tuple[str, ...],
    code: int,
) -> None:
    def measure(config: Path, options: OverheadOptions, *_: Any) -> dict[str, Any]:
        assert (config.name, options.num_streams) == ("local.yaml", 32)
        return overhead_figures(delivered)

    monkeypatch.setattr(main, "measure_overhead", measure)
    line = floors.overhead_lines(overhead_figures(delivered))[0]

    assert run_overhead(parse("overhead", *words)) == code
    assert str(line) in capsys.readouterr().out


def test_an_aim_that_is_not_reached_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = overhead_figures(960.0, cpu_us=1000.0)
    monkeypatch.setattr(main, "measure_overhead", lambda *_: figures)

    held = {line.name.split(":")[0]: line.is_held for line in floors.overhead_lines(figures)}

    assert held["CPU per token (python proxy)"]
    assert run_overhead(parse("overhead")) == 0


def test_report_only_may_stand_before_the_subcommand() -> None:
    assert parse("--report-only", "overhead").report_only
    assert parse("--report-only").report_only
    assert not hasattr(parse("overhead"), "report_only")


def test_service_that_cannot_start_is_one_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did not start: .*none\.yaml"):
        Service(tmp_path / "none.yaml").__enter__()
