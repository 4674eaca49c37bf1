"""A picture of a sweep: latency over throughput, one point for each load (matplotlib, optional)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve_app.core.errors import ConfigError

FORMATS = (".png", ".svg")
_PANELS = (("ttft", "Time to first token, ms"), ("tpot", "Time per output token, ms"))
_LINES = (("median", "median", "o-"), ("p99", "99th percentile", "s--"))


def check_plot(path: Path) -> None:
    """Raise ConfigError where `plot_sweep` could not write `path`: to be asked before measuring."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot: {path.name} must end in {' or '.join(FORMATS)}", param="plot")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: the folder {path.parent} does not exist", param="plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'xeray[bench]'",
            param="plot",
        )


def plot_sweep(path: Path, loads: Sequence[Mapping[str, Any]], title: str) -> None:
    """Write a picture of `loads` (figures of `summarise` with a `load` label) to `path`.

    Left the time to first token, right the time per output token, over output tokens per second.
    Raises ConfigError as `check_plot` does, or where the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(title)
    for axes, (name, label) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for statistic, legend, style in _LINES:
            x = [entry["output_throughput"] for entry in loads]
            y = [entry[f"{statistic}_{name}_ms"] for entry in loads]
            axes.plot(x, y, style, label=legend)
        for entry in loads:
            axes.annotate(
                entry["load"],
                (entry["output_throughput"], entry[f"median_{name}_ms"]),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
        axes.set_xlabel("Output tokens per second")
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=150)
    except OSError as error:
        raise ConfigError(
            f"--plot: cannot write {path} ({error.strerror})", param="plot"
        ) from error
