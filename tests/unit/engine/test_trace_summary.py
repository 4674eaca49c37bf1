from __future__ import annotations

import pytest

from serve_app.engine.trace_summary import (
    OUTSIDE,
    STEP,
    operator_seconds,
    summarise,
    without_idle_steps,
)


def event(name, cat, ts, dur, tid=1, **args):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid, "args": args}


CARD = [
    event(STEP, "user_annotation", 0, 100),
    event(STEP, "user_annotation", 100, 100),
    {"ph": "f", "name": "flow"},
    event("aten::mm", "cpu_op", 5, 20),
    event("cudaLaunchKernel", "cuda_runtime", 6, 2),
    event("cudaGraphLaunch", "cuda_runtime", 110, 2),
    event("cudaEventSynchronize", "cuda_runtime", 150, 40),
    event("gemm", "kernel", 10, 40, tid=7),
    event("gemm", "kernel", 40, 20, tid=8),  # beside the first: together they cover 10 to 60
    event("norm", "kernel", 120, 30, tid=7),
    event("Memcpy DtoH", "gpu_memcpy", 160, 10, tid=7, bytes=4096),
]


def test_a_card_s_trace_by_kernels():
    summary = summarise(CARD)
    assert summary["num_steps"] == 2
    assert summary["step_s"] == pytest.approx(100e-6)
    assert [(o["name"], o["calls"]) for o in summary["operators"]] == [
        ("gemm", 2), ("norm", 1), ("Memcpy DtoH", 1)
    ]  # fmt: skip
    assert summary["operators"][0]["share"] == pytest.approx(60 / 200)
    assert summary["copied_bytes"] == 2048
    assert summary["kernel_launches"] == 1
    assert summary["synchronisations"] == 0.5
    # Nothing ran from 0 to 10, 60 to 120, 150 to 160 and 170 to 200.
    assert summary["idle_s"] == pytest.approx(110e-6 / 2)
    assert summary["idle_share"] == pytest.approx(110 / 200)
    assert operator_seconds(summary)["gemm"] == pytest.approx(60e-6)


def test_a_cpu_s_trace_by_own_time_and_by_what_copies_write():
    dims = {"Input Dims": [[3, 4], [3, 4]], "Input type": ["float", "float"]}
    summary = summarise(
        [
            event(STEP, "user_annotation", 0, 100),
            event("aten::linear", "cpu_op", 10, 50),
            event("aten::mm", "cpu_op", 15, 40),
            event("aten::copy_", "cpu_op", 70, 10, **dims),
            event("aten::mm", "cpu_op", 12, 30, tid=2),  # another thread's is nobody's child
        ]
    )
    own = {each["name"]: each["seconds"] for each in summary["operators"]}
    assert own == pytest.approx(
        {"aten::mm": 70e-6, "aten::linear": 10e-6, "aten::copy_": 10e-6, OUTSIDE: 40e-6}
    )
    assert summary["copied_bytes"] == 3 * 4 * 4
    assert summary["operator_calls"] == 4
    assert (summary["idle_s"], summary["idle_share"]) == (None, None)


def test_a_trace_without_steps_is_no_division_by_zero():
    summary = summarise([])
    assert (summary["num_steps"], summary["operators"], summary["copied_bytes"]) == (0, [], 0)


def test_what_the_program_marked_is_an_operator_where_its_name_says_so():
    summary = summarise(
        [
            event(STEP, "user_annotation", 0, 100),
            event("xeray::packed_linear", "user_annotation", 10, 60),
            event("aten::empty", "cpu_op", 12, 5),
            event("somebody's mark", "user_annotation", 10, 80),
        ]
    )
    own = {each["name"]: each["seconds"] for each in summary["operators"]}
    assert own == pytest.approx(
        {"xeray::packed_linear": 55e-6, "aten::empty": 5e-6, OUTSIDE: 40e-6}
    )


def test_idle_steps_and_what_ran_in_them_are_dropped():
    events = [
        event(STEP, "user_annotation", 100, 50),
        event("aten::mm", "cpu_op", 110, 5),
        event(STEP, "user_annotation", 0, 20),
        event("aten::zeros", "cpu_op", 5, 5),
        {"ph": "f", "name": "flow", "ts": 6},
    ]
    kept = without_idle_steps(events, [False, True])
    assert kept == [events[0], events[1], events[4]]
    assert without_idle_steps(events, [True, True]) == events
