"""Service level objectives: which requests were good enough to count (vLLM's goodput)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve_app.bench.load import RequestRecord
from serve_app.core.errors import ConfigError

METRICS = ("ttft_ms", "tpot_ms", "e2el_ms")


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper bounds in milliseconds by metric name; a request meets all of them or none counts."""

    limits_ms: tuple[tuple[str, float], ...]

    def is_met(self, record: RequestRecord) -> bool:
        """Whether the request succeeded within every bound; one token has no TPOT to exceed."""
        if record.error is not None:
            return False
        values_s = {"ttft_ms": record.ttft_s, "tpot_ms": record.tpot_s, "e2el_ms": record.e2el_s}
        return all(
            (value_s := values_s[name]) is None or 1e3 * value_s <= limit_ms
            for name, limit_ms in self.limits_ms
        )

    def to_dict(self) -> dict[str, float]:
        """Return metric → milliseconds."""
        return dict(self.limits_ms)


def parse_slo(text: str) -> Slo:
    """Parse `ttft_ms=500,tpot_ms=100`. Raises ConfigError naming what is wrong."""
    limits: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = item.partition("=")
        if not separator or name not in METRICS:
            raise ConfigError(
                f"--slo: {item} is not of the form NAME=MILLISECONDS with a name among"
                f" {', '.join(METRICS)}",
                param="slo",
            )
        limits[name] = _milliseconds(item, value)
    if not limits:
        raise ConfigError("--slo: no bound given; for example ttft_ms=500,tpot_ms=100", param="slo")
    return Slo(tuple(limits.items()))


def _milliseconds(item: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"--slo: {item}: the bound must be a number above 0", param="slo")
    return number
