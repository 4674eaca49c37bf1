"""`xeray energy`: tokens per joule of a running service, at full power and under limits."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from serve_app.bench.load import LoadGenerator, Target
from serve_app.bench.report import format_table, summarise
from serve_app.bench.workloads import WorkloadOptions, make_workload
from serve_app.cli.chat import DEFAULT_URL
from serve_app.cli.units import positive_float, positive_int
from serve_app.core.errors import ConfigError
from serve_app.hardware.cards import list_cards
from serve_app.hardware.power.caps import CapFile, frequency_caps, power_cap
from serve_app.hardware.power.guard import CapGuard, restore_left_over
from serve_app.hardware.power.meter import EnergyMeter, missing_sources

_DEFAULT_LEVELS = (1.0, 0.85, 0.7, 0.55)
_SPEED_FLOOR = 0.9
"""A recommended limit keeps at least this share of the full speed."""

_GIVEN = "given"
"""The source of joules that `--watts` names."""

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class LevelResult:
    """One level of a limit (a share of its highest value; None: as the cards stand now)."""

    level: float | None
    limits: str
    tokens_per_s: float
    joules: dict[str, float]
    num_tokens: int

    @property
    def tokens_per_joule(self) -> float | None:
        """Output tokens over all joules that were measured; None without any meter."""
        total = sum(self.joules.values())
        return self.num_tokens / total if total > 0 else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xeray energy`."""
    parser.add_argument("--url", default=DEFAULT_URL, help="server (default: %(default)s)")
    parser.add_argument("--model", default="default", help="model id to ask for")
    parser.add_argument("--requests", type=positive_int, default=16, help="requests per level (16)")
    parser.add_argument(
        "--concurrency", type=positive_int, default=8, help="requests in flight (8)"
    )
    parser.add_argument(
        "--output-tokens", type=positive_int, default=64, help="tokens per answer (64)"
    )
    parser.add_argument(
        "--limit",
        choices=("power", "clock"),
        default="power",
        help="which limit --levels changes (power)",
    )
    parser.add_argument(
        "--levels",
        type=float,
        nargs="+",
        default=list(_DEFAULT_LEVELS),
        help="shares of the highest value, 0 to 1 (1 0.85 0.7 0.55)",
    )
    parser.add_argument(
        "--watts",
        type=positive_float,
        metavar="N",
        help="power under this load by a meter at the socket, where no counter can be read",
    )
    parser.add_argument(
        "--apply",
        action="store_true",
        help="really set each limit while it is measured (root); without it only tell",
    )
    parser.add_argument("--restore", action="store_true", help="put back what a dead run left")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure as the cards stand, or at each level with --apply."""
    if options.restore:
        restored = restore_left_over()
        print("\n".join(f"restored {path}" for path in restored) or "nothing to restore")
        return 0
    if options.watts is not None and options.apply:
        raise ConfigError(
            "--watts: one figure cannot stand for several limits; leave --apply out", param="watts"
        )
    caps = _caps(options)
    plans = [(level, _values(caps, level)) for level in options.levels]
    if options.apply and not caps:
        raise ConfigError("--apply: no card of this machine offers such a limit")
    _warm_up(options)
    if not options.apply:
        _print_plan(plans, options.limit)
        results = [_measure(options, None, "as they stand")]
    else:
        with CapGuard(caps) as guard:
            results = []
            for level, values in plans:
                guard.set(values)
                results.append(_measure(options, level, _describe(values), len(results)))
    _print_results(results, options)
    return 0


def _caps(options: argparse.Namespace) -> list[CapFile]:
    if not all(0 < level <= 1 for level in options.levels):
        raise ConfigError("--levels: each is a share above 0 and at most 1", param="levels")
    found = list_cards(options.root, {})
    cards = (*found.discrete, *found.integrated)
    if options.limit == "clock":
        return [cap for card in cards for cap in frequency_caps(card, options.root)]
    powers = [power_cap(card, options.root) for card in cards]
    return [cap for cap in powers if cap is not None]


def _values(caps: Sequence[CapFile], level: float) -> list[tuple[CapFile, float]]:
    return [(cap, max(cap.low, level * cap.high)) for cap in caps]


def _describe(values: Sequence[tuple[CapFile, float]]) -> str:
    return ", ".join(f"{cap.label} {value:.0f} {cap.unit}" for cap, value in values)


def _print_plan(plans: Sequence[tuple[float, list[tuple[CapFile, float]]]], limit: str) -> None:
    for level, values in plans:
        if values:
            print(f"--apply would set, at {level:g}: {_describe(values)}", file=sys.stderr)
    if not any(values for _, values in plans):
        print(f"no card of this machine offers a {limit} limit to set", file=sys.stderr)


def _target(options: argparse.Namespace) -> Target:
    return Target.from_url(options.url, options.model, api_key=os.environ.get("XERAY_API_KEY"))


def _warm_up(options: argparse.Namespace) -> None:
    """Run a few short requests first: what a server does once belongs to no level."""
    target = _target(options)
    target.check_reachable()
    sizes = WorkloadOptions(
        num_requests=options.concurrency, output_tokens=_WARM_UP_TOKENS, seed=-1
    )
    workload = make_workload("fixed", sizes)
    with Console(stderr=True).status("warming up"):
        asyncio.run(LoadGenerator(target).run_closed(workload, options.concurrency))


def _measure(
    options: argparse.Namespace, level: float | None, limits: str, number: int = 0
) -> LevelResult:
    """Run one level. Each has prompts of its own, lest the prefix cache help the later ones."""
    sizes = WorkloadOptions(
        num_requests=options.requests, output_tokens=options.output_tokens, seed=number
    )
    workload = make_workload("fixed", sizes)
    meter = EnergyMeter(options.root)
    with Console(stderr=True).status(f"measuring: {limits}"), meter:
        load = asyncio.run(
            LoadGenerator(_target(options)).run_closed(workload, options.concurrency)
        )
    figures = summarise(load)
    if not figures["completed"]:
        told = ", ".join(figures["errors"])
        raise ConfigError(f"--url: {options.url} answered no request: {told}", param="url")
    given = {} if options.watts is None else {_GIVEN: options.watts * figures["duration"]}
    return LevelResult(
        level,
        limits,
        figures["output_throughput"],
        given or meter.joules,
        figures["total_output_tokens"],
    )


def recommend(results: Sequence[LevelResult]) -> LevelResult | None:
    """Return the most tokens per joule among those that keep 90 % of the best speed."""
    fastest = max((result.tokens_per_s for result in results), default=0.0)
    good = [
        result
        for result in results
        if result.tokens_per_joule is not None and result.tokens_per_s >= _SPEED_FLOOR * fastest
    ]
    return max(good, key=lambda result: result.tokens_per_joule or 0.0, default=None)


def _print_results(results: Sequence[LevelResult], options: argparse.Namespace) -> None:
    if not any(result.joules for result in results):
        told = "; ".join(missing_sources(options.root))
        print(
            f"no source of energy: {told}. --watts N takes the power that a meter shows",
            file=sys.stderr,
        )
    if options.json:
        rows = [
            asdict(result) | {"tokens_per_joule": result.tokens_per_joule} for result in results
        ]
        print(json.dumps(rows, indent=2))
        return
    table = [
        (
            result.limits,
            result.tokens_per_s,
            ", ".join(f"{name} {joules:.0f}" for name, joules in result.joules.items())
            or "unknown",
            "unknown" if result.tokens_per_joule is None else f"{result.tokens_per_joule:.2f}",
        )
        for result in results
    ]
    print(format_table(("limits", "tokens/s", "joules", "tokens/J"), table))
    best = recommend(results)
    if best is not None and len(results) > 1:
        print(f"recommended: {best.limits} ({best.tokens_per_s:.0f} tokens/s)")
