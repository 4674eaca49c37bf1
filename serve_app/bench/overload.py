"""`xeray bench overload`: what a service does under several times the load that it can carry.

The engine is a clock, so its capacity is known: `max_num_seqs` streams of `tokens_per_s`. Nothing
waits (`model_replica.max_queued_requests` is 0): a queue of q requests adds q / max_num_seqs of an
answer's time to what admitted requests take, which is the operator's choice and not measured here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve_app.bench import options as common
from serve_app.bench.footprint import FootprintWatch, Growth, GrowthLimits
from serve_app.bench.load import LoadGenerator, LoadResult, RequestRecord, Target
from serve_app.bench.overhead import ANY_MODEL
from serve_app.bench.report import percentile
from serve_app.bench.service import Service
from serve_app.bench.verdict import Line, growth_lines, print_lines
from serve_app.bench.workloads import WorkloadOptions, make_workload
from serve_app.core.errors import ConfigError

REFUSALS = frozenset({429, 503})
_PROMPT_TOKENS = 16
_MAX_REFUSAL_P95_MS = 50.0
_MAX_SLOWDOWN = 1.2
_MAX_RECOVERY_ANSWERS = 2.0
_UNLOADED_SHARE = 0.3
_RECOVERY_PERIOD_S = 0.05


@dataclass(frozen=True, slots=True)
class OverloadOptions:
    """`factor` times the capacity for `duration_s` seconds, after `unloaded_s` at a third of it."""

    num_streams: int = 8
    tokens_per_s: float = 20.0
    output_tokens: int = 40
    factor: float = 10.0
    duration_s: float = 120.0
    unloaded_s: float = 15.0
    seed: int = 1

    @property
    def capacity(self) -> float:
        """Requests per second that the engine can carry."""
        return self.num_streams * self.tokens_per_s / self.output_tokens


@dataclass(frozen=True, slots=True)
class OverloadReport:
    """What was seen. Times in milliseconds; `recovery_ms`: end of the load to the next answer."""

    unloaded_p95_e2el_ms: float
    admitted_p95_e2el_ms: float
    refusal_p50_ms: float
    refusal_p95_ms: float
    refusal_max_ms: float
    num_admitted: int
    num_refused: int
    num_without_retry_after: int
    other_errors: dict[str, int]
    recovery_ms: float
    recovery_limit_ms: float
    growths: tuple[Growth, ...]

    def lines(self) -> list[Line]:
        """Return each limit with what was seen."""
        slowdown = self.admitted_p95_e2el_ms / self.unloaded_p95_e2el_ms
        return [
            Line("refusals", self.num_refused, "≥ 1", self.num_refused >= 1),
            Line("admitted", self.num_admitted, "≥ 1", self.num_admitted >= 1),
            Line(
                "refusals without Retry-After",
                self.num_without_retry_after,
                "0",
                self.num_without_retry_after == 0,
            ),
            Line("other failures", sum(self.other_errors.values()), "0", not self.other_errors),
            Line(
                "refusal p95, ms",
                self.refusal_p95_ms,
                f"< {_MAX_REFUSAL_P95_MS:g}",
                self.refusal_p95_ms < _MAX_REFUSAL_P95_MS,
            ),
            Line(
                "admitted p95 / unloaded p95", slowdown, f"≤ {_MAX_SLOWDOWN}",
                slowdown <= _MAX_SLOWDOWN,
            ),
            Line(
                "back to normal after, ms",
                self.recovery_ms,
                f"≤ {self.recovery_limit_ms:.0f}",
                self.recovery_ms <= self.recovery_limit_ms,
            ),
            *growth_lines(self.growths),
        ]  # fmt: skip


def add_overload(parser: argparse.ArgumentParser) -> None:
    """Add the options of `xeray bench overload`."""
    common.add_config(parser)
    parser.add_argument("--factor", type=float, help="times the capacity that is offered (10)")
    parser.add_argument("--duration", type=float, help="seconds of the overload (120)")
    parser.add_argument("--streams", type=int, help="streams that the engine runs at once (8)")
    parser.add_argument("--rate", type=float, help="tokens per second of each stream (20)")


def run_overload(options: argparse.Namespace) -> int:
    """Overload a service with a fixed-rate engine; print what it did; 1 where a limit breaks."""
    names = {
        "factor": "factor",
        "duration": "duration_s",
        "streams": "num_streams",
        "rate": "tokens_per_s",
    }
    given = {to: getattr(options, name) for name, to in names.items() if hasattr(options, name)}
    chosen = replace(OverloadOptions(), **{k: v for k, v in given.items() if v is not None})
    for name, value in given.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{name} should be more than 0, got {value:g}", param=name)
    report = measure_overload(
        common.config_path(options), chosen, common.host(options), tuple(common.overrides(options))
    )
    lines = report.lines()
    print_lines(
        f"overload: {chosen.factor:g} × {chosen.capacity:g} requests/s for {chosen.duration_s:g} s",
        lines,
    )
    common.write_json(options, {"overload": to_dict(report, lines)})
    return 0 if all(line.is_held for line in lines) else 1


def to_dict(report: OverloadReport, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the figures as JSON values."""
    values = {name: getattr(report, name) for name in report.__slots__ if name != "growths"}
    return {**values, "limits": [line.to_dict() for line in lines]}


def measure_overload(
    config: Path,
    options: OverloadOptions,
    host: str | None = None,
    overrides: tuple[str, ...] = (),
) -> OverloadReport:
    """Start the service of `config` with the fixed-rate engine and overload it."""
    changes = (
        *overrides,
        'model.aliases=["*"]',
        f"engine.fixed_rate_tokens_per_s={options.tokens_per_s}",
        f"engine.max_num_seqs={options.num_streams}",
        "model_replica.max_queued_requests=0",
    )
    with Service(config, changes, host=host) as service:
        target = Target.from_url(service.url, ANY_MODEL, timeout_s=60.0)
        watch = FootprintWatch(service.processes)
        return asyncio.run(overload(target, options, watch))


async def overload(
    target: Target, options: OverloadOptions, watch: FootprintWatch
) -> OverloadReport:
    """Measure an idle service, overload it, and ask until it answers as before."""
    await _offer(target, options, options.capacity * _UNLOADED_SHARE, 5.0)  # warm
    unloaded = await _offer(target, options, options.capacity * _UNLOADED_SHARE, options.unloaded_s)
    async with watch.watching():
        loaded = await _offer(
            target, options, options.capacity * options.factor, options.duration_s
        )
    recovery_ms = await _recovery_ms(target, options)
    return report_of(unloaded, loaded, recovery_ms, watch.growths(GrowthLimits()), options)


def report_of(
    unloaded: LoadResult,
    loaded: LoadResult,
    recovery_ms: float,
    growths: Sequence[Growth],
    options: OverloadOptions,
) -> OverloadReport:
    """Put the figures together."""
    refused = [record for record in loaded.records if record.status in REFUSALS]
    admitted = [record for record in loaded.records if record.error is None]
    others = Counter(
        record.error or ""
        for record in (*unloaded.records, *loaded.records)
        if record.error is not None and record not in refused
    )
    refusals_ms = [1e3 * record.e2el_s for record in refused]
    answer_ms = 1e3 * options.output_tokens / options.tokens_per_s
    return OverloadReport(
        unloaded_p95_e2el_ms=_p95_ms(unloaded.records),
        admitted_p95_e2el_ms=_p95_ms(admitted),
        refusal_p50_ms=percentile(refusals_ms, 50),
        refusal_p95_ms=percentile(refusals_ms, 95),
        refusal_max_ms=max(refusals_ms, default=math.nan),
        num_admitted=len(admitted),
        num_refused=len(refused),
        num_without_retry_after=sum(record.retry_after_s is None for record in refused),
        other_errors=dict(others),
        recovery_ms=recovery_ms,
        recovery_limit_ms=_MAX_RECOVERY_ANSWERS * answer_ms,
        growths=tuple(growths),
    )


def _p95_ms(records: Sequence[RequestRecord]) -> float:
    return percentile([1e3 * record.e2el_s for record in records if record.error is None], 95)


async def _offer(
    target: Target, options: OverloadOptions, requests_per_s: float, duration_s: float
) -> LoadResult:
    workload = WorkloadOptions(
        num_requests=math.ceil(1.5 * requests_per_s * duration_s) + 10,
        prompt_tokens=_PROMPT_TOKENS,
        output_tokens=options.output_tokens,
        seed=options.seed,
    )
    generator = LoadGenerator(target, max_duration_s=duration_s)
    return await generator.run_open(make_workload("fixed", workload), requests_per_s, options.seed)


async def _recovery_ms(target: Target, options: OverloadOptions) -> float:
    """Return how long after the load's end the first complete answer came: NaN for none."""
    clock = asyncio.get_running_loop().time
    begin_s = clock()
    spec = make_workload("fixed", WorkloadOptions(1, _PROMPT_TOKENS, options.output_tokens, seed=2))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60.0):
            while True:
                (record,) = (await LoadGenerator(target).run_closed(spec, 1)).records
                if record.error is None:
                    return 1e3 * (clock() - begin_s)
                await asyncio.sleep(_RECOVERY_PERIOD_S)
    return math.nan
