"""CPU cores: which physical ones this process may use, claims on some of them, and pinning.

A claim is a lock per core and role in the host's lock folder, so that two replicas on one host, in
whatever container or Ray session, never pin themselves to the same core.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.core.errors import ConfigError
from serve_app.hardware.card_lock import CardLock, acquire_free, lock_dir, release_all

_CPU_MAX = Path("sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class PhysicalCore:
    """A core and those of its hardware threads (`cpu_ids`, ascending) that this process may use."""

    package: int
    core_id: int
    cpu_ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the core on this host; the same in every process, whatever it may use."""
        return f"{self.package}.{self.core_id}"


@dataclass(frozen=True, slots=True)
class CoreClaim:
    """Cores that this process holds; they are free again when it releases them or dies."""

    cores: tuple[PhysicalCore, ...]
    locks: tuple[CardLock, ...]

    @property
    def cpu_ids(self) -> tuple[int, ...]:
        """The claimed cores' hardware threads, ascending."""
        return tuple(sorted(cpu_id for core in self.cores for cpu_id in core.cpu_ids))

    def release(self) -> None:
        """Give the cores back."""
        release_all(self.locks)


def physical_cores(
    root: Path = Path("/"), allowed: Iterable[int] | None = None
) -> tuple[PhysicalCore, ...]:
    """Return the physical cores among the `allowed` cpu ids (default: this process's)."""
    ids = sorted(os.sched_getaffinity(0) if allowed is None else set(allowed))
    groups: dict[tuple[int, int], list[int]] = {}
    for cpu_id in ids:
        topology = root / f"sys/devices/system/cpu/cpu{cpu_id}/topology"
        package = _read_int(topology / "physical_package_id", 0)
        groups.setdefault((package, _read_int(topology / "core_id", cpu_id)), []).append(cpu_id)
    return tuple(PhysicalCore(*key, tuple(cpus)) for key, cpus in groups.items())


def num_usable_cores(root: Path = Path("/"), allowed: Iterable[int] | None = None) -> int:
    """Return how many cores this process can keep busy: its affinity, cut by its quota."""
    cores = len(physical_cores(root, allowed))
    return max(1, min(cores, _cpu_quota(root)))


def claim_cores(
    count: int,
    *,
    role: str,
    cores: Sequence[PhysicalCore] | None = None,
    preferred: Sequence[int] = (),
    timeout_s: float = 10.0,
    folder: Path | None = None,
) -> CoreClaim:
    """Claim `count` cores that no other process of `role` holds, `preferred` positions first.

    Raises ConfigError where this process has fewer cores, or too few come free within `timeout_s`.
    """
    cores = physical_cores() if cores is None else cores
    if count > len(cores):
        raise ConfigError(
            f"{role}: {count} cores asked for, but this process may use {len(cores)};"
            " lower the number in the config or widen the CPU set"
        )
    wanted = [cores[i] for i in preferred if 0 <= i < len(cores)]
    order = list(dict.fromkeys([*wanted, *cores]))
    by_lock = {_lock_name(role, core): core for core in order}
    try:
        locks = acquire_free(list(by_lock), count, timeout_s, folder or lock_dir())
    except ConfigError as error:
        raise ConfigError(
            f"{role}: {count} cores asked for, but other replicas on this host hold the rest"
            f" ({len(cores)} usable in all); lower the number of replicas or of their cores"
        ) from error
    return CoreClaim(tuple(by_lock[lock.name] for lock in locks), tuple(locks))


def core_holders(
    role: str, cores: Sequence[PhysicalCore] | None = None, folder: Path | None = None
) -> dict[str, str]:
    """Return name → holder, as `pid 12 (name)`, of the cores that a process of `role` holds now.

    Each lock is tried for a moment, so a claim that runs meanwhile may have to try again.
    """
    folder = folder or lock_dir()
    held: dict[str, str] = {}
    for core in physical_cores() if cores is None else cores:
        lock = CardLock(_lock_name(role, core), folder)
        if lock.try_acquire(notes_holder=False):
            lock.release()
        else:
            held[core.name] = lock.holder() or "another process"
    return held


def _lock_name(role: str, core: PhysicalCore) -> str:
    return f"core-{role}-{core.name}"


def pin_process(cpu_ids: Iterable[int]) -> None:
    """Let every thread of this process run on `cpu_ids` only; threads started later inherit it."""
    mask = set(cpu_ids)
    if not mask:
        raise ValueError("pin_process needs at least one cpu id")
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), mask)
        except ProcessLookupError:
            continue  # the thread ended meanwhile


def _read_int(path: Path, default: int) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return default


def _cpu_quota(root: Path) -> int:
    """Return the cgroup's CPU quota in whole cores (≥ 1); a very large number without one."""
    try:
        quota, period = (root / _CPU_MAX).read_text().split()
        return max(1, math.floor(int(quota) / int(period)))
    except (OSError, ValueError):
        return 1 << 20  # "max", or no cgroup v2 here
