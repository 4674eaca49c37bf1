"""One network in several precisions, and the sentence about it."""

from __future__ import annotations

import json

import pytest

from serve_app.bench import precision
from serve_app.bench.decode import DecodeOptions, DecodeReport
from serve_app.bench.precision import PrecisionReport, measure_precisions
from serve_app.cli.main import main

STEP_MS = {"float32": 40.0, "bfloat16": 20.0, "int4": 8.0}


@pytest.fixture
def asked(monkeypatch):
    """Put a table in place of the measuring; return what was asked for."""
    seen: list[DecodeOptions] = []

    def measure(options: DecodeOptions, on_line) -> DecodeReport:
        seen.append(options)
        name = options.dtype if options.weight_format == "auto" else options.weight_format
        report = DecodeReport("a device", options.shape, name, options.dtype, 1.0, 1, 0.0, 0.0)
        report.decode.append({"step_ms": STEP_MS[name]})
        return report

    monkeypatch.setattr(precision, "measure_decode", measure)
    return seen


def test_each_precision_runs_once_and_int4_meets_the_best_of_the_others(asked):
    lines: list[str] = []
    report = measure_precisions(DecodeOptions(), lines.append)
    assert [(each.dtype, each.weight_format) for each in asked] == [
        ("float32", "auto"),
        ("bfloat16", "auto"),
        ("auto", "int4"),
    ]
    assert all(each.concurrencies == (1,) and not each.long_tokens for each in asked)
    assert report.best_dense == "bfloat16"
    assert report.latency_reduction == pytest.approx(0.6)
    assert "60.0% less time than bfloat16" in lines[-1]
    assert "claims 58%" in lines[-1]


def test_the_command_writes_it(asked, tmp_path):
    path = tmp_path / "figures.json"
    assert main(["bench", "decode", "--precisions", "--device", "cpu", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["precisions"]["step_ms"] == STEP_MS


def test_a_slower_int4_is_no_reduction():
    report = PrecisionReport("cpu", "x", {"float32": 5.0, "bfloat16": 9.0, "int4": 6.0}, {})
    assert report.best_dense == "float32"
    assert report.latency_reduction == pytest.approx(-0.2)
