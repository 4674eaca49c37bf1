"""Limits beside what was seen, for measurements that either hold or do not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.bench.footprint import Growth

_UNITS = {"rss_bytes": ("memory, MiB", 1 << 20)}


@dataclass(frozen=True, slots=True)
class Line:
    """One limit: its name, the figure, the limit in words."""

    name: str
    seen: float
    limit: str
    is_held: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "name": self.name, "seen": self.seen, "limit": self.limit, "is_held": self.is_held,
        }  # fmt: skip

    def __str__(self) -> str:
        mark = "ok  " if self.is_held else "FAIL"
        return f"  {mark}  {self.name}: {self.seen:.4g} (limit {self.limit})"


def growth_lines(growths: Iterable[Growth]) -> list[Line]:
    """Return a line for each figure that must not grow."""
    lines = []
    for growth in growths:
        plain = growth.name.removeprefix("num_").replace("_", " ")
        name, unit = _UNITS.get(growth.name, (plain, 1))
        limit = f"≤ {growth.allowed / unit:.4g}, from {growth.begin / unit:.6g}"
        lines.append(Line(f"growth of {name}", growth.grew / unit, limit, growth.is_held))
    return lines


def print_lines(title: str, lines: Sequence[Line]) -> None:
    """Print all limits under a title."""
    print(title, *lines, sep="\n", flush=True)
