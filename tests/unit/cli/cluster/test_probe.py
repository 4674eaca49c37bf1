from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from serve_app.cli.cluster.probe import Facts, facts_from_dict, mismatches, missing, probe
from serve_app.cli.main import main

GIB = 1 << 30
FACTS = Facts(
    hostname="ws1",
    xeray="0.1.0",
    python="3.11.7",
    ray="2.60.0",
    kernel="6.12",
    num_cpus=8,
    has_haproxy=True,
    resources={"arc_gpu": 1},
)


def add_card(root: Path, name: str, address: str, device: str, driver: str) -> None:
    """A card in a fake sysfs tree."""
    folder = root / f"sys/devices/pci0000:00/{address}"
    folder.mkdir(parents=True)
    for file, text in (("vendor", "0x8086"), ("device", device), ("class", "0x030000")):
        (folder / file).write_text(f"{text}\n")
    drivers = root / f"sys/bus/pci/drivers/{driver}"
    drivers.mkdir(parents=True, exist_ok=True)
    (folder / "driver").symlink_to(drivers)
    node = root / f"sys/class/drm/{name}"
    node.mkdir(parents=True)
    (node / "device").symlink_to(folder)


def add_npu(root: Path, driver: str) -> None:
    drivers = root / f"sys/bus/pci/drivers/{driver}"
    drivers.mkdir(parents=True)
    device = root / "sys/class/accel/accel0/device"
    device.mkdir(parents=True)
    (device / "driver").symlink_to(drivers)


def test_cards_cores_and_npu_are_counted(tmp_path: Path) -> None:
    add_card(tmp_path, "card0", "0000:03:00.0", "0xe20b", "xe")
    add_card(tmp_path, "card1", "0000:04:00.0", "0x56a0", "i915")
    add_card(tmp_path, "card2", "0000:00:02.0", "0x64a0", "xe")
    add_npu(tmp_path, "intel_vpu")

    facts = probe(tmp_path, {"XERAY_NUM_CORES": "6"})

    assert facts.resources == {"arc_gpu": 2, "igpu": 1, "npu": 1, "xeon_cores": 6}
    assert facts.labels == {
        "xeray/card-model": "arc-b580.arc-a770",
        "xeray/card-driver": "xe.i915",
        "xeray/card-memory-gib": "12",
    }
    assert [card.kind for card in facts.cards] == ["arc_gpu", "arc_gpu", "igpu"]


def test_ray_takes_the_labels(tmp_path: Path) -> None:
    from ray._private.label_utils import validate_node_label_syntax

    add_card(tmp_path, "card0", "0000:03:00.0", "0xe20b", "xe")
    add_card(tmp_path, "card1", "0000:04:00.0", "0xabcd", "xe")
    validate_node_label_syntax(dict(probe(tmp_path, {}).labels))


def test_a_machine_without_cards_has_no_labels_and_no_zero_counts(tmp_path: Path) -> None:
    facts = probe(tmp_path, {"XERAY_NUM_CORES": "0"})
    assert facts.resources == {}
    assert facts.labels == {}


def test_an_npu_without_its_driver_does_not_count(tmp_path: Path) -> None:
    add_npu(tmp_path, "vfio-pci")
    assert "npu" not in probe(tmp_path, {}).resources


def test_facts_survive_json() -> None:
    facts = probe(env={"XERAY_SIMULATED_ARC_CARDS": "2"})
    again = facts_from_dict(json.loads(json.dumps(facts.as_dict())))
    assert again == facts
    with pytest.raises(TypeError):
        facts_from_dict({"hostname": "x"})


def test_versions_must_match_but_for_pythons_last_number() -> None:
    assert mismatches(replace(FACTS, python="3.11.2"), FACTS) == []
    other = replace(FACTS, python="3.12.1", ray="2.60.1", xeray="0.2.0")
    assert mismatches(other, FACTS) == [
        "Python 3.12, the head has 3.11",
        "Ray 2.60.1, the head has 2.60.0",
        "XeRay 0.2.0, the head has 0.1.0",
    ]


def test_cards_that_are_not_there_are_told() -> None:
    assert missing({"arc_gpu": 1}, FACTS) == []
    told = [
        "2 arc_gpu in the inventory, 1 on the machine",
        "1 igpu in the inventory, 0 on the machine",
    ]
    assert missing({"arc_gpu": 2, "igpu": 1}, FACTS) == told


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "probe"]) == 0
    assert json.loads(capsys.readouterr().out)["ray"]
