"""`xeray bench compare`: one model on each device of this machine, and the ratios to the CPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.bench import options as common
from serve_app.bench.report import format_table
from serve_app.bench.rounds import RoundOptions
from serve_app.core.errors import ConfigError
from serve_app.hardware.accelerators import Accelerator, list_accelerators
from serve_app.hardware.cards import HostCards, list_cards
from serve_app.hardware.cpu import read_cpu_info

CLAIM = "for orientation: a users' guide claims 3.2 × for an Arc A770 over its CPU at 13B"

_PCI_ORDER = "ZE_ENABLE_PCI_ID_DEVICE_ORDER"
Measure = Callable[["Device"], dict[str, Any]]
"""Returns the report of the engine alone (`engine`: figures by concurrency) on a device."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device by the name that `--devices` takes; `changes` and `env` put the engine on it."""

    name: str
    description: str
    changes: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the options of `xeray bench compare`."""
    common.add_config(parser)
    common.add_rounds(parser)
    parser.add_argument(
        "--devices",
        nargs="*",
        metavar="NAME",
        help="cpu, xpu:0, cuda:0, igpu:0 …; all that this machine has unless named",
    )


def run_compare(options: argparse.Namespace) -> int:
    """Measure the model on each device; 1 where one of them could not be measured."""
    devices = pick_devices(find_devices(), getattr(options, "devices", None) or ())
    rounds = common.round_options(options)

    def measure(device: Device) -> dict[str, Any]:
        print(f"{device.name}: {device.description}", flush=True)
        return common.engine_in_its_own_process(options, rounds, device.changes, device.env)

    report = compare_devices(devices, measure)
    print(compare_table(report, rounds))
    for entry in report:
        if "error" in entry:
            print(f"{entry['device']}: {entry['error']}")
    if len(devices) == 1:
        print(f"{devices[0].name} is the only device here: there is nothing to compare it with")
    print(CLAIM)
    common.write_json(options, {"compare": report, "claim": CLAIM})
    return 1 if any("error" in entry for entry in report) else 0


def find_devices(
    accelerators: Sequence[Accelerator] | None = None, cards: HostCards | None = None
) -> list[Device]:
    """Return the CPU and every accelerator that torch can use; discrete before integrated.

    torch hides an integrated GPU beside a discrete one, so Intel's GPUs come from the kernel's list
    and each gets a process in which only it is visible.
    """
    found = list_accelerators() if accelerators is None else accelerators
    devices = [_cpu()]
    if any(each.kind == "xpu" for each in found):
        host = list_cards() if cards is None else cards
        for card in (*host.discrete, *host.integrated):
            if not card.is_simulated:
                kind = "igpu" if card.is_integrated else "xpu"
                env = {"ZE_AFFINITY_MASK": str(card.level_zero_index), _PCI_ORDER: "1"}
                name = f"{kind}:{card.index}"
                devices.append(Device(name, card.name, ("engine.device=xpu",), env))
    for each in found:
        if each.kind == "cuda":
            env = {"CUDA_VISIBLE_DEVICES": str(each.index)}
            name = f"cuda:{each.index}"
            devices.append(Device(name, each.name, ("engine.device=cuda",), env))
    return devices


def pick_devices(found: Sequence[Device], names: Sequence[str]) -> list[Device]:
    """Return the named devices, all without names. Raises ConfigError naming what there is.

    `xpu` alone means the first of its kind.
    """
    by_name = {device.name: device for device in found}
    picked = []
    for name in names:
        device = by_name.get(name) or by_name.get(f"{name}:0")
        if device is None:
            raise ConfigError(
                f"--devices: {name} is not here; this machine has {', '.join(by_name)}",
                param="devices",
            )
        picked.append(device)
    return picked or list(found)


def compare_devices(devices: Sequence[Device], measure: Measure) -> list[dict[str, Any]]:
    """Return an entry for each device: its figures and `ratio` (concurrency → × the first).

    A device that fails has `error` instead, and the others are measured all the same.
    """
    report: list[dict[str, Any]] = []
    base: dict[int, float] = {}
    for device in devices:
        entry: dict[str, Any] = {"device": device.name, "description": device.description}
        try:
            measured = measure(device)
        except ConfigError as error:
            report.append({**entry, "error": error.message})
            continue
        rates = {e["concurrency"]: e["output_throughput"] for e in measured["engine"]}
        base = base or rates
        entry |= {"figures": measured, "tokens_per_s": rates}
        entry["ratio"] = {c: rate / base[c] for c, rate in rates.items() if base.get(c)}
        report.append(entry)
    return report


def compare_table(report: Sequence[dict[str, Any]], rounds: RoundOptions) -> str:
    """Return the table: tokens/s of each device and its ratio to the first that was measured."""
    headers = ["device", "name"]
    for concurrency in rounds.concurrencies:
        headers += [f"tokens/s at {concurrency}", "ratio"]
    rows = []
    for entry in report:
        rates, ratios = entry.get("tokens_per_s", {}), entry.get("ratio", {})
        row: list[object] = [entry["device"], entry["description"]]
        for concurrency in rounds.concurrencies:
            ratio = ratios.get(concurrency)
            row += [
                rates.get(concurrency, "-"),
                "-" if ratio is None else f"{ratio:.2f}",
            ]
        rows.append(row)
    return format_table(headers, rows)


def _cpu() -> Device:
    info = read_cpu_info()
    description = f"{info.model_name or 'CPU'}, {info.num_physical_cores} cores, {info.isa}"
    return Device("cpu", description, ("engine.device=cpu",))
