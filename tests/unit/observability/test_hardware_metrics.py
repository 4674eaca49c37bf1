import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.cli.main import main
from serve_app.hardware.telemetry.sampler import HardwareSampler
from serve_app.observability.hardware_metrics import HardwareCollector


def write(root: Path, name: str, value: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def fake_card(root: Path) -> Path:
    pci = "sys/bus/pci/devices/0000:83:00.0"
    for name, value in (("vendor", "0x8086"), ("device", "0xe20b"), ("class", "0x030000")):
        write(root, f"{pci}/{name}", value)
    driver = root / "sys/bus/pci/drivers/xe"
    driver.mkdir(parents=True)
    (root / pci / "driver").symlink_to(driver)
    (root / "sys/class/drm/card0").mkdir(parents=True)
    (root / "sys/class/drm/card0/device").symlink_to(root / pci)
    write(root, f"{pci}/hwmon/hwmon1/name", "xe")
    write(root, f"{pci}/hwmon/hwmon1/energy1_input", 1_000_000)
    write(root, f"{pci}/hwmon/hwmon1/temp2_input", 50_000)
    write(root, f"{pci}/tile0/gt0/freq0/act_freq", 2000)
    write(root, f"{pci}/tile0/gt0/gtidle/idle_residency_ms", 0)
    write(root, f"{pci}/tile0/gt0/freq0/throttle/reason_thermal", 1)
    write(root, "proc/stat", "cpu  1 0 0 9 0 0 0 0 0 0")
    return root / pci


def test_a_scrape_has_every_level_of_a_card(tmp_path: Path) -> None:
    pci = fake_card(tmp_path)
    times = iter((0.0, 1.0))
    registry = CollectorRegistry()
    collector = HardwareCollector(HardwareSampler(tmp_path, lambda: next(times)))
    (pci / "hwmon/hwmon1/energy1_input").write_text("81000000\n")
    (pci / "tile0/gt0/gtidle/idle_residency_ms").write_text("400\n")
    registry.register(collector)
    samples = {
        (sample.name, sample.labels.get("engine") or sample.labels.get("reason", "")): sample
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }
    busy = samples["intel_gpu_utilization", "any"]
    assert busy.value == 0.6
    assert busy.labels["card"] == "arc-0"
    assert samples["xeray_gpu_power_watts", ""].value == 80.0
    assert samples["xeray_gpu_energy_joules_total", ""].value == 81.0
    assert samples["xeray_gpu_temperature_celsius", ""].value == 50.0
    assert samples["xeray_gpu_frequency_hertz", ""].value == 2e9
    assert samples["xeray_gpu_throttled", ""].value == 1.0
    assert samples["xeray_gpu_throttle_reason", "thermal"].value == 1.0


def test_the_exporter_answers_on_loopback_and_ends_when_told(tmp_path: Path) -> None:
    fake_card(tmp_path)
    command = [sys.executable, "-m", "serve_app.cli.main", "exporter", "--port", "0"]
    with subprocess.Popen(
        [*command, "--root", str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read().decode()
        finally:
            process.terminate()
            process.wait(10)
    assert url.startswith("http://127.0.0.1:")
    assert 'intel_gpu_utilization{card="arc-0"' in text


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["exporter", "--port", port, "--root", str(tmp_path)]) == 1
    assert f"127.0.0.1:{port} cannot be used" in capsys.readouterr().err
