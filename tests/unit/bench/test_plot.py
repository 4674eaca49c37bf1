from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from serve_app.bench import plot
from serve_app.core.errors import ConfigError

LOADS: list[dict[str, Any]] = [
    {
        "load": f"fixed × {size}",
        "output_throughput": 30.0 * size,
        "median_ttft_ms": 10.0 * size,
        "p99_ttft_ms": 20.0 * size,
        "median_tpot_ms": 30.0,
        "p99_tpot_ms": 31.0,
    }
    for size in (1, 8, 32)
]


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_a_sweep_is_drawn(tmp_path: Path, name: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name

    plot.plot_sweep(path, LOADS, "a sweep")

    data = path.read_bytes()
    assert data.startswith(magic)
    if magic == b"<?xml":
        text = data.decode()
        for words in ("Time to first token, ms", "Output tokens per second", "fixed × 32"):
            assert words in text


def test_without_matplotlib_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"--plot needs matplotlib.*pip install 'xeray\[bench\]'"):
        plot.check_plot(tmp_path / "a.png")


def test_a_file_that_cannot_be_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--plot: a\.pdf must end in \.png or \.svg"):
        plot.check_plot(tmp_path / "a.pdf")
    with pytest.raises(ConfigError, match="does not exist"):
        plot.check_plot(tmp_path / "no" / "a.png")
