"""`xeray bench baseline record | check`: figures against those recorded on the same hardware.

A baseline file holds the counters of a deterministic run, which every machine must reproduce, and
an entry per hardware and model with speeds. Counters are compared exactly, ratios of speeds within
one run and the speeds themselves with a tolerance. Hardware without an entry is never a pass.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import serve_app
from serve_app.bench import options as common
from serve_app.bench.rounds import RoundOptions
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError
from serve_app.hardware.accelerators import list_accelerators
from serve_app.hardware.affinity import num_usable_cores
from serve_app.hardware.cpu import read_cpu_info

VERSION = 1
NO_BASELINE = 3
"""Exit status where nothing was recorded on this hardware."""

RATIO_TOLERANCE = 0.15
SPEED_TOLERANCE = 0.25
_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure beside its recorded value; `is_worse`: the check fails by it."""

    name: str
    recorded: Any
    measured: Any
    is_worse: bool
    note: str = ""

    def __str__(self) -> str:
        verdict = "DIFFERS" if self.is_worse else "holds"
        text = f"{self.name}: {_show(self.measured)}, recorded {_show(self.recorded)}: {verdict}"
        return f"{text} ({self.note})" if self.note else text


def add_baseline(parser: argparse.ArgumentParser) -> None:
    """Add `record` and `check` with their options."""
    actions = parser.add_subparsers(metavar="ACTION", title="what to do", required=True)
    for name, text, run in (
        ("record", "measure this hardware and keep the figures", run_record),
        ("check", "measure again and compare; 1: worse, 3: nothing recorded here", run_check),
    ):
        action = actions.add_parser(
            name, help=text, description=f"{text}.", argument_default=argparse.SUPPRESS
        )
        common.add_config(action)
        common.add_rounds(action)
        action.add_argument("--file", type=Path, help="the baseline file (the checkout's own)")
        if name == "check":
            action.add_argument(
                "--counters-only",
                action="store_true",
                help="compare the deterministic run alone, which needs no entry for this hardware",
            )
        action.set_defaults(run=run)


def run_record(options: argparse.Namespace) -> int:
    """Measure, and write this hardware's entry and the counters into the file."""
    path = _path(options)
    document = read_baseline(path) if path.exists() else new_document()
    rounds = common.round_options(options)
    app = common.app_config(options)
    document["counters"] = measure_counters()
    entry = {
        "fingerprint": hardware_fingerprint(),
        "model": _model_name(app),
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "workload": _workload(rounds),
        "figures": speed_figures(common.engine_in_its_own_process(options, rounds)),
    }
    kept = [e for e in document["hardware"] if not is_same_hardware(e, entry)]
    document["hardware"] = [*kept, entry]
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(f"recorded in {path}: {describe(entry['fingerprint'])}, {entry['model']}")
    common.write_json(options, {"baseline": entry})
    return 0


def run_check(options: argparse.Namespace) -> int:
    """Compare with the file: 0 all holds, 1 something is worse, 3 nothing recorded here."""
    path = _path(options)
    document = read_baseline(path)
    differences = compare_counters(document["counters"], measure_counters())
    print("deterministic run", *differences, sep="\n")
    if getattr(options, "counters_only", False):
        print("only the deterministic run was checked, no speed")
        return 1 if any(each.is_worse for each in differences) else 0
    here = {"fingerprint": hardware_fingerprint(), "model": _model_name(common.app_config(options))}
    entry = next((e for e in document["hardware"] if is_same_hardware(e, here)), None)
    if entry is None:
        print(
            f"no baseline for this hardware ({describe(here['fingerprint'])}, {here['model']});"
            f" record one with: xeray bench baseline record --file {path}"
        )
        return NO_BASELINE
    measured = common.engine_in_its_own_process(options, RoundOptions(**_rounds(entry)))
    speeds = compare_speeds(entry["figures"], speed_figures(measured))
    print(f"this hardware, as of {entry['recorded']}", *speeds, sep="\n")
    common.write_json(options, {"baseline": entry, "measured": speed_figures(measured)})
    return 1 if any(each.is_worse for each in (*differences, *speeds)) else 0


def measure_counters() -> dict[str, Any]:
    """Return what the deterministic run counts; loads torch, which other commands do without."""
    from serve_app.bench import baseline_counters

    return baseline_counters.measure_counters()


def new_document() -> dict[str, Any]:
    """Return a baseline file with nothing in it."""
    return {"version": VERSION, "counters": {}, "hardware": []}


def read_baseline(path: Path) -> dict[str, Any]:
    """Read a baseline file. Raises ConfigError where it is missing or none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"--file: {path} does not exist; record one with: xeray bench baseline record"
            f" --file {path}",
            param="file",
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--file: {path} is no baseline: {error}", param="file") from error
    is_ours = isinstance(document, dict) and document.get("version") == VERSION
    if not is_ours or not {"counters", "hardware"} <= set(document):
        raise ConfigError(
            f"--file: {path} is no baseline of version {VERSION}; record it anew", param="file"
        )
    return dict(document)


def hardware_fingerprint() -> dict[str, Any]:
    """Return what decides speed here: processor, cores, features, cards, torch's version."""
    import torch

    cpu = read_cpu_info()
    return {
        "cpu": cpu.model_name,
        "num_cores": num_usable_cores(),
        "features": [flag for flag in _FLAGS if flag in cpu.flags],
        "cards": [each.name for each in list_accelerators()],
        "torch": torch.__version__,
    }


def describe(fingerprint: Mapping[str, Any]) -> str:
    """Return a fingerprint as words."""
    cards = ", ".join(fingerprint["cards"]) or "no card"
    return (
        f"{fingerprint['cpu'] or 'unknown CPU'}, {fingerprint['num_cores']} cores, {cards},"
        f" torch {fingerprint['torch']}"
    )


def is_same_hardware(entry: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries are of the same hardware and model."""
    return (entry["fingerprint"], entry["model"]) == (other["fingerprint"], other["model"])


def speed_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Return tokens/s by concurrency, and each as a ratio to the smallest concurrency's."""
    rates = {entry["concurrency"]: entry["output_throughput"] for entry in report["engine"]}
    smallest = min(rates, default=None)
    figures = {f"tokens/s at {size}": rate for size, rate in rates.items()}
    figures |= {
        f"ratio of {size} to {smallest}": rate / rates[smallest]
        for size, rate in rates.items()
        if smallest is not None and size != smallest
    }
    return figures


def compare_counters(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Difference]:
    """Compare exactly; a counter that only one side has differs."""
    names = [*recorded, *(name for name in measured if name not in recorded)]
    return [
        Difference(name, old, new, is_worse=old != new)
        for name in names
        for old, new in [(recorded.get(name), measured.get(name))]
    ]


def compare_speeds(
    recorded: Mapping[str, float], measured: Mapping[str, float]
) -> list[Difference]:
    """Compare within the tolerance of each kind; better than recorded is said, and passes."""
    differences = []
    for name, old in recorded.items():
        new = measured.get(name)
        tolerance = RATIO_TOLERANCE if name.startswith("ratio") else SPEED_TOLERANCE
        if new is None:
            differences.append(Difference(name, old, None, is_worse=True, note="not measured"))
            continue
        note = f"tolerance {tolerance:.0%}"
        if new > old * (1 + tolerance):
            note = "better by more than the tolerance: record it anew"
        differences.append(Difference(name, old, new, new < old * (1 - tolerance), note))
    return differences


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return str(value)[:16]


def _workload(rounds: RoundOptions) -> dict[str, Any]:
    return {
        "concurrencies": list(rounds.concurrencies),
        "prompt_tokens": rounds.prompt_tokens,
        "output_tokens": rounds.output_tokens,
        "num_rounds": rounds.num_rounds,
        "seed": rounds.seed,
    }


def _rounds(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry["workload"], "concurrencies": tuple(entry["workload"]["concurrencies"])}


def _model_name(app: AppConfig) -> str:
    return str(app.model.path)


def _path(options: argparse.Namespace) -> Path:
    """Return the file that is meant. Raises ConfigError outside of a checkout without --file."""
    given = getattr(options, "file", None)
    if given is not None:
        return Path(given)
    folder = Path(serve_app.__file__).resolve().parent.parent / "tests"
    if folder.is_dir():
        return folder / "baseline.json"
    raise ConfigError("--file: name the baseline file; only a checkout has one", param="file")
