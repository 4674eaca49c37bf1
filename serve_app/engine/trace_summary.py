"""What a profiler's trace says about an engine's steps. Plain values in and out; no torch.

Events are those of a Chrome trace (the Trace Event Format) as PyTorch's profiler writes them:
complete events (`ph` X) with `ts` and `dur` in microseconds and a category: `cpu_op`, `kernel`,
`gpu_memcpy`, `cuda_runtime` or its twins on other devices. What the program marked itself is a
`user_annotation`: the steps, and our own operators, by their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

STEP = "engine step"
OPERATOR_PREFIX = "xeray::"
"""How the names of our own operators begin, where `aten::` begins PyTorch's."""
OUTSIDE = "outside of operators (Python, waiting)"
"""The steps' own time on the host, without an operator on their thread; the profiler's too."""

_TOP = 20
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_RUNTIMES = ("cuda_runtime", "cuda_driver", "xpu_runtime", "privateuse1_runtime")
_ITEM_BYTES = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4,
    "short int": 2, "signed char": 1, "unsigned char": 1, "bool": 1,
}  # fmt: skip

Event = dict[str, Any]


def summarise(events: Iterable[Event]) -> dict[str, Any]:
    """Return figures per step of a trace; times in seconds.

    operators: the largest by their own time (that of operators inside taken off), on the device
    where it has kernels, else on the host, with `OUTSIDE` among them. copied_bytes: what memory
    copies moved on a device, and what `aten::copy_` moved where there is none. idle: the share of
    the steps in which no kernel ran, None on a CPU.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    steps = [event for event in complete if _is_step(event)]
    num_steps = max(1, len(steps))
    kernels = [event for event in complete if event.get("cat") in _KERNELS]
    runtime = [event for event in complete if event.get("cat") in _RUNTIMES]
    operators = [event for event in complete if _is_operator(event)]
    host_times = _own_times([*operators, *steps])
    if STEP in host_times:
        host_times[OUTSIDE] = host_times.pop(STEP)
    span_us = sum(event["dur"] for event in steps)
    idle_us = _idle(steps, kernels) if kernels else None
    return {
        "num_steps": len(steps),
        "step_s": span_us / num_steps / 1e6,
        "operators": _largest(_by_name(kernels) if kernels else host_times, span_us),
        "host_operators": _largest(host_times, span_us),
        "copied_bytes": _copied_bytes(kernels, operators) / num_steps,
        "synchronisations": sum(_is_waiting(e["name"]) for e in runtime) / num_steps,
        "kernel_launches": sum("Launch" in e["name"] for e in runtime) / num_steps,
        "operator_calls": len(operators) / num_steps,
        "idle_s": None if idle_us is None else idle_us / num_steps / 1e6,
        "idle_share": None if idle_us is None or not span_us else idle_us / span_us,
    }


def without_idle_steps(events: Iterable[Event], has_computed: Sequence[bool]) -> list[Event]:
    """Drop the steps that computed nothing, in the order that they ran, and what ran in them."""
    events = list(events)
    steps = sorted((e for e in events if _is_step(e)), key=lambda event: float(event["ts"]))
    idle = [
        (float(step["ts"]), _end(step))
        for step, has in zip(steps, has_computed, strict=True)
        if not has
    ]
    if not idle:
        return events
    return [
        event
        for event in events
        if event.get("ph") != "X"
        or not any(begin <= event["ts"] and _end(event) <= end for begin, end in idle)
    ]


def operator_seconds(summary: dict[str, Any]) -> dict[str, float]:
    """Operator → seconds over all profiled steps, for the metrics."""
    return {each["name"]: each["seconds"] for each in summary["operators"]}


def _is_step(event: Event) -> bool:
    is_marked = event.get("ph") == "X" and event.get("cat") == "user_annotation"
    return is_marked and event["name"] == STEP


def _is_operator(event: Event) -> bool:
    kind = event.get("cat")
    is_ours = kind == "user_annotation" and event["name"].startswith(OPERATOR_PREFIX)
    return is_ours or kind == "cpu_op"


def _largest(times: dict[str, tuple[int, float]], span_us: float) -> list[dict[str, Any]]:
    ordered = sorted(times.items(), key=lambda item: -item[1][1])[:_TOP]
    return [
        {
            "name": name,
            "calls": calls,
            "seconds": own_us / 1e6,
            "share": own_us / span_us if span_us else 0.0,
        }
        for name, (calls, own_us) in ordered
    ]


def _by_name(events: Iterable[Event]) -> dict[str, tuple[int, float]]:
    times: dict[str, tuple[int, float]] = {}
    for event in events:
        calls, total = times.get(event["name"], (0, 0.0))
        times[event["name"]] = (calls + 1, total + event["dur"])
    return times


def _own_times(events: Sequence[Event]) -> dict[str, tuple[int, float]]:
    """Calls and microseconds by operator, without the operators that it called on its thread."""
    own = [float(event["dur"]) for event in events]
    order = sorted(range(len(events)), key=lambda i: (events[i]["ts"], -events[i]["dur"]))
    open_by_thread: dict[Any, list[int]] = {}
    for index in order:
        event = events[index]
        stack = open_by_thread.setdefault(event.get("tid"), [])
        while stack and _end(events[stack[-1]]) <= event["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["dur"]
        stack.append(index)
    times: dict[str, tuple[int, float]] = {}
    for event, own_us in zip(events, own, strict=True):
        calls, total = times.get(event["name"], (0, 0.0))
        times[event["name"]] = (calls + 1, total + max(0.0, own_us))
    return times


def _idle(steps: Sequence[Event], kernels: Sequence[Event]) -> float:
    """Microseconds between the first step's begin and the last one's end without a kernel."""
    if not steps:
        return 0.0
    begin, end = min(e["ts"] for e in steps), max(map(_end, steps))
    idle, covered = 0.0, float(begin)
    for kernel in sorted(kernels, key=lambda event: event["ts"]):
        idle += max(0.0, float(min(kernel["ts"], end)) - covered)
        covered = min(max(covered, _end(kernel)), float(end))
    return idle + max(0.0, float(end) - covered)


def _copied_bytes(kernels: Sequence[Event], operators: Sequence[Event]) -> int:
    copies = [e for e in kernels if e.get("cat") == "gpu_memcpy"]
    if kernels:
        return sum(int(event.get("args", {}).get("bytes", 0)) for event in copies)
    return sum(_bytes_of(event) for event in operators if event["name"] == "aten::copy_")


def _bytes_of(event: Event) -> int:
    """Bytes of the first input, which `aten::copy_` writes; 0 where the trace has no shapes."""
    args = event.get("args", {})
    dims, types = args.get("Input Dims") or [[]], args.get("Input type") or [""]
    return int(math.prod(dims[0])) * _ITEM_BYTES.get(types[0], 0)


def _is_waiting(name: str) -> bool:
    return "Synchronize" in name or name.endswith(("Memcpy", "QueueWait"))


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event["dur"])
