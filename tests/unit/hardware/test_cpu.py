from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.hardware.cpu import parse_cpu_list, read_cgroup_limits, read_cpu_info

XEON_W_FLAGS = (
    "fpu avx2 avx512f avx512bw avx512vl avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8"
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def xeon_tree(root: Path, flags: str = XEON_W_FLAGS) -> Path:
    """Two sockets of two cores with two threads each; one NUMA node per socket."""
    files = {
        "proc/cpuinfo": f"processor\t: 0\nmodel name\t: Intel(R) Xeon(R) w7-3465X\n"
        f"microcode\t: 0x2b0005c0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: fpu\n",
        "sys/devices/system/cpu/online": "0-7\n",
        "sys/devices/system/node/online": "0-1\n",
        "sys/devices/system/node/node0/cpulist": "0-1,4-5\n",
        "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:  1048576 kB\n",
        "sys/devices/system/node/node1/cpulist": "2-3,6-7\n",
    }
    for cpu in range(8):
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files[f"{topology}/physical_package_id"] = f"{cpu % 4 // 2}\n"
        files[f"{topology}/core_id"] = f"{cpu % 2}\n"
    return write(root, files)


def test_cores_sockets_and_threads(tmp_path: Path) -> None:
    info = read_cpu_info(xeon_tree(tmp_path))

    assert info.model_name == "Intel(R) Xeon(R) w7-3465X"
    assert info.microcode == "0x2b0005c0"
    assert (info.num_sockets, info.num_physical_cores, info.num_logical_cpus) == (2, 4, 8)
    assert info.cores[0].cpu_ids == (0, 4)


def test_numa_nodes(tmp_path: Path) -> None:
    first, second = read_cpu_info(xeon_tree(tmp_path)).numa_nodes

    assert first.cpus == (0, 1, 4, 5)
    assert first.memory_bytes == 1 << 30
    assert second.cpus == (2, 3, 6, 7)


@pytest.mark.parametrize(
    ("flags", "isa", "has_fast_bfloat16"),
    [
        (XEON_W_FLAGS, "AMX", True),
        ("avx2 avx512f avx512bw avx512vl avx512_vnni", "AVX-512 VNNI", False),
        ("avx2 avx512f avx512bw avx512vl avx512_bf16", "AVX-512", True),
        ("avx2 avx512f", "AVX2", False),
        ("sse4_2", "baseline", False),
    ],
)
def test_instruction_sets(tmp_path: Path, flags: str, isa: str, has_fast_bfloat16: bool) -> None:
    info = read_cpu_info(xeon_tree(tmp_path, flags))

    assert info.isa == isa
    assert info.has_fast_bfloat16 is has_fast_bfloat16
    assert info.has_amx is (isa == "AMX")


def test_a_machine_that_tells_nothing_still_has_a_core(tmp_path: Path) -> None:
    info = read_cpu_info(tmp_path)

    assert info.model_name == "unknown processor"
    assert info.num_physical_cores >= 1
    assert len(info.numa_nodes) == 1


def test_this_machine_agrees_with_the_kernel() -> None:
    info = read_cpu_info()

    assert info.num_sockets >= 1
    assert info.num_logical_cpus >= info.num_physical_cores >= 1
    assert {cpu for node in info.numa_nodes for cpu in node.cpus} == {
        cpu for core in info.cores for cpu in core.cpu_ids
    }


def test_cgroup_v2_takes_the_tightest_of_the_way_up(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/system.slice"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/xeray.service\n",
            f"{base}/xeray.service/cpu.max": "max 100000\n",
            f"{base}/xeray.service/memory.max": "max\n",
            f"{base}/cpu.max": "350000 100000\n",
            f"{base}/memory.max": "8589934592\n",
            f"{base}/memory.current": "3221225472\n",
            f"{base}/memory.stat": "anon 5\ninactive_file 1073741824\n",
        },
    )

    limits = read_cgroup_limits(tmp_path)

    assert limits.cpus == 3.5
    assert limits.memory_bytes == 8 << 30
    assert limits.memory_used_bytes == 2 << 30


def test_cgroup_v1(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/init\n",
            # Inside a container the named path is not there; the mount itself holds the limits.
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "4294967296\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1073741824\n",
        },
    )

    limits = read_cgroup_limits(tmp_path)

    assert (limits.cpus, limits.memory_bytes, limits.memory_used_bytes) == (2.0, 4 << 30, 1 << 30)


def test_no_cgroup_is_no_limit(tmp_path: Path) -> None:
    limits = read_cgroup_limits(tmp_path)

    assert (limits.cpus, limits.memory_bytes) == (None, None)


def test_cgroup_v1_writes_a_huge_number_for_no_limit(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )

    assert read_cgroup_limits(tmp_path).memory_bytes is None


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8,10-11\n", (0, 1, 2, 3, 8, 10, 11)), ("5", (5,)), ("\n", ())]
)
def test_cpu_lists(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus
