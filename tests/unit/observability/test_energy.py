from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from serve_app.config.sections_cost import CostSection
from serve_app.observability.energy import CostMetrics, EnergyReader


def write(root: Path, name: str, value: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def add_card(root: Path, address: str) -> Path:
    pci = f"sys/bus/pci/devices/{address}"
    for name, value in (("vendor", "0x8086"), ("device", "0xe20b"), ("class", "0x030000")):
        write(root, f"{pci}/{name}", value)
    driver = root / "sys/bus/pci/drivers/xe"
    driver.mkdir(parents=True, exist_ok=True)
    (root / pci / "driver").symlink_to(driver)
    card = root / f"sys/class/drm/card{len(list(root.glob('sys/class/drm/*')))}"
    card.mkdir(parents=True)
    (card / "device").symlink_to(root / pci)
    write(root, f"{pci}/hwmon/hwmon1/name", "xe")
    write(root, f"{pci}/hwmon/hwmon1/energy1_input", 5_000_000)
    return root / pci / "hwmon/hwmon1/energy1_input"


def add_package(root: Path, micro_joules: int, limit: int = 1_000_000_000) -> Path:
    zone = "sys/class/powercap/intel-rapl:0"
    write(root, f"{zone}/name", "package-0")
    write(root, f"{zone}/energy_uj", micro_joules)
    write(root, f"{zone}/max_energy_range_uj", limit)
    return root / zone / "energy_uj"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def samples(metrics: CostMetrics) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(metrics)
    return {
        sample.name + sample.labels.get("kind", ""): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def source(metrics: CostMetrics) -> str:
    return next(iter(metrics.collect())).samples[0].labels["source"]


def test_cards_that_the_replica_holds_count_and_others_do_not(tmp_path: Path):
    first, second = add_card(tmp_path, "0000:03:00.0"), add_card(tmp_path, "0000:83:00.0")
    reader = EnergyReader(("arc-1",), root=tmp_path)
    first.write_text("95000000\n")
    second.write_text("25000000\n")
    assert reader.read() == 20.0
    assert reader.source == "card"


def test_a_card_whose_counter_was_reset_counts_nothing_for_that_span(tmp_path: Path):
    counter = add_card(tmp_path, "0000:03:00.0")
    reader = EnergyReader(("arc-0",), root=tmp_path)
    counter.write_text("1000000\n")
    assert reader.read() == 0.0
    counter.write_text("3000000\n")
    assert reader.read() == 2.0


def test_a_package_counts_by_the_share_of_its_cpus_and_wraps(tmp_path: Path):
    counter = add_package(tmp_path, 900_000_000)
    reader = EnergyReader(cpu_share=0.25, root=tmp_path)
    counter.write_text("100000000\n")
    assert reader.read() == pytest.approx(200 * 0.25)
    assert reader.source == "package"


def test_without_a_counter_the_configured_watts_count_by_busy_time(tmp_path: Path):
    clock = Clock()
    section = CostSection(
        idle_watts=40, busy_watts=200, host_watts=10, electricity_price_per_kwh=0.36
    )
    metrics = CostMetrics("m", section, EnergyReader(("cuda-0",), root=tmp_path), clock)
    clock.now = 100.0
    metrics.update(busy_s=25.0)
    found = samples(metrics)
    watts = 40 + 0.25 * 160 + 10
    assert source(metrics) == "configured"
    assert found["xeray_energy_joules_total"] == pytest.approx(watts * 100)
    assert found["xeray_power_watts"] == pytest.approx(watts)
    assert found["xeray_cost_totalenergy"] == pytest.approx(watts * 100 / 3.6e6 * 0.36)
    assert found["xeray_cost_totalhardware"] == 0.0
    clock.now = 200.0
    metrics.update(busy_s=0.0)  # the engine was restarted: its seconds began anew
    assert samples(metrics)["xeray_power_watts"] == pytest.approx(50)


def test_measured_joules_win_over_configured_watts(tmp_path: Path):
    counter = add_card(tmp_path, "0000:03:00.0")
    clock = Clock()
    section = CostSection(busy_watts=9999, hardware_price=8766 * 4, hardware_years=4)
    metrics = CostMetrics("m", section, EnergyReader(("arc-0",), root=tmp_path), clock)
    counter.write_text("365000000\n")
    clock.now = 3600.0
    metrics.update(busy_s=3600.0)
    found = samples(metrics)
    assert source(metrics) == "card"
    assert found["xeray_energy_joules_total"] == pytest.approx(360)
    assert found["xeray_cost_totalhardware"] == pytest.approx(1.0)  # one a hour, for an hour
    assert "xeray_cost_budget_per_hour" not in found


def test_nothing_is_told_where_nothing_is_known(tmp_path: Path):
    clock = Clock()
    metrics = CostMetrics("m", CostSection(), EnergyReader(("cuda-0",), root=tmp_path), clock)
    clock.now = 5.0
    metrics.update(busy_s=5.0)
    assert samples(metrics) == {}


def test_a_simulated_card_has_no_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XERAY_SIMULATED_ARC_CARDS", "1")
    assert EnergyReader(("arc-0",), root=tmp_path).read() is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"currency": "Euro"}, "three letters"),
        ({"idle_watts": 50, "busy_watts": 40}, r"busy_watts \(40\) is less than idle_watts"),
        ({"budget_per_hour": 5}, "budget_per_hour needs electricity_price_per_kwh"),
        ({"hardware_years": 0}, "greater than 0"),
    ],
)
def test_config_is_checked(values: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        CostSection.model_validate(values)
