"""Whether fewer bits decode faster: one network in several precisions, one after the other.

The ratio is taken within one run on one device. The latency reduction of INT4 against the best of
the unquantized types stands beside what a users' guide of such a stack promises for its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from serve_app.bench.decode import DecodeOptions, measure_decode

GUIDE_CLAIM = 0.58
"""Latency reduction by INT4 that a users' guide states, without saying against what."""
_DENSE = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """Milliseconds of a decode step by precision, one sequence, and the whole reports."""

    device: str
    shape: str
    step_ms: dict[str, float]
    reports: dict[str, dict[str, Any]]

    @property
    def best_dense(self) -> str:
        """The faster of the unquantized types."""
        return min(_DENSE, key=self.step_ms.__getitem__)

    @property
    def latency_reduction(self) -> float:
        """Share of the best unquantized step's time that INT4 saves."""
        return 1 - self.step_ms["int4"] / self.step_ms[self.best_dense]

    def lines(self) -> list[str]:
        """The verdict, and what it stands beside."""
        times = ", ".join(f"{name} {value:.2f}" for name, value in self.step_ms.items())
        return [
            f"{self.device}, {self.shape}: ms a token: {times}",
            f"INT4 takes {self.latency_reduction:.1%} less time than {self.best_dense}, the best"
            f" unquantized type here; a users' guide claims {GUIDE_CLAIM:.0%}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "device": self.device,
            "shape": self.shape,
            "step_ms": self.step_ms,
            "best_dense": self.best_dense,
            "latency_reduction": self.latency_reduction,
            "guide_claim": GUIDE_CLAIM,
            "reports": self.reports,
        }


def measure_precisions(
    options: DecodeOptions, on_line: Callable[[str], None] = lambda line: None
) -> PrecisionReport:
    """Measure float32, bfloat16 and INT4 at one sequence; the long parts of `options` are left out.

    Raises ConfigError for a shape that does not fit in one of them.
    """
    options = replace(options, concurrencies=(1,), long_tokens=0, prefill_tokens=0)
    step_ms: dict[str, float] = {}
    reports: dict[str, dict[str, Any]] = {}
    device = ""
    for name in (*_DENSE, "int4"):
        precision = {"weight_format": "int4"} if name == "int4" else {"dtype": name}
        report = measure_decode(replace(options, **precision), on_line)  # type: ignore[arg-type]
        device = report.device
        step_ms[name] = report.decode[0]["step_ms"]
        reports[name] = report.to_dict()
        gc.collect()  # the network before goes before the next is made
    result = PrecisionReport(device, options.shape, step_ms, reports)
    for line in result.lines():
        on_line(line)
    return result
