"""`xeray bench serve`: a service under one load or a sweep of them."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.bench import options as common
from serve_app.bench.goodput import Slo, parse_slo
from serve_app.bench.load import LoadGenerator, LoadResult, Target
from serve_app.bench.plot import check_plot, plot_sweep
from serve_app.bench.progress import LoadProgress
from serve_app.bench.report import load_table, summarise
from serve_app.bench.rounds import RoundOptions
from serve_app.bench.workloads import WORKLOADS, RequestSpec, WorkloadOptions, make_workload
from serve_app.core.errors import ConfigError

_MAX_DURATION_S = 60.0
_REQUEST_TIMEOUT_S = 120.0
_INTERRUPTED = 130
"""What a shell reports of a command that Ctrl-C ended."""


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Add the options of `xeray bench serve`."""
    common.add_config(parser)
    common.add_rounds(parser)
    parser.add_argument("--url", help="a running service; without it the config's is started")
    parser.add_argument("--model", help="name to ask for (any)")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), help="what is asked (fixed)")
    parser.add_argument("--num-requests", type=int, help="requests per load (8 × concurrency)")
    parser.add_argument(
        "--request-rate",
        type=float,
        nargs="+",
        help="open loop: requests per second, Poisson arrivals; several make a sweep",
    )
    parser.add_argument("--slo", help="count goodput: ttft_ms=500,tpot_ms=100 (and e2el_ms)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw latency over throughput (.png or .svg)"
    )
    parser.add_argument(
        "--max-duration", type=float, help="seconds after which a load sends nothing new (60)"
    )
    parser.add_argument(
        "--request-timeout", type=float, help="seconds after which a request has failed (120)"
    )


@dataclass(frozen=True, slots=True)
class _Load:
    """One load to offer: closed with `concurrency`, or open with `requests_per_s`."""

    label: str
    specs: list[RequestSpec]
    concurrency: int | None
    requests_per_s: float | None
    seed: int


def run_serve(options: argparse.Namespace) -> int:
    """Load a service over HTTP; print latencies and throughput. 1 where a request failed."""
    slo = parse_slo(options.slo) if getattr(options, "slo", None) else None
    plot = getattr(options, "plot", None)
    if plot is not None:
        check_plot(plot)
    loads = list(_loads(options))
    timeout_s = _positive(options, "request_timeout", _REQUEST_TIMEOUT_S)
    max_duration_s = _positive(options, "max_duration", _MAX_DURATION_S)
    reports: list[dict[str, Any]] = []
    with common.service(options) as url:
        target = common.target(options, url, timeout_s=timeout_s)
        target.check_reachable()
        for load in loads:
            figures = {"load": load.label, **_measure(target, load, max_duration_s, slo)}
            reports.append(figures)
            _tell(figures)
            if figures["is_cut"]:
                break
    print(load_table(reports))
    common.write_json(options, {"serve": reports})
    if plot is not None:
        plot_sweep(plot, reports, f"{getattr(options, 'workload', None) or 'fixed'} workload")
        print(f"drawn: {plot}")
    if any(report["is_cut"] for report in reports):
        return _INTERRUPTED
    return 1 if any(report["failed"] for report in reports) else 0


def _measure(target: Target, load: _Load, max_duration_s: float, slo: Slo | None) -> dict[str, Any]:
    with LoadProgress(load.label, len(load.specs)) as progress:
        generator = LoadGenerator(target, max_duration_s=max_duration_s, on_record=progress.take)
        return summarise(_run(generator, load), slo)


def _run(generator: LoadGenerator, load: _Load) -> LoadResult:
    """Run the load; on Ctrl-C return what is complete."""
    if load.requests_per_s is not None:
        run = generator.run_open(load.specs, load.requests_per_s, load.seed)
    else:
        assert load.concurrency is not None
        run = generator.run_closed(load.specs, load.concurrency)
    try:
        return asyncio.run(run)
    except KeyboardInterrupt:
        return generator.so_far()


def _tell(figures: dict[str, Any]) -> None:
    label = figures["load"]
    for error in figures["errors"][:3]:
        print(f"{label}: {error}", file=sys.stderr)
    if figures["num_unsent"]:
        print(
            f"{label}: {figures['num_unsent']} requests were not sent: the time was up"
            " (--max-duration)",
            file=sys.stderr,
        )
    if figures["is_cut"]:
        print(f"{label}: interrupted; these are the requests that were complete", file=sys.stderr)


def _loads(options: argparse.Namespace) -> Iterator[_Load]:
    rounds = common.round_options(options)
    workload = getattr(options, "workload", None) or "fixed"
    rates = getattr(options, "request_rate", None)
    for rate in rates or ():
        if rate <= 0:
            raise ConfigError(f"--request-rate: {rate:g} is not above 0", param="request_rate")
        specs = _specs(options, workload, rounds, concurrency=None)
        yield _Load(f"{workload}, {rate:g}/s", specs, None, rate, rounds.seed)
    for size in () if rates else rounds.concurrencies:
        specs = _specs(options, workload, rounds, concurrency=size)
        yield _Load(f"{workload} × {size}", specs, size, None, rounds.seed)


def _specs(
    options: argparse.Namespace, workload: str, rounds: RoundOptions, concurrency: int | None
) -> list[RequestSpec]:
    num_requests = getattr(options, "num_requests", None)
    if num_requests is not None and num_requests < 1:
        raise ConfigError(f"--num-requests: {num_requests} is less than 1", param="num_requests")
    return make_workload(
        workload,
        WorkloadOptions(
            num_requests=num_requests or 8 * (concurrency or 8),
            prompt_tokens=rounds.prompt_tokens,
            output_tokens=rounds.output_tokens,
            seed=rounds.seed + (concurrency or 0),
        ),
    )


def _positive(options: argparse.Namespace, name: str, default: float) -> float:
    value = getattr(options, name, None)
    if value is not None and value <= 0:
        raise ConfigError(f"--{name.replace('_', '-')}: {value:g} is not above 0", param=name)
    return default if value is None else float(value)
