"""`xeray bench`: the engine alone, what lies above it, HTTP, and all of them against the floors."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve_app.bench import floors
from serve_app.bench.load import LoadGenerator, Target
from serve_app.bench.overhead import ANY_MODEL, OverheadOptions, measure_overhead
from serve_app.bench.report import LOAD_HEADERS, format_table, load_row, summarise, to_json_values
from serve_app.bench.rounds import RoundOptions, measure_batches, rounds_table
from serve_app.bench.service import Service, default_config
from serve_app.bench.workloads import WORKLOADS, WorkloadOptions, make_workload
from serve_app.config.load import load_serve_file
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError

_KEY_VARIABLE = "XERAY_API_KEY"
_QUICK = RoundOptions(output_tokens=16, num_rounds=1)


def add_parsers(parser: argparse.ArgumentParser) -> None:
    """Give `xeray bench` its subcommands; without one it measures everything."""
    _add_config(parser)
    _add_rounds(parser)
    parser.set_defaults(run=run_all)
    commands = parser.add_subparsers(metavar="WHAT", title="what to measure")
    for name, text, add_arguments, run in (
        ("all", "engine, HTTP and overhead, against the floors (default)", _add_all, run_all),
        ("engine", "the engine alone, in this process", _add_engine, run_engine),
        ("serve", "a service over HTTP under a chosen load", _add_serve, run_serve),
        (
            "decode",
            "the native engine's decode and prefill speed, with random weights of a shape",
            _add_decode,
            run_decode,
        ),
        (
            "overhead",
            "the service above an engine that only keeps time",
            _add_overhead,
            run_overhead,
        ),
    ):
        command = commands.add_parser(
            name, help=text, description=f"Measure {text}.", argument_default=argparse.SUPPRESS
        )
        add_arguments(command)
        command.set_defaults(run=run)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="Serve config to measure (the local one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--set",
        action="append",
        dest="overrides",
        metavar="KEY=VALUE",
        help="change one of the config's args; may be repeated",
    )
    parser.add_argument("--host", help="address that the service listens on, over the config's")


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=int, nargs="+", help="batch sizes (1 8 32)")
    parser.add_argument("--prompt-tokens", type=int, help="tokens of each prompt (128)")
    parser.add_argument("--output-tokens", type=int, help="tokens of each answer (64)")
    parser.add_argument("--rounds", type=int, help="times that each size runs (3)")
    parser.add_argument("--seed", type=int, help="decides everything random (0)")
    parser.add_argument("--quick", action="store_true", help="one short round: a look, no proof")


def _add_all(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    _add_rounds(parser)


_add_engine = _add_all


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_all(parser)
    parser.add_argument("--url", help="a running service; without it the config's is started")
    parser.add_argument("--model", help="name to ask for (any)")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), help="what is asked (fixed)")
    parser.add_argument("--num-requests", type=int, help="requests per load (8 × concurrency)")
    parser.add_argument(
        "--request-rate", type=float, help="open loop: requests per second, Poisson arrivals"
    )


def _add_overhead(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--streams", type=int, help="streams at once (32)")
    parser.add_argument("--rate", type=float, help="tokens per second of each stream (30)")
    parser.add_argument("--duration", type=float, help="seconds that the streams last (10)")


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", help="whose sizes the network has (qwen2-7b)")
    parser.add_argument("--device", choices=("auto", "cpu", "xpu", "cuda"), help="where (auto)")
    parser.add_argument("--weight-format", choices=("auto", "int4", "int8"), help="(auto: dense)")
    parser.add_argument("--concurrency", type=int, nargs="+", help="batch sizes (1 8 32 128)")
    parser.add_argument("--prompt-tokens", type=int, help="tokens of each prompt (128)")
    parser.add_argument("--output-tokens", type=int, help="tokens of each answer (256)")
    parser.add_argument(
        "--sampling",
        nargs="+",
        choices=("greedy", "random", "top-p", "penalties"),
        help="how tokens are chosen (greedy); each adds what it names to the one before",
    )
    parser.add_argument("--long-tokens", type=int, help="prompt of the long part (8192; 0: none)")
    parser.add_argument("--prefill-tokens", type=int, help="prompt read alone (2048; 0: none)")
    parser.add_argument("--rounds", type=int, help="times that each size runs (3)")
    parser.add_argument("--seed", type=int, help="decides everything random (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")


def run_decode(options: argparse.Namespace) -> int:
    """Measure the native engine with random weights and print its share of the device's limit."""
    from serve_app.bench.decode import DecodeOptions, measure_decode

    names = {"concurrency": "concurrencies", "sampling": "samplings", "rounds": "num_rounds"}
    given = {
        names.get(name, name): tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if value is not None and names.get(name, name) in DecodeOptions.__slots__
    }
    report = measure_decode(DecodeOptions(**given), lambda line: print(line, flush=True))
    _write_json(options, {"decode": report.to_dict()})
    return 0


def run_engine(options: argparse.Namespace) -> int:
    """Measure the engine alone and print its table."""
    from serve_app.bench.engine_bench import measure_engine

    section = _app(options)
    print(f"engine alone: {section.model.path}", flush=True)
    report = measure_engine(section, _round_options(options), _show_rate)
    print(rounds_table(report["engine"]))
    _write_json(options, report)
    return 0


def run_serve(options: argparse.Namespace) -> int:
    """Load a service over HTTP and print latencies and throughput; 1 where a request failed."""
    rows, reports = [], []
    with _service(options) as url:
        target = _target(options, url)
        for label, figures in _loads(options, target):
            rows.append(load_row(label, figures))
            reports.append({"load": label, **figures})
            for error in figures["errors"][:3]:
                print(f"{label}: {error}", file=sys.stderr)
    print(format_table(LOAD_HEADERS, rows))
    _write_json(options, {"serve": reports})
    return 1 if any(report["failed"] for report in reports) else 0


def _loads(options: argparse.Namespace, target: Target) -> Iterator[tuple[str, dict[str, Any]]]:
    rounds = _round_options(options)
    rate = getattr(options, "request_rate", None)
    workload = getattr(options, "workload", None) or "fixed"
    for concurrency in (None,) if rate else rounds.concurrencies:
        specs = make_workload(
            workload,
            WorkloadOptions(
                num_requests=getattr(options, "num_requests", None) or 8 * (concurrency or 8),
                prompt_tokens=rounds.prompt_tokens,
                output_tokens=rounds.output_tokens,
                seed=rounds.seed + (concurrency or 0),
            ),
        )
        generator = LoadGenerator(target)
        if concurrency is None:
            assert rate is not None
            label, run = f"{workload}, {rate:g}/s", generator.run_open(specs, rate, rounds.seed)
        else:
            label, run = f"{workload} × {concurrency}", generator.run_closed(specs, concurrency)
        yield label, summarise(asyncio.run(run))


def run_overhead(options: argparse.Namespace) -> int:
    """Measure the service above a fixed-rate engine and print what it delivers and costs."""
    names = {"streams": "num_streams", "rate": "tokens_per_s", "duration": "duration_s"}
    given = {n: getattr(options, o) for o, n in names.items() if getattr(options, o, None)}
    figures = measure_overhead(
        _config(options), OverheadOptions(**given), _host(options), tuple(_overrides(options))
    )
    _print_overhead(figures)
    for line in floors.overhead_lines(figures):
        print(line)
    _write_json(options, {"overhead": figures})
    return 0


def _print_overhead(figures: dict[str, Any]) -> None:
    spent = sum(figures["cpu_s_by_process"].values()) or 1.0
    shares = (f"{n} {100 * s / spent:.0f} %" for n, s in figures["cpu_s_by_process"].items() if s)
    print(
        f"overhead: {figures['num_streams']} streams, {figures['output_throughput']:.0f} of"
        f" {figures['offered_throughput']:.0f} tokens/s delivered,"
        f" {figures['cpu_us_per_token']:.0f} µs CPU per token ({', '.join(shares)}),"
        f" first token {figures['median_first_token_ms']:.1f} ms after the engine's"
    )


def run_all(options: argparse.Namespace) -> int:
    """Measure engine, HTTP and overhead; print the tables and which floor holds. Always 0."""
    rounds = _round_options(options)
    report = {**_machine(), **_engine_in_its_own_process(options)}
    print(flush=True)
    with _service(options) as url:
        report["http"] = measure_batches(_target(options, url), rounds, _show_rate)
    print("over HTTP", rounds_table(report["http"]), "", sep="\n", flush=True)
    report["overhead"] = measure_overhead(
        _config(options), OverheadOptions(), _host(options), tuple(_overrides(options))
    )
    _print_overhead(report["overhead"])
    lines = floors.engine_lines(report["engine"])
    share = floors.http_share_line(report["engine"], report["http"])
    lines += [] if share is None else [share]
    lines += floors.overhead_lines(report["overhead"])
    print("", "floors (two cores, the embedded model)", *lines, sep="\n")
    _write_json(options, {**report, "floors": [line.to_dict() for line in lines]})
    return 0


def _engine_in_its_own_process(options: argparse.Namespace) -> dict[str, Any]:
    """Run `xeray bench engine` apart: torch's memory and threads leave with it."""
    rounds = _round_options(options)
    with tempfile.TemporaryDirectory(prefix="xeray-bench-") as folder:
        path = Path(folder) / "engine.json"
        command = [sys.executable, "-m", "serve_app.cli.main", "bench", "engine"]
        command += ["--config", str(_config(options)), "--json", str(path)]
        command += [word for item in _overrides(options) for word in ("--set", item)]
        command += ["--concurrency", *map(str, rounds.concurrencies)]
        command += ["--prompt-tokens", str(rounds.prompt_tokens)]
        command += ["--output-tokens", str(rounds.output_tokens)]
        command += ["--rounds", str(rounds.num_rounds), "--seed", str(rounds.seed)]
        done = subprocess.run(command, check=False)
        if done.returncode != 0:
            raise ConfigError("the engine could not be measured; see the line above")
        report: dict[str, Any] = json.loads(path.read_text())
    return report


@contextlib.contextmanager
def _service(options: argparse.Namespace) -> Iterator[str]:
    """Yield the URL of the service to load: the one that was named, else a new one."""
    if url := getattr(options, "url", None):
        yield url
        return
    overrides = ('model.aliases=["*"]', *_overrides(options))
    print("starting the service …", flush=True)
    with Service(_config(options), overrides, host=_host(options)) as service:
        print(f"ready after {service.startup_s:.1f} s", flush=True)
        yield service.url


def _target(options: argparse.Namespace, url: str) -> Target:
    model = getattr(options, "model", None) or ANY_MODEL
    return Target.from_url(url, model, api_key=os.environ.get(_KEY_VARIABLE))


def _round_options(options: argparse.Namespace) -> RoundOptions:
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


def _show_rate(number: int, concurrency: int, tokens_per_s: float) -> None:
    print(f"  round {number + 1}, {concurrency}: {tokens_per_s:.1f} tokens/s", flush=True)


def _config(options: argparse.Namespace) -> Path:
    return getattr(options, "config", None) or default_config()


def _overrides(options: argparse.Namespace) -> list[str]:
    return getattr(options, "overrides", None) or []


def _host(options: argparse.Namespace) -> str | None:
    return getattr(options, "host", None)


def _app(options: argparse.Namespace) -> AppConfig:
    return load_serve_file(_config(options), _overrides(options)).app


def _machine() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "num_cores": len(os.sched_getaffinity(0)),
    }


def _write_json(options: argparse.Namespace, report: dict[str, Any]) -> None:
    path = getattr(options, "json", None)
    if path is not None:
        path.write_text(json.dumps(to_json_values(report), indent=1, ensure_ascii=False) + "\n")
