import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.core.errors import ConfigError
from serve_app.hardware.affinity import claim_cores, num_usable_cores, physical_cores, pin_process


def lay_topology(root: Path, siblings: dict[int, tuple[int, int]]) -> None:
    """cpu id → (package, core)."""
    for cpu_id, (package, core) in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu_id}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """Two packages of two cores with two threads each; core ids repeat across packages."""
    cores = [(package, core) for package in (0, 1) for core in (0, 1)]
    lay_topology(tmp_path, dict(enumerate(cores * 2)))
    return tmp_path


def test_threads_of_a_core_belong_together(two_sockets: Path) -> None:
    cores = physical_cores(two_sockets, allowed=range(8))

    assert [core.cpu_ids for core in cores] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [core.name for core in cores] == ["0.0", "0.1", "1.0", "1.1"]


def test_only_what_the_process_may_use_counts(two_sockets: Path) -> None:
    cores = physical_cores(two_sockets, allowed={1, 5, 7})

    assert [(core.name, core.cpu_ids) for core in cores] == [("0.1", (1, 5)), ("1.1", (7,))]


def test_without_topology_every_cpu_is_a_core(tmp_path: Path) -> None:
    assert [core.cpu_ids for core in physical_cores(tmp_path, allowed={0, 3})] == [(0,), (3,)]


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [("max 100000", 4), ("200000 100000", 2), ("50000 100000", 1), (None, 4)],
)
def test_the_quota_of_the_cgroup_counts(
    two_sockets: Path, cpu_max: str | None, expected: int
) -> None:
    if cpu_max is not None:
        (two_sockets / "sys/fs/cgroup").mkdir(parents=True)
        (two_sockets / "sys/fs/cgroup/cpu.max").write_text(cpu_max + "\n")

    assert num_usable_cores(two_sockets, allowed=range(8)) == expected


def test_claims_are_disjoint_and_prefer_what_was_assigned(
    two_sockets: Path, tmp_path: Path
) -> None:
    cores = physical_cores(two_sockets, allowed=range(8))
    locks = tmp_path / "locks"
    locks.mkdir()

    first = claim_cores(2, role="p", cores=cores, preferred=[2], folder=locks)
    second = claim_cores(2, role="p", cores=cores, preferred=[2], folder=locks)

    assert first.cpu_ids == (0, 2, 4, 6)
    assert second.cpu_ids == (1, 3, 5, 7)
    with pytest.raises(ConfigError, match=r"p: 1 cores asked for, but other replicas"):
        claim_cores(1, role="p", cores=cores, timeout_s=0.0, folder=locks)
    other_role = claim_cores(4, role="engine", cores=cores, folder=locks)
    assert len(other_role.cores) == 4
    first.release()
    again = claim_cores(1, role="p", cores=cores, folder=locks)
    assert again.cpu_ids == (0, 4)
    for claim in (second, other_role, again):
        claim.release()


def test_more_cores_than_there_are_is_refused(two_sockets: Path, tmp_path: Path) -> None:
    cores = physical_cores(two_sockets, allowed=range(8))

    with pytest.raises(ConfigError, match="5 cores asked for, but this process may use 4"):
        claim_cores(5, role="p", cores=cores, folder=tmp_path)


def test_pinning_holds_for_threads_that_are_there_and_those_that_come() -> None:
    cpu_id = min(os.sched_getaffinity(0))
    script = """
import os, sys, threading
from serve_app.hardware.affinity import pin_process
seen, go, done = [], threading.Event(), threading.Event()
def early():
    go.wait(); seen.append(os.sched_getaffinity(0)); done.set()
threading.Thread(target=early).start()
pin_process([int(sys.argv[1])])
go.set(); done.wait()
late = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
late.start(); late.join()
print(seen == [{int(sys.argv[1])}] * 2)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(cpu_id)], capture_output=True, text=True, check=True
    )

    assert result.stdout.strip() == "True"


def test_pinning_to_nothing_is_a_bug() -> None:
    with pytest.raises(ValueError, match="at least one"):
        pin_process([])
