from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import pytest

from serve_app.bench.main import add_parsers, run_all, run_engine, run_overhead, run_serve
from serve_app.bench.service import Service, default_config
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


def test_default_config_is_the_local_one() -> None:
    assert default_config().name == "local.yaml"
    assert default_config().is_file()


def test_service_that_cannot_start_is_one_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did not start: .*none\.yaml"):
        Service(tmp_path / "none.yaml").__enter__()
