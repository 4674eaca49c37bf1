"""What the bench commands share: their common options, and what these mean."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve_app.bench.load import Target
from serve_app.bench.overhead import ANY_MODEL
from serve_app.bench.report import to_json_values
from serve_app.bench.rounds import RoundOptions
from serve_app.bench.service import Service
from serve_app.config.load import load_serve_file
from serve_app.config.resources import find_config
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError

KEY_VARIABLE = "XERAY_API_KEY"
_QUICK = RoundOptions(output_tokens=16, num_rounds=1)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that choose and change a config."""
    parser.add_argument("--config", help="Serve config to measure (the local one)")
    add_json(parser)
    parser.add_argument(
        "--set",
        action="append",
        dest="overrides",
        metavar="KEY=VALUE",
        help="change one of the config's args; may be repeated",
    )
    parser.add_argument("--host", help="address that the service listens on, over the config's")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command the option for its figures' file."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """Give a command the options of its batches."""
    parser.add_argument("--concurrency", type=int, nargs="+", help="batch sizes (1 8 32)")
    parser.add_argument("--prompt-tokens", type=int, help="tokens of each prompt (128)")
    parser.add_argument("--output-tokens", type=int, help="tokens of each answer (64)")
    parser.add_argument("--rounds", type=int, help="times that each size runs (3)")
    parser.add_argument("--seed", type=int, help="decides everything random (0)")
    parser.add_argument(
        "--quick",
        action="store_true",
        default=argparse.SUPPRESS,
        help="one short round: a look, no proof",
    )


def round_options(options: argparse.Namespace) -> RoundOptions:
    """Return the batches that `options` describe. Raises ConfigError on a size below 1."""
    base = _QUICK if getattr(options, "quick", False) else RoundOptions()
    names = {
        "concurrency": "concurrencies",
        "prompt_tokens": "prompt_tokens",
        "output_tokens": "output_tokens",
        "rounds": "num_rounds",
        "seed": "seed",
    }
    given: dict[str, Any] = {}
    for option, name in names.items():
        value = getattr(options, option, None)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if name != "seed" and min(values) < 1:
            flag = f"--{option.replace('_', '-')}"
            raise ConfigError(f"{flag}: {min(values)} is less than 1", param=option)
        given[name] = tuple(value) if isinstance(value, list) else value
    return replace(base, **given)


def config_path(options: argparse.Namespace) -> Path:
    """Return the config file that is meant: the local one unless another was named."""
    return find_config(getattr(options, "config", None))


def overrides(options: argparse.Namespace) -> list[str]:
    """Return the changes of `--set`."""
    return getattr(options, "overrides", None) or []


def host(options: argparse.Namespace) -> str | None:
    """Return where the service shall listen, None for what the config says."""
    return getattr(options, "host", None)


def app_config(options: argparse.Namespace) -> AppConfig:
    """Return the config's args with the changes of `--set`."""
    return load_serve_file(config_path(options), overrides(options)).app


@contextlib.contextmanager
def service(options: argparse.Namespace) -> Iterator[str]:
    """Yield the URL of the service to load: the one that was named, else a new one."""
    if url := getattr(options, "url", None):
        yield url
        return
    changes = ('model.aliases=["*"]', *overrides(options))
    print("starting the service …", flush=True)
    with Service(config_path(options), changes, host=host(options)) as running:
        print(f"ready after {running.startup_s:.1f} s", flush=True)
        yield running.url


def target(options: argparse.Namespace, url: str, **more: Any) -> Target:
    """Return the server at `url` with the model and the key to use."""
    model = getattr(options, "model", None) or ANY_MODEL
    return Target.from_url(url, model, api_key=os.environ.get(KEY_VARIABLE), **more)


def show_rate(number: int, concurrency: int, tokens_per_s: float) -> None:
    """Print the speed of one batch."""
    print(f"  round {number + 1}, {concurrency}: {tokens_per_s:.1f} tokens/s", flush=True)


def write_json(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write `report` to the file of `--json`, if one was named."""
    path = getattr(options, "json", None)
    if path is not None:
        path.write_text(json.dumps(to_json_values(report), indent=1, ensure_ascii=False) + "\n")


def engine_in_its_own_process(
    options: argparse.Namespace,
    rounds: RoundOptions,
    changes: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `xeray bench engine` apart: torch's memory and threads leave with it.

    changes: `section.key=value` beyond the options'. env: variables to add to this process's.
    Raises ConfigError where the engine fails; its own line is on the terminal then.
    """
    with tempfile.TemporaryDirectory(prefix="xeray-bench-") as folder:
        path = Path(folder) / "engine.json"
        command = [sys.executable, "-m", "serve_app.cli.main", "bench", "engine"]
        command += ["--config", str(config_path(options)), "--json", str(path)]
        command += [word for item in (*overrides(options), *changes) for word in ("--set", item)]
        command += ["--concurrency", *map(str, rounds.concurrencies)]
        command += ["--prompt-tokens", str(rounds.prompt_tokens)]
        command += ["--output-tokens", str(rounds.output_tokens)]
        command += ["--rounds", str(rounds.num_rounds), "--seed", str(rounds.seed)]
        done = subprocess.run(command, check=False, env={**os.environ, **(env or {})})
        if done.returncode != 0:
            raise ConfigError("the engine could not be measured; see the line above")
        report: dict[str, Any] = json.loads(path.read_text())
    return report
