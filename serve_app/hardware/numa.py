"""NUMA placement without libnuma: cores of one node together, and memory beside them.

A thread that reads another socket's memory gets a fraction of the bandwidth, and decoding is bound
by it. `set_mempolicy(2)` rules pages that are first touched from then on, so it comes before the
weights are read.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable, Sequence

from serve_app.hardware.affinity import PhysicalCore
from serve_app.hardware.cpu import NumaNode

_SYSCALL = {"x86_64": 238, "aarch64": 237}
MPOL_PREFERRED = 1
MPOL_INTERLEAVE = 3
_MASK_BITS = 1024

SetPolicy = Callable[[int, int], bool]
"""Told (mode, mask of nodes); whether the kernel took it."""


def cores_by_node(
    cores: Sequence[PhysicalCore], nodes: Sequence[NumaNode], count: int
) -> list[int]:
    """Positions in `cores`, best first, for a claim of `count` that shall lie on one node.

    Nodes with at least `count` cores come first, the smallest such first, so that the larger one
    stays whole; among equals the last. Within a node the last core is first: preprocessors start
    from the other end.
    """
    groups = [_positions(cores, node) for node in nodes]
    groups = [group for group in groups if group]
    order = sorted(
        range(len(groups)),
        key=lambda i: (len(groups[i]) < count, _size_key(len(groups[i]), count), -i),
    )
    placed = [position for i in order for position in reversed(groups[i])]
    rest = [i for i in range(len(cores) - 1, -1, -1) if i not in set(placed)]
    return placed + rest


def _size_key(size: int, count: int) -> int:
    return size if size >= count else -size


def _positions(cores: Sequence[PhysicalCore], node: NumaNode) -> list[int]:
    members = set(node.cpus)
    return [i for i, core in enumerate(cores) if core.cpu_ids and core.cpu_ids[0] in members]


def nodes_of(cpu_ids: Iterable[int], nodes: Sequence[NumaNode]) -> tuple[int, ...]:
    """Ids of the nodes that these CPUs belong to, ascending."""
    wanted = set(cpu_ids)
    return tuple(sorted(node.node_id for node in nodes if wanted & set(node.cpus)))


def place_memory(
    cpu_ids: Iterable[int], nodes: Sequence[NumaNode], set_policy: SetPolicy | None = None
) -> str:
    """Let this process's new pages lie where its threads run; returns what was done, for the log.

    Threads on one node: its memory is preferred, and another's taken when it is full. Threads on
    several: pages alternate over those, whose bandwidths add up. Nothing where there is one node,
    or where the kernel refuses (containers often forbid the call): first touch by pinned threads
    then does most of it.
    """
    ids = nodes_of(cpu_ids, nodes)
    if len(nodes) < 2 or not ids:
        return ""
    mode = MPOL_PREFERRED if len(ids) == 1 else MPOL_INTERLEAVE
    mask = sum(1 << node_id for node_id in ids)
    if not (set_policy or set_mempolicy)(mode, mask):
        return "memory by first touch: the kernel refused set_mempolicy"
    names = ", ".join(map(str, ids))
    return f"memory on node {names}" if len(ids) == 1 else f"memory interleaved over nodes {names}"


def set_mempolicy(mode: int, mask: int) -> bool:
    """Call set_mempolicy(2); False where this system has none or forbids it."""
    number = _SYSCALL.get(platform.machine())
    if number is None or not 0 <= mask < 1 << _MASK_BITS:
        return False
    words = (ctypes.c_uint64 * (_MASK_BITS // 64))(
        *(mask >> shift & (1 << 64) - 1 for shift in range(0, _MASK_BITS, 64))
    )
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        # The kernel reads one bit less than it is told.
        return bool(libc.syscall(number, mode, ctypes.byref(words), _MASK_BITS + 1) == 0)
    except (OSError, AttributeError):
        return False
