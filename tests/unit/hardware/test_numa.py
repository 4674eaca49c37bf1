from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from serve_app.hardware.affinity import PhysicalCore
from serve_app.hardware.cpu import NumaNode
from serve_app.hardware.numa import (
    MPOL_INTERLEAVE,
    MPOL_PREFERRED,
    cores_by_node,
    nodes_of,
    place_memory,
)


def machine(*sizes: int) -> tuple[list[PhysicalCore], list[NumaNode]]:
    """Nodes of so many cores, one hardware thread each."""
    cores, nodes = [], []
    for node_id, size in enumerate(sizes):
        first = len(cores)
        cores += [PhysicalCore(node_id, i, (first + i,)) for i in range(size)]
        nodes.append(NumaNode(node_id, tuple(range(first, first + size))))
    return cores, nodes


def test_a_claim_lies_on_one_node_and_leaves_the_larger_one_whole() -> None:
    cores, nodes = machine(8, 4, 8)
    assert cores_by_node(cores, nodes, 4)[:4] == [11, 10, 9, 8]
    assert cores_by_node(cores, nodes, 8)[:8] == list(range(19, 11, -1))


def test_where_no_node_is_large_enough_the_largest_come_first() -> None:
    cores, nodes = machine(2, 4)
    assert cores_by_node(cores, nodes, 5) == [5, 4, 3, 2, 1, 0]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 8))
def test_every_core_is_offered_once(sizes: list[int], count: int) -> None:
    cores, nodes = machine(*sizes)
    order = cores_by_node(cores, nodes, count)
    assert sorted(order) == list(range(len(cores)))
    if any(size >= count for size in sizes):
        cpus = [cores[i].cpu_ids[0] for i in order[:count]]
        assert len(nodes_of(cpus, nodes)) == 1


def test_cores_outside_every_node_come_last() -> None:
    cores, nodes = machine(2, 2)
    assert cores_by_node(cores, nodes[:1], 2) == [1, 0, 3, 2]


class Kernel:
    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.calls: list[tuple[int, int]] = []

    def __call__(self, mode: int, mask: int) -> bool:
        self.calls.append((mode, mask))
        return self.answer


def test_memory_follows_the_threads() -> None:
    _, nodes = machine(4, 4, 4)
    kernel = Kernel(True)
    assert place_memory([4, 5], nodes, kernel) == "memory on node 1"
    assert place_memory([0, 9], nodes, kernel) == "memory interleaved over nodes 0, 2"
    assert kernel.calls == [(MPOL_PREFERRED, 0b010), (MPOL_INTERLEAVE, 0b101)]


def test_one_node_needs_no_policy_and_a_refusal_is_said() -> None:
    kernel = Kernel(False)
    assert place_memory([0], machine(4)[1], kernel) == ""
    assert kernel.calls == []
    assert "first touch" in place_memory([0], machine(4, 4)[1], kernel)


def test_the_real_call_takes_effect_or_is_refused() -> None:
    program = (
        "from serve_app.hardware.numa import set_mempolicy\n"
        "took = set_mempolicy(1, 1)\n"
        "line = open('/proc/self/numa_maps').readline() if took else 'refused'\n"
        "print(took, line)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    took, _, line = done.stdout.partition(" ")
    assert (took, "refused" in line) in (("True", False), ("False", True))
    if took == "True":
        assert "prefer" in line
