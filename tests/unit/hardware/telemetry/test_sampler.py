from pathlib import Path

import pytest

from serve_app.hardware.telemetry.sampler import HardwareSampler

XE = "sys/bus/pci/devices/0000:83:00.0"


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def xe_client(busy: int, total: int) -> str:
    return (
        "drm-driver: xe\ndrm-client-id: 3\ndrm-pdev: 0000:83:00.0\ndrm-resident-vram0: 6 MiB\n"
        f"drm-cycles-ccs: {busy}\ndrm-total-cycles-ccs: {total}\n"
        f"drm-cycles-rcs: 0\ndrm-total-cycles-rcs: {total}\n"
    )


def test_rates_between_two_samples(fake_root: Path, write, add_client) -> None:
    clock = Clock()
    sampler = HardwareSampler(fake_root, clock)
    add_client(10, "3", xe_client(0, 1000))
    first = sampler.sample()
    assert first.cpu_utilization is None
    assert all(gpu.power_w is None and not gpu.engines for gpu in first.gpus)

    clock.now_s += 2.0
    write(f"{XE}/hwmon/hwmon4/energy1_input", 307_000_000)
    write(f"{XE}/tile0/gt0/gtidle/idle_residency_ms", 10_500)
    write("proc/stat", "cpu  200 0 50 900 50 0 0 0 7 0")
    write("sys/class/powercap/intel-rapl:0/energy_uj", 1_000_000)  # wrapped at 10 J
    write("sys/class/accel/accel0/device/npu_busy_time_us", 501_000)
    add_client(10, "3", xe_client(600, 2000))
    rates = sampler.sample()

    card = next(gpu for gpu in rates.gpus if gpu.card.driver == "xe")
    assert card.power_w == pytest.approx(150.0)
    assert card.utilization == pytest.approx(0.75)
    assert card.engines == {"compute": pytest.approx(0.6), "render": 0.0}
    assert card.memory_used_bytes == 6 << 20
    assert rates.cpu_utilization == pytest.approx(0.5)
    assert rates.cpu_power_w == {"package-0": pytest.approx(3.0)}
    assert rates.npu_utilization == pytest.approx(0.25)


def test_i915_engine_shares_are_of_wall_time(fake_root: Path, add_client) -> None:
    clock = Clock()
    sampler = HardwareSampler(fake_root, clock)
    text = "drm-driver: i915\ndrm-client-id: 1\ndrm-pdev: 0000:03:00.0\ndrm-engine-render: {} ns\n"
    add_client(5, "8", text.format(1_000))
    sampler.sample()
    clock.now_s += 1.0
    add_client(5, "8", text.format(1_000 + 250_000_000))
    card = next(gpu for gpu in sampler.sample().gpus if gpu.card.name == "Arc A770")
    assert card.engines == {"render": pytest.approx(0.25)}


def test_an_energy_counter_that_fell_gives_no_power(fake_root: Path, write) -> None:
    clock = Clock()
    sampler = HardwareSampler(fake_root, clock)
    sampler.sample()
    clock.now_s += 1.0
    write(f"{XE}/hwmon/hwmon4/energy1_input", 1)
    card = next(gpu for gpu in sampler.sample().gpus if gpu.card.driver == "xe")
    assert card.power_w is None
