"""Baselines: the recorded counters hold here, and what differs or is missing is never a pass."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.bench import baseline
from serve_app.bench import options as common
from serve_app.bench.baseline_counters import measure_counters
from serve_app.bench.main import add_parsers
from serve_app.core.errors import ConfigError

HERE = {
    "cpu": "A Xeon",
    "num_cores": 2,
    "features": ["avx2"],
    "cards": [],
    "torch": "2.13.0",
}
SPEEDS = {1: 30.0, 8: 90.0}


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xeray bench")
    add_parsers(parser)
    return parser.parse_args(["baseline", *words])


def report(speeds: dict[int, float]) -> dict[str, Any]:
    return {"engine": [{"concurrency": c, "output_throughput": r} for c, r in speeds.items()]}


@pytest.fixture(scope="module")
def counters() -> dict[str, Any]:
    return measure_counters()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, counters: dict[str, Any]) -> dict[int, float]:
    """A machine whose speeds the test sets; the engine is not loaded."""
    speeds = dict(SPEEDS)
    monkeypatch.setattr(baseline, "hardware_fingerprint", lambda: dict(HERE))
    monkeypatch.setattr(baseline, "measure_counters", lambda: dict(counters))
    monkeypatch.setattr(common, "engine_in_its_own_process", lambda *_: report(speeds))
    return speeds


def test_the_recorded_counters_hold_on_this_machine(
    repository: Path, counters: dict[str, Any]
) -> None:
    recorded = baseline.read_baseline(repository / "tests" / "baseline.json")["counters"]

    worse = [str(d) for d in baseline.compare_counters(recorded, counters) if d.is_worse]

    assert not worse
    for name in ("preemptions", "joins", "chunked_prefills", "aborted", "prefix_hit_tokens"):
        assert recorded[f"num_{name}_total"] > 0, "the run is to provoke it"


def test_the_counters_command_passes_without_an_entry(
    repository: Path, machine: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    del machine
    options = parse("check", "--counters-only", "--file", str(repository / "tests/baseline.json"))

    assert options.run(options) == 0
    assert "only the deterministic run was checked" in capsys.readouterr().out


def test_other_hardware_is_never_a_pass(
    tmp_path: Path,
    machine: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del machine
    path = tmp_path / "b.json"
    record, check = parse("record", "--file", str(path)), parse("check", "--file", str(path))
    assert record.run(record) == 0

    for change in ({"torch": "2.12.0"}, {"cards": ["Arc A770"]}, {"num_cores": 16}):
        monkeypatch.setattr(baseline, "hardware_fingerprint", lambda c=change: {**HERE, **c})
        assert check.run(check) == 3

    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("no baseline for this hardware (A Xeon, 16 cores, no card, torch 2.13.0")
    assert line.endswith(f"record one with: xeray bench baseline record --file {path}")


@pytest.mark.parametrize(
    ("speeds", "code", "words"),
    [
        ({1: 30.0, 8: 90.0}, 0, "holds"),
        ({1: 24.0, 8: 80.0}, 0, "holds"),
        ({1: 20.0, 8: 60.0}, 1, "tokens/s at 1: 20.00, recorded 30.00: DIFFERS"),
        ({1: 33.0, 8: 80.0}, 1, "ratio of 8 to 1: 2.42, recorded 3.00: DIFFERS"),
        ({1: 60.0, 8: 180.0}, 0, "better by more than the tolerance"),
        ({1: 30.0}, 1, "tokens/s at 8: None, recorded 90.00: DIFFERS (not measured)"),
    ],
)
def test_speeds_and_ratios_have_a_tolerance(
    tmp_path: Path,
    machine: dict[int, float],
    capsys: pytest.CaptureFixture[str],
    speeds: dict[int, float],
    code: int,
    words: str,
) -> None:
    path = tmp_path / "b.json"
    record, check = parse("record", "--file", str(path)), parse("check", "--file", str(path))
    record.run(record)
    machine.clear()
    machine.update(speeds)

    assert check.run(check) == code
    assert words in capsys.readouterr().out


def test_a_counter_that_differs_fails(tmp_path: Path, machine: dict[int, float]) -> None:
    del machine
    path = tmp_path / "b.json"
    record, check = parse("record", "--file", str(path)), parse("check", "--file", str(path))
    record.run(record)
    document = json.loads(path.read_text())
    document["counters"]["num_steps_total"] += 1
    path.write_text(json.dumps(document))

    assert check.run(check) == 1


def test_recording_again_replaces_this_hardware_and_keeps_the_others(
    tmp_path: Path, machine: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.json"
    record = parse("record", "--file", str(path))
    record.run(record)
    machine[1] = 40.0
    record.run(record)
    monkeypatch.setattr(baseline, "hardware_fingerprint", lambda: {**HERE, "cards": ["Arc A770"]})
    record.run(record)

    entries = baseline.read_baseline(path)["hardware"]
    assert [(e["fingerprint"]["cards"], e["figures"]["tokens/s at 1"]) for e in entries] == [
        ([], 40.0),
        (["Arc A770"], 40.0),
    ]


def test_counters_that_only_one_side_has_differ() -> None:
    differences = baseline.compare_counters({"a": 1, "b": 2}, {"a": 1, "c": 3})

    assert [(d.name, d.is_worse) for d in differences] == [("a", False), ("b", True), ("c", True)]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99}'])
def test_a_file_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)

    with pytest.raises(ConfigError, match=r"--file: .* is no baseline"):
        baseline.read_baseline(path)
    with pytest.raises(ConfigError, match=r"does not exist; record one with"):
        baseline.read_baseline(tmp_path / "none.json")


def test_the_fingerprint_of_this_machine_is_whole() -> None:
    fingerprint = baseline.hardware_fingerprint()

    assert set(fingerprint) == set(HERE)
    assert fingerprint["num_cores"] >= 1
    assert fingerprint == json.loads(json.dumps(fingerprint))
    assert fingerprint["torch"] in baseline.describe(fingerprint)
