from __future__ import annotations

import argparse
from typing import Any

import pytest

from serve_app.bench import compare
from serve_app.bench import options as common
from serve_app.bench.compare import compare_devices, compare_table, find_devices, pick_devices
from serve_app.bench.rounds import RoundOptions
from serve_app.core.errors import ConfigError
from serve_app.hardware.accelerators import Accelerator
from serve_app.hardware.cards import Card, HostCards

XPU = Accelerator("xpu", 0, "Intel Arc A770", 16 << 30)
CUDA = Accelerator("cuda", 1, "NVIDIA H200", 139 << 30)


def card(index: int, level_zero_index: int, name: str, *, is_integrated: bool = False) -> Card:
    return Card(index, level_zero_index, name, f"0000:0{index}:00.0", "0x56a0", "xe", is_integrated)


CARDS = HostCards(
    discrete=(card(0, 1, "Arc A770"), card(1, 2, "Arc B580")),
    integrated=(card(0, 0, "integrated GPU", is_integrated=True),),
)


def report(speeds: dict[int, float]) -> dict[str, Any]:
    return {"engine": [{"concurrency": c, "output_throughput": r} for c, r in speeds.items()]}


def test_every_device_has_a_process_that_sees_it_alone() -> None:
    devices = find_devices([XPU, CUDA], CARDS)

    assert [device.name for device in devices] == ["cpu", "xpu:0", "xpu:1", "igpu:0", "cuda:1"]
    masks = [device.env.get("ZE_AFFINITY_MASK") for device in devices]
    assert masks == [None, "1", "2", "0", None]
    assert devices[4].env == {"CUDA_VISIBLE_DEVICES": "1"}
    assert [device.changes for device in devices] == [
        ("engine.device=cpu",),
        *[("engine.device=xpu",)] * 3,
        ("engine.device=cuda",),
    ]


def test_without_an_intel_build_of_torch_its_cards_are_no_devices() -> None:
    assert [device.name for device in find_devices([], CARDS)] == ["cpu"]


def test_devices_are_picked_by_name() -> None:
    found = find_devices([XPU], CARDS)

    assert [device.name for device in pick_devices(found, ["xpu", "cpu"])] == ["xpu:0", "cpu"]
    assert pick_devices(found, []) == found
    with pytest.raises(ConfigError, match="--devices: npu is not here; this machine has cpu, xpu"):
        pick_devices(found, ["npu"])


def test_ratios_are_to_the_first_and_a_failure_hides_no_other() -> None:
    speeds = {"cpu": {1: 10.0, 8: 20.0}, "xpu:0": {1: 32.0, 8: 100.0}}

    def measure(device: compare.Device) -> dict[str, Any]:
        if device.name not in speeds:
            raise ConfigError("no memory left")
        return report(speeds[device.name])

    entries = compare_devices(find_devices([XPU], CARDS), measure)

    assert [entry.get("ratio") for entry in entries] == [
        {1: 1.0, 8: 1.0},
        {1: 3.2, 8: 5.0},
        None,
        None,
    ]
    assert entries[2]["error"] == "no memory left"
    table = compare_table(entries, RoundOptions(concurrencies=(1, 8)))
    assert "3.20" in table
    assert "5.00" in table


def test_the_command_prints_the_claim_beside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def measure(options: Any, rounds: Any, changes: Any, env: Any) -> dict[str, Any]:
        seen.append((changes, env))
        return report({1: 10.0})

    monkeypatch.setattr(compare, "find_devices", lambda: find_devices([CUDA], HostCards()))
    monkeypatch.setattr(common, "engine_in_its_own_process", measure)
    parser = argparse.ArgumentParser()
    compare.add_compare(parser)

    assert compare.run_compare(parser.parse_args(["--concurrency", "1"])) == 0

    assert seen == [
        (("engine.device=cpu",), {}),
        (("engine.device=cuda",), {"CUDA_VISIBLE_DEVICES": "1"}),
    ]
    out = capsys.readouterr().out
    assert "a users' guide claims 3.2 × for an Arc A770 over its CPU at 13B" in out
    assert "NVIDIA H200" in out
