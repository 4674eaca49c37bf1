"""What the processor is: name, instruction sets, cores, sockets, NUMA nodes, and cgroup limits.

Everything is read from `/proc` and `/sys` below an injectable root, so a test can lay a tree of any
machine. A file that is missing (a container, another architecture) leaves its field empty.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from serve_app.hardware.affinity import PhysicalCore, physical_cores
from serve_app.hardware.sysfs import read_int, read_text

SYSTEM_ROOT = Path("/")
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True, slots=True)
class NumaNode:
    """A NUMA node, its logical CPUs and its memory in bytes (0: not known)."""

    node_id: int
    cpus: tuple[int, ...]
    memory_bytes: int = 0


@dataclass(frozen=True)
class CpuInfo:
    """The processor as the kernel describes it. `flags` are those of the first logical CPU."""

    model_name: str
    microcode: str
    flags: frozenset[str]
    cores: tuple[PhysicalCore, ...]
    numa_nodes: tuple[NumaNode, ...]

    @property
    def num_physical_cores(self) -> int:
        """Physical cores that are online."""
        return len(self.cores)

    @property
    def num_logical_cpus(self) -> int:
        """Logical CPUs that are online."""
        return sum(len(core.cpu_ids) for core in self.cores)

    @property
    def num_sockets(self) -> int:
        """Processor packages."""
        return len({core.package for core in self.cores})

    @property
    def has_amx(self) -> bool:
        """Whether bfloat16 tiles (AMX-BF16) are there: Sapphire Rapids and later."""
        return {"amx_tile", "amx_bf16"} <= self.flags

    @property
    def has_avx512(self) -> bool:
        """Whether AVX-512 foundation, byte/word and vector-length extensions are all there."""
        return {"avx512f", "avx512bw", "avx512vl"} <= self.flags

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether bfloat16 products run in hardware rather than by conversion."""
        return self.has_amx or "avx512_bf16" in self.flags

    @cached_property
    def isa(self) -> str:
        """The widest instruction set that matrix products can use, for messages."""
        if self.has_amx:
            return "AMX"
        if self.has_avx512:
            return "AVX-512 VNNI" if "avx512_vnni" in self.flags else "AVX-512"
        return "AVX2" if "avx2" in self.flags else "baseline"


def read_cpu_info(root: Path = SYSTEM_ROOT) -> CpuInfo:
    """Read the processor's description below `root`."""
    fields = _first_processor(root / "proc/cpuinfo")
    online = read_text(root / "sys/devices/system/cpu/online")
    cores = physical_cores(root, parse_cpu_list(online) if online else range(os.cpu_count() or 1))
    return CpuInfo(
        model_name=fields.get("model name", "unknown processor"),
        microcode=fields.get("microcode", ""),
        flags=frozenset(fields.get("flags", "").split()),
        cores=cores,
        numa_nodes=_read_numa_nodes(root / "sys/devices/system/node", cores),
    )


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """Limits of this process's control group and its parents; None is no limit.

    `cpus` may be a fraction. `memory_used_bytes` leaves out file pages that can be dropped.
    """

    cpus: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None


def read_cgroup_limits(root: Path = SYSTEM_ROOT) -> CgroupLimits:
    """Return the tightest CPU quota and memory limit on the way up, for cgroup v2 and v1."""
    paths = _cgroup_paths(root)
    mount = root / "sys/fs/cgroup"
    if "" in paths:
        return _limits_v2(mount, paths[""])
    cpu_files = [
        (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
        for folder in _upwards(mount / "cpu", paths.get("cpu", "/"))
    ]
    quotas = [(read_int(quota), read_int(period)) for quota, period in cpu_files]
    cpus = [quota / period for quota, period in quotas if quota and period and quota > 0]
    memory_bytes, used_bytes = _tightest_memory(
        _upwards(mount / "memory", paths.get("memory", "/")),
        limit_name="memory.limit_in_bytes",
        usage_name="memory.usage_in_bytes",
        inactive_key="total_inactive_file",
    )
    return CgroupLimits(min(cpus, default=None), memory_bytes, used_bytes)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Parse the kernel's list form, such as `0-3,8,10-11`."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def _first_processor(path: Path) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in (read_text(path) or "").splitlines():
        if not line.strip():
            if fields:
                break
            continue
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return fields


def _read_numa_nodes(folder: Path, cores: tuple[PhysicalCore, ...]) -> tuple[NumaNode, ...]:
    online = read_text(folder / "online")
    nodes = [
        NumaNode(
            node_id,
            parse_cpu_list(read_text(folder / f"node{node_id}" / "cpulist") or ""),
            _node_memory_bytes(folder / f"node{node_id}" / "meminfo"),
        )
        for node_id in (parse_cpu_list(online) if online else ())
    ]
    everything = tuple(sorted(cpu for core in cores for cpu in core.cpu_ids))
    return tuple(nodes) or (NumaNode(0, everything),)


def _node_memory_bytes(path: Path) -> int:
    for line in (read_text(path) or "").splitlines():
        if "MemTotal:" in line:
            return int(line.split()[-2]) * 1024
    return 0


def _cgroup_paths(root: Path) -> dict[str, str]:
    """Return controller → path of this process; the controller of cgroup v2 is the empty string."""
    paths: dict[str, str] = {}
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            paths[controller] = path
    if "memory" in paths:  # hybrid: v1 controllers rule, the empty one is only systemd's
        paths.pop("", None)
    return paths


def _upwards(mount: Path, path: str) -> list[Path]:
    """Return the folders from `path` up to the mount; in a container the path may not exist."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _limits_v2(mount: Path, path: str) -> CgroupLimits:
    folders = _upwards(mount, path)
    cpus: list[float] = []
    for folder in folders:
        quota, _, period = (read_text(folder / "cpu.max") or "max").strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            cpus.append(int(quota) / int(period))
    memory_bytes, used_bytes = _tightest_memory(
        folders,
        limit_name="memory.max",
        usage_name="memory.current",
        inactive_key="inactive_file",
    )
    return CgroupLimits(min(cpus, default=None), memory_bytes, used_bytes)


def _tightest_memory(
    folders: list[Path], *, limit_name: str, usage_name: str, inactive_key: str
) -> tuple[int | None, int | None]:
    """Return (limit, used) of the folder that leaves the least, or (None, None)."""
    found: list[tuple[int, int, int]] = []
    for folder in folders:
        limit = read_int(folder / limit_name)
        if limit is None or limit >= _UNLIMITED_BYTES:
            continue
        used = max(0, (read_int(folder / usage_name) or 0) - _stat(folder, inactive_key))
        found.append((limit - used, limit, used))
    return min(found)[1:] if found else (None, None)


def _stat(folder: Path, key: str) -> int:
    for line in (read_text(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0
