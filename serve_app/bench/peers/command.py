"""The command: provide the peers, start everybody, measure in turn, print the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve_app.bench.overhead import ANY_MODEL
from serve_app.bench.peers.contestant import (
    Contestant,
    RunnerContestant,
    ServiceContestant,
    runner_script,
)
from serve_app.bench.peers.environment import (
    LLAMA_CPP,
    OPENVINO,
    PeerEnvironment,
    default_environment,
)
from serve_app.bench.peers.measure import peers_table, run_rounds, summarise_rounds
from serve_app.bench.rounds import RoundOptions
from serve_app.bench.service import Service
from serve_app.config.load import load_serve_file
from serve_app.config.model_source import resolve_model
from serve_app.core.errors import ConfigError, XeRayError
from serve_app.hardware.affinity import num_usable_cores

OURS = "xeray engine"
SERVICE = "xeray HTTP"
PEERS = ("llama.cpp", "openvino-genai", "transformers")
NAMES = (OURS, SERVICE, *PEERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this command has; config and rounds are `xeray bench`'s own."""
    parser.add_argument("--venv", type=Path, help="the peers' environment (.venv-peers)")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="who takes part (all)")


def measure_peers(
    config: Path,
    overrides: Sequence[str],
    rounds: RoundOptions,
    *,
    venv: Path | None = None,
    only: Sequence[str] | None = None,
    on_line: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Start everybody and run the rounds; returns `peers` (entries) and `contestants` (facts).

    A peer that cannot be installed or started is told in one line and left out. Raises ConfigError
    where nobody is left.
    """
    environment = PeerEnvironment(venv or default_environment())
    starts = _starts(config, overrides, rounds, environment)
    contestants: list[Contestant] = []
    try:
        for name in only or NAMES:
            try:
                contestants.append(starts[name]())
            except XeRayError as error:
                on_line(f"{name} is left out: {' '.join(error.message.split())}")
                continue
            on_line(f"{name} is ready")
        if not contestants:
            raise ConfigError("nobody to measure: see the lines above")
        results = run_rounds(contestants, rounds, on_line)
        return {
            "peers": summarise_rounds(results, OURS),
            "contestants": {c.name: c.facts for c in contestants},
        }
    finally:
        for contestant in contestants:
            contestant.close()


def _starts(
    config: Path, overrides: Sequence[str], rounds: RoundOptions, environment: PeerEnvironment
) -> dict[str, Callable[[], Contestant]]:
    app = load_serve_file(config, overrides).app
    path = str(resolve_model(app.model).path)
    here = Path(sys.executable)
    num_threads = app.engine.num_threads or num_usable_cores()

    def runner(name: str, script: str, python: Path, **settings: Any) -> Contestant:
        options = {
            "model": path,
            "num_threads": num_threads,
            "max_num_seqs": max(rounds.concurrencies),
            "max_model_len": rounds.prompt_tokens + rounds.output_tokens + 32,
            "settings": settings,
        }
        return RunnerContestant(name, python, runner_script(script), options)

    def llama_cpp() -> Contestant:
        environment.provide(LLAMA_CPP)
        return runner("llama.cpp", "llama_cpp", environment.python)

    def openvino() -> Contestant:
        environment.provide(OPENVINO)
        tuned = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}
        return runner("openvino-genai", "openvino", environment.python, **tuned)

    return {
        OURS: lambda: runner(
            OURS, "xeray", here, config=str(config.resolve()), overrides=list(overrides)
        ),
        SERVICE: lambda: ServiceContestant(
            SERVICE, Service(config, ('model.aliases=["*"]', *overrides)), ANY_MODEL
        ),
        "llama.cpp": llama_cpp,
        "openvino-genai": openvino,
        "transformers": lambda: runner("transformers", "transformers", here),
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the table and what each contestant was."""
    print(peers_table(report["peers"]))
    for name, facts in report["contestants"].items():
        known = {key: value for key, value in facts.items() if value not in ("", {}, None)}
        print(f"{name}: {known}")
