from pathlib import Path

import pytest

from serve_app.hardware.cards import list_cards
from serve_app.hardware.telemetry.cpu import read_host
from serve_app.hardware.telemetry.fdinfo import parse_fdinfo, read_clients
from serve_app.hardware.telemetry.gpu import read_gpu


def test_a_card_under_xe_tells_energy_limits_clocks_and_throttling(fake_root: Path) -> None:
    card = list_cards(fake_root, env={}).discrete[1]
    reading = read_gpu(card, fake_root)
    assert card.driver == "xe"
    assert (reading.energy_j, reading.power_limit_w) == (7.0, 190.0)
    assert reading.temperatures_c == {"pkg": 61.0, "vram": 70.5}
    assert reading.fans_rpm == {"fan1": 1234}
    (gt,) = reading.gts
    assert (gt.name, gt.actual_mhz, gt.requested_mhz, gt.max_mhz) == ("tile0/gt0", 2400, 2850, 2850)
    assert (gt.idle_ms, gt.throttle) == (10_000, ("pl1",))


def test_a_card_under_i915_reads_old_and_new_names(fake_root: Path) -> None:
    card = list_cards(fake_root, env={}).discrete[0]
    reading = read_gpu(card, fake_root)
    assert card.driver == "i915"
    # The tile's own hwmon, which comes first, is not the card's.
    assert reading.energy_j == 3.0
    assert reading.power_limit_w is None  # 0: the limit is off
    assert reading.rated_power_w == 225.0
    (gt,) = reading.gts
    assert (gt.actual_mhz, gt.max_mhz, gt.requested_mhz) == (0, 2400, None)
    assert (gt.idle_ms, gt.throttle) == (500, ("thermal",))


def test_a_gpu_without_sensors_has_none(fake_root: Path) -> None:
    (integrated,) = list_cards(fake_root, env={}).integrated
    reading = read_gpu(integrated, fake_root)
    assert reading.energy_j is None
    assert reading.gts == ()


def test_the_host_reads_ticks_memory_energy_and_npu(fake_root: Path) -> None:
    host = read_host(fake_root)
    assert (host.busy_ticks, host.total_ticks) == (150, 1000)  # guest time is not counted twice
    assert (host.memory_total_bytes, host.memory_available_bytes) == (1_024_000, 409_600)
    assert host.energy_j == {"package-0": 5.0}  # not the parts of a package
    assert host.npu_busy_us == 1000


def test_an_empty_tree_is_a_host_without_readings(tmp_path: Path) -> None:
    assert read_host(tmp_path).total_ticks == 0
    assert read_clients(tmp_path) == {}


def test_xe_fdinfo_counts_cycles_and_its_vram() -> None:
    client = parse_fdinfo(
        "pos:\t0\ndrm-driver:\txe\ndrm-client-id:\t3\ndrm-pdev:\t0000:83:00.0\n"
        "drm-resident-vram0:\t2 MiB\ndrm-resident-gtt:\t64 KiB\n"
        "drm-cycles-ccs:\t500\ndrm-total-cycles-ccs:\t1000\ndrm-engine-capacity-ccs:\t4\n"
        "drm-cycles-rcs:\t10\ndrm-total-cycles-rcs:\t1000\n",
        pid=7,
    )
    assert client is not None
    assert client.resident_bytes == 2 << 20
    assert set(client.engines) == {"compute", "render"}
    compute = client.engines["compute"]
    assert (compute.busy, compute.total, compute.capacity) == (500, 1000, 4)


def test_i915_fdinfo_counts_nanoseconds() -> None:
    client = parse_fdinfo(
        "drm-driver: i915\ndrm-client-id: 9\ndrm-pdev: 0000:03:00.0\n"
        "drm-engine-render: 123456 ns\ndrm-engine-capacity-video: 2\ndrm-engine-video: 8 ns\n"
        "drm-resident-system0: 4096\n",
        pid=1,
    )
    assert client is not None
    assert client.engines["render"].busy == 123456
    assert client.engines["render"].total is None
    assert client.engines["video"].capacity == 2
    assert client.resident_bytes == 4096  # no memory of its own: its share of RAM


@pytest.mark.parametrize(
    "text", ["", "drm-driver: amdgpu\ndrm-client-id: 1\n", "drm-driver: xe\n", "nonsense"]
)
def test_other_files_are_no_clients(text: str) -> None:
    assert parse_fdinfo(text, pid=1) is None


def test_one_client_seen_through_two_descriptors_counts_once(fake_root: Path, add_client) -> None:
    text = "drm-driver: xe\ndrm-client-id: 3\ndrm-pdev: 0000:83:00.0\ndrm-resident-vram0: 5\n"
    add_client(10, "3", text)
    add_client(10, "4", text)
    add_client(11, "3", text.replace("client-id: 3", "client-id: 4"))
    assert len(read_clients(fake_root)) == 2
