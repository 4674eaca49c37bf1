"""Whether a new version does as well as the old one, from what both did side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["better_or_equal", "worse", "too_few"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What counts as worse.

    error_rate: most that the new version's share of failed requests may lie above the old one's.
    latency_ratio: most that its p95 TTFT and p95 latency may be of the old ones.
    slack_s: differences in seconds below this never count.
    min_requests: fewer that have ended tell nothing of a version, apart from min_failures failures
    of the new one.
    """

    error_rate: float = 0.01
    latency_ratio: float = 1.5
    slack_s: float = 0.05
    min_requests: int = 20
    min_failures: int = 3


@dataclass(frozen=True, slots=True)
class VersionReport:
    """One version's counts and p95s (seconds, 0 without samples), over all ingress replicas.

    num_requests: that began. num_samples: that were answered to their end.
    """

    num_requests: int = 0
    num_failed: int = 0
    ttft_p95_s: float = 0.0
    latency_p95_s: float = 0.0
    num_samples: int = 0

    @property
    def error_rate(self) -> float:
        """Share of failed requests."""
        return self.num_failed / self.num_requests if self.num_requests else 0.0

    @property
    def num_ended(self) -> int:
        """Requests that were answered or failed; not those that run, or whose client left."""
        return self.num_samples + self.num_failed


@dataclass(frozen=True, slots=True)
class Comparison:
    """The verdict, and the line that says why."""

    verdict: Verdict
    reason: str


def merged(reports: Iterable[Mapping[str, Any]]) -> VersionReport:
    """Return one version's report from those of the ingress replicas (Ingress.canary_report)."""
    rows = list(reports)
    ttfts = [value for row in rows for value in row["ttfts_s"]]
    latencies = [value for row in rows for value in row["latencies_s"]]
    return VersionReport(
        num_requests=sum(row["num_requests"] for row in rows),
        num_failed=sum(row["num_failed"] for row in rows),
        ttft_p95_s=p95(ttfts),
        latency_p95_s=p95(latencies),
        num_samples=len(latencies),
    )


def compare(old: VersionReport, new: VersionReport, limits: Limits) -> Comparison:
    """Compare two versions that ran at the same time, once enough requests of both have ended.

    Those that only began say nothing: the slower a version, the later it would be seen. An old
    version that gets no requests any more has nothing to be compared with but its failures.
    """
    over = new.error_rate - old.error_rate
    has_failures = new.num_failed >= limits.min_failures
    if over > limits.error_rate and (has_failures or new.num_requests >= limits.min_requests):
        return Comparison(
            "worse",
            f"{new.num_failed} of {new.num_requests} requests failed"
            f" ({new.error_rate:.1%}, the old version: {old.error_rate:.1%})",
        )
    if new.num_ended < limits.min_requests:
        return Comparison("too_few", f"{new.num_ended} of {limits.min_requests} requests ended")
    if old.num_requests > 0 and old.num_ended < limits.min_requests:
        return Comparison(
            "too_few",
            f"{old.num_ended} of {limits.min_requests} requests of the old version ended",
        )
    if min(old.num_samples, new.num_samples) > 0:
        for name in ("ttft_p95_s", "latency_p95_s"):
            before, now = getattr(old, name), getattr(new, name)
            if now > max(before * limits.latency_ratio, before + limits.slack_s):
                label = name.removesuffix("_s").replace("_", " ")
                return Comparison("worse", f"{label} {now:.3f} s, the old version's {before:.3f} s")
    return Comparison("better_or_equal", f"{new.num_requests} requests, {new.num_failed} failed")


def p95(values: Sequence[float]) -> float:
    """Return the 95th percentile (nearest rank), 0 of nothing."""
    ordered = sorted(values)
    return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else 0.0
