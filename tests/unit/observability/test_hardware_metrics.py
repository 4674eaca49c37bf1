import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.cli.main import main
from serve_app.hardware.telemetry.memory_traffic import MemoryTraffic
from serve_app.hardware.telemetry.sampler import HardwareSampler
from serve_app.observability.hardware_metrics import HardwareCollector
from tests.fake_host import write, write_host


def test_a_scrape_has_every_level_of_a_card(tmp_path: Path) -> None:
    pci = write_host(tmp_path, temperature_c=50, is_throttled=True)
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


class Traffic(MemoryTraffic):
    """Controllers that moved 3 GB more, read and written, at each look."""

    num_bytes = 0.0

    def read(self) -> Mapping[str, float]:
        self.num_bytes += 1e9
        return {"read": 2 * self.num_bytes, "write": self.num_bytes}


def test_what_memory_and_npu_tell_and_nothing_where_they_tell_nothing(tmp_path: Path) -> None:
    write_host(tmp_path, temperature_c=50, is_throttled=False)

    def scrape(traffic: MemoryTraffic) -> dict[tuple[str, str], float]:
        times = iter((0.0, 2.0))
        registry = CollectorRegistry()
        sampler = HardwareSampler(tmp_path, lambda: next(times), traffic)
        registry.register(HardwareCollector(sampler))
        return {
            (sample.name, sample.labels.get("source") or sample.labels.get("direction", "")):
            sample.value
            for family in text_string_to_metric_families(generate_latest(registry).decode())
            for sample in family.samples
            if "memory_" in sample.name or "npu" in sample.name
        }  # fmt: skip

    bare = scrape(MemoryTraffic(tmp_path))
    assert not [name for name, _ in bare if "bandwidth" in name or "moved" in name or "npu" in name]
    write(tmp_path, "sys/class/accel/accel0/device/npu_current_frequency_mhz", 1400)
    write(tmp_path, "sys/class/accel/accel0/device/npu_memory_utilization", 4096)
    found = scrape(Traffic(tmp_path))
    assert found["memory_bandwidth_bytes", "imc"] == 1.5e9
    assert found["xeray_host_memory_moved_bytes_total", "read"] == 4e9
    assert found["xeray_host_memory_moved_bytes_total", "write"] == 2e9
    assert found["xeray_host_npu_frequency_hertz", ""] == 1.4e9
    assert found["xeray_host_npu_memory_used_bytes", ""] == 4096


def test_the_exporter_answers_on_loopback_and_ends_when_told(tmp_path: Path) -> None:
    write_host(tmp_path, temperature_c=50, is_throttled=True)
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
