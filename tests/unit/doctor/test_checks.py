import ast
import json
import platform
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve_app.cli.main import main
from serve_app.doctor import cpu_checks, gpu_checks, speed_checks, system_checks
from serve_app.doctor.host import CommandOutput, Host
from serve_app.doctor.knowledge import faults
from serve_app.doctor.report import QUICK_CHECKS, exit_code, redact, run_checks, write_bundle
from serve_app.doctor.result import Check, CheckResult, Status, failed, passed

PCI = "sys/bus/pci/devices/0000:03:00.0"


@dataclass(frozen=True)
class FakeHost(Host):
    """A host whose programs, modules and rights are given."""

    outputs: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, Any] = field(default_factory=dict)
    may_open: bool = True

    def run(self, *command: str, timeout_s: float = 1.0) -> CommandOutput | None:
        text = self.outputs.get(" ".join(command))
        return None if text is None else CommandOutput(0, text)

    def module(self, name: str) -> Any:
        return self.modules.get(name)

    def can_open(self, path: Path) -> bool:
        return self.may_open and path.exists()


def host(root: Path, **given: Any) -> FakeHost:
    return FakeHost(root=root, env=given.pop("env", {}), **given)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, object], None]:
    def write_file(name: str, value: object) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")

    return write_file


@pytest.fixture
def card(tmp_path: Path, write) -> Path:
    """An A770 behind its bridge, with a full memory window and an open device node."""
    bridge = tmp_path / "sys/devices/pci0000:00/0000:01:00.0"
    device = bridge / "0000:02:01.0/0000:03:00.0"
    (device / "drm/renderD128").mkdir(parents=True)
    (device / "drm/card0").mkdir()
    (tmp_path / "sys/bus/pci/devices").mkdir(parents=True)
    (tmp_path / PCI).symlink_to(device)
    for name, value in (("vendor", "0x8086"), ("device", "0x56a0"), ("class", "0x030000")):
        write(f"{PCI}/{name}", value)
    write(f"{PCI}/resource", "0 0 0\n0 0 0\n0x4000000000 0x43ffffffff 0x14220c")
    (tmp_path / "sys/bus/pci/drivers/i915").mkdir(parents=True)
    (device / "driver").symlink_to(tmp_path / "sys/bus/pci/drivers/i915")
    (tmp_path / "sys/class/drm/card0").mkdir(parents=True)
    (tmp_path / "sys/class/drm/card0/device").symlink_to(device)
    write("dev/dri/renderD128", "")
    for name, value in (
        ("current_link_width", 16),
        ("max_link_width", 16),
        ("current_link_speed", "16.0 GT/s PCIe"),
    ):
        (bridge / name).write_text(f"{value}\n")
    return bridge


def only(check: Check, machine: Host) -> CheckResult:
    (result,) = check(machine)
    return result


def test_a_sound_card_passes(tmp_path: Path, card: Path) -> None:
    machine = host(
        tmp_path,
        outputs={
            "dpkg-query -W -f=${Version} libze1": "1.28.2",
            "dpkg-query -W -f=${Version} libze-intel-gpu1": "26.05.37020",
        },
    )
    checks = (
        gpu_checks.check_driver,
        gpu_checks.check_device_nodes,
        gpu_checks.check_runtime_packages,
        gpu_checks.check_memory_window,
        gpu_checks.check_link,
        gpu_checks.check_core_dumps,
    )
    results = list(run_checks(machine, checks))
    assert {result.status for result in results} == {Status.PASS}
    assert len(results) == len(checks)


def test_a_card_without_driver_fails(tmp_path: Path, card: Path) -> None:
    (tmp_path / PCI / "driver").unlink()
    result = only(gpu_checks.check_driver, host(tmp_path))
    assert (result.status, result.fault) == (Status.FAIL, "missing-kernel-module")
    assert "0000:03:00.0" in result.evidence


def test_a_node_that_may_not_be_opened_names_the_group(tmp_path: Path, card: Path) -> None:
    result = only(gpu_checks.check_device_nodes, host(tmp_path, may_open=False))
    assert result.status is Status.FAIL
    assert "usermod -aG render" in result.fix


def test_a_missing_node_fails(tmp_path: Path, card: Path) -> None:
    (tmp_path / "dev/dri/renderD128").unlink()
    assert only(gpu_checks.check_device_nodes, host(tmp_path)).status is Status.FAIL


@pytest.mark.parametrize(
    ("resource", "status"),
    [
        ("0x4000000000 0x400fffffff 0x14220c", Status.WARN),  # 256 MiB: Resizable BAR is off
        ("0x0 0x0 0x0", Status.FAIL),  # no address: Above 4G decoding is off
    ],
)
def test_a_small_memory_window_is_told(tmp_path, card, write, resource, status) -> None:
    write(f"{PCI}/resource", f"0 0 0\n0 0 0\n{resource}")
    result = only(gpu_checks.check_memory_window, host(tmp_path))
    assert (result.status, result.fault) == (status, "above-4g-decoding")


def test_the_link_is_read_at_the_bridge(tmp_path: Path, card: Path, write) -> None:
    # The endpoint's own files lie: 2.5 GT/s x1 on every Arc card.
    write(f"{PCI}/current_link_width", 1)
    assert only(gpu_checks.check_link, host(tmp_path)).status is Status.PASS
    (card / "current_link_width").write_text("8\n")
    result = only(gpu_checks.check_link, host(tmp_path))
    assert result.status is Status.WARN
    assert "x8 of x16" in result.evidence


def test_an_old_or_missing_runtime_is_told(tmp_path: Path, card: Path) -> None:
    query = "dpkg-query -W -f=${Version} "
    missing = only(gpu_checks.check_runtime_packages, host(tmp_path))
    assert missing.status is Status.FAIL
    old = {query + "libze1": "1.8.12", query + "intel-level-zero-gpu": "22.43.24595"}
    result = only(gpu_checks.check_runtime_packages, host(tmp_path, outputs=old))
    assert result.status is Status.WARN
    assert "intel-level-zero-gpu 22.43.24595" in result.evidence


def xpu(*, is_available: bool, is_compiled: bool) -> SimpleNamespace:
    module = SimpleNamespace(
        is_available=lambda: is_available,
        _is_compiled=lambda: is_compiled,
        device_count=lambda: 1,
    )
    return SimpleNamespace(xpu=module, __version__="2.13.0+test")


def test_xpu_not_available_names_the_first_cause(tmp_path: Path, card: Path, write) -> None:
    def finding(**given: Any) -> CheckResult:
        build = {"is_available": False, "is_compiled": given.pop("is_compiled", True)}
        return only(
            gpu_checks.check_torch_xpu, host(tmp_path, modules={"torch": xpu(**build)}, **given)
        )

    assert finding(is_compiled=False).fault == "wrong-torch-build"
    assert finding(may_open=False).fault == "render-group"
    assert "ZE_AFFINITY_MASK=3" in finding(env={"ZE_AFFINITY_MASK": "3"}).evidence
    assert finding(env={"LD_LIBRARY_PATH": "/opt/intel/oneapi/lib"}).fault == "sycl-clash"
    assert finding().fault == "xpu-not-available"
    write("sys/class/devcoredump/devcd1/data", "")
    assert finding().fault == "engine-reset"
    assert only(gpu_checks.check_core_dumps, host(tmp_path)).status is Status.FAIL


def test_a_seen_xpu_passes(tmp_path: Path, card: Path) -> None:
    modules = {"torch": xpu(is_available=True, is_compiled=True)}
    assert only(gpu_checks.check_torch_xpu, host(tmp_path, modules=modules)).status is Status.PASS


@pytest.mark.parametrize(("governor", "status"), [("performance", "PASS"), ("powersave", "WARN")])
def test_the_governor(tmp_path: Path, write, governor: str, status: str) -> None:
    write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", governor)
    assert only(cpu_checks.check_governor, host(tmp_path)).status == status


def test_openmp_variables_of_the_shell_are_told(tmp_path: Path) -> None:
    result = only(cpu_checks.check_placement, host(tmp_path, env={"OMP_NUM_THREADS": "1"}))
    assert result.status is Status.WARN
    assert "unset OMP_NUM_THREADS" in result.fix


def test_an_empty_memory_channel_is_told(tmp_path: Path, write) -> None:
    for number, size in enumerate((32768, 0)):
        folder = f"sys/devices/system/edac/mc/mc0/dimm{number}"
        write(f"{folder}/dimm_location", f"channel {number} slot 0")
        write(f"{folder}/size", size)
    result = only(cpu_checks.check_memory_channels, host(tmp_path))
    assert result.status is Status.WARN
    assert "mc0 channel 1" in result.evidence
    dmidecode = {"dmidecode -t 17": "\tConfigured Memory Speed: 4800 MT/s\n"}
    assert cpu_checks.expected_bandwidth(host(tmp_path, outputs=dmidecode)) == 38.4e9


@pytest.mark.parametrize(("ce", "ue", "status"), [(0, 0, "PASS"), (3, 0, "WARN"), (3, 1, "FAIL")])
def test_memory_errors(tmp_path: Path, write, ce: int, ue: int, status: str) -> None:
    write("sys/devices/system/edac/mc/mc0/ce_count", ce)
    write("sys/devices/system/edac/mc/mc0/ue_count", ue)
    assert only(cpu_checks.check_memory_errors, host(tmp_path)).status == status


@pytest.mark.parametrize(
    ("chosen", "status"), [("always [madvise] never", "PASS"), ("always madvise [never]", "WARN")]
)
def test_huge_pages(tmp_path: Path, write, chosen: str, status: str) -> None:
    write("sys/kernel/mm/transparent_hugepage/enabled", chosen)
    assert only(cpu_checks.check_huge_pages, host(tmp_path)).status == status


@pytest.mark.parametrize(
    ("share", "status"), [("0.00", "PASS"), ("49.90", "PASS"), ("87.25", "WARN"), (None, "SKIP")]
)
def test_other_programs_on_the_processor(
    tmp_path: Path, write, share: str | None, status: str
) -> None:
    if share is not None:
        lines = [
            f"some avg10=3.00 avg60={share} avg300=1.00 total=7",
            "full avg10=0.00 avg60=99.00",
        ]
        write("proc/pressure/cpu", "\n".join(lines))
    result = only(cpu_checks.check_pressure, host(tmp_path))
    assert result.status == status
    assert ("87 % of the last minute" in result.evidence) == (status == "WARN")


@pytest.mark.parametrize(("answer", "status"), [("yes", "PASS"), ("no", "WARN"), (None, "SKIP")])
def test_the_clock(tmp_path: Path, answer: str | None, status: str) -> None:
    command = "timedatectl show -p NTPSynchronized --value"
    outputs = {} if answer is None else {command: answer}
    assert only(system_checks.check_clock, host(tmp_path, outputs=outputs)).status == status


@pytest.mark.parametrize(("declared", "status"), [(1, "PASS"), (2, "FAIL"), (0, "WARN")])
def test_resources_that_ray_declares(tmp_path, card, write, declared: int, status: str) -> None:
    write("tmp/ray/ray_current_cluster", "127.0.0.1:6379")
    nodes = [{"name": platform.node(), "resources": {"arc_gpu": declared}}]
    query = f"{sys.executable} -c {system_checks._RAY_QUERY}"
    machine = host(tmp_path, outputs={query: f"log\nxeray-nodes {json.dumps(nodes)}\n"})
    assert only(system_checks.check_ray_resources, machine).status == status


def test_a_device_whose_product_is_wrong_fails(tmp_path: Path) -> None:
    class Broken:
        """torch, but for a card whose results are zero."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        cpu = SimpleNamespace(synchronize=lambda: None)

    sound = speed_checks._check_product(Broken(), "cpu:0", "product", "a card")
    assert sound.status is Status.PASS
    lossy = Broken()
    lossy.randn = lambda *shape, generator: torch.full(shape, float("nan"))
    assert speed_checks._check_product(lossy, "cpu:0", "product", "a card").status is Status.FAIL


def test_slow_memory_is_told(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_checks, "_COPY_BYTES", 1 << 20)
    machine = host(tmp_path, modules={"torch": torch})
    assert only(speed_checks.check_memory_bandwidth, machine).status is Status.PASS
    write("sys/devices/system/edac/mc/mc0/dimm0/dimm_location", "channel 0 slot 0")
    write("sys/devices/system/edac/mc/mc0/dimm0/size", 1)
    rate = {"dmidecode -t 17": "Configured Memory Speed: 999999999 MT/s"}
    result = only(
        speed_checks.check_memory_bandwidth,
        host(tmp_path, modules={"torch": torch}, outputs=rate),
    )
    assert (result.status, result.fault) == (Status.WARN, "memory-channels")


def test_an_empty_machine_breaks_no_check(tmp_path: Path) -> None:
    results = list(run_checks(host(tmp_path), QUICK_CHECKS))
    assert len(results) >= len(QUICK_CHECKS) - 5  # device checks say nothing without devices
    assert not [result for result in results if "itself failed" in result.evidence]


def test_a_check_that_breaks_is_told_and_the_rest_runs(tmp_path: Path) -> None:
    def check_strange_thing(machine: Host):
        raise ValueError("odd")
        yield

    def check_next(machine: Host):
        yield passed("next", "fine")

    first, second = run_checks(host(tmp_path), (check_strange_thing, check_next))
    assert (first.name, first.status) == ("strange thing", Status.SKIP)
    assert "odd" in first.evidence
    assert second.status is Status.PASS


def test_only_a_fail_makes_the_exit_code() -> None:
    assert exit_code([passed("a", "")]) == 0
    assert exit_code([passed("a", ""), failed("b", "", "")]) == 1


def test_every_fault_that_a_check_names_is_known() -> None:
    named = {
        call.args[3].value
        for module in (cpu_checks, gpu_checks, speed_checks, system_checks)
        for call in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("warned", "failed")
        if len(call.args) == 4 and isinstance(call.args[3], ast.Constant)
    }
    assert len(named) > 5
    assert named <= {fault.id for fault in faults()}


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        ("abc123", "XERAY_API_KEY=abc123"),
        ("s3cret", "password: s3cret"),
        ("tok-9", "Authorization: Bearer tok-9"),
        ("sk-abcdefgh123", "used sk-abcdefgh123 here"),
        ("00:11:22:aa:bb:cc", "eth0 00:11:22:aa:bb:cc"),
        ("alice", "/home/alice/models"),
        ("PF123", "Serial Number: PF123"),
    ],
)
def test_secrets_do_not_reach_the_bundle(tmp_path: Path, write, secret: str, text: str) -> None:
    write("proc/cmdline", text)
    path = tmp_path / "bundle.tar.gz"
    write_bundle(path, host(tmp_path, outputs={"dmesg --ctime": text}), [])
    with tarfile.open(path) as archive:
        texts = [archive.extractfile(m).read().decode() for m in archive.getmembers()]
    assert len(texts) == 3
    assert not any(secret in content for content in texts)
    assert redact("12 cores, 3 tokens per second") == "12 cores, 3 tokens per second"


def test_the_command_prints_json_and_writes_a_bundle(tmp_path: Path, capsys) -> None:
    bundle = tmp_path / "b.tar.gz"
    code = main(["doctor", "--quick", "--json", "--bundle", str(bundle)])
    rows = json.loads(capsys.readouterr().out)
    assert {"name", "status", "evidence", "fix", "fault"} == set(rows[0])
    assert code == int(any(row["status"] == "FAIL" for row in rows))
    assert bundle.stat().st_size > 0


def test_a_bundle_that_cannot_be_written_is_one_line(tmp_path: Path, capsys) -> None:
    assert main(["doctor", "--quick", "--bundle", str(tmp_path / "no" / "b.tar.gz")]) == 1
    assert "--bundle" in capsys.readouterr().err
