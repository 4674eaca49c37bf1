"""When silence counts: over the limit, less what the process waited for a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from serve_app.engine.watchdog import StarvationWatch, StepWatch, thread_cpu_waits


def test_the_limit_follows_the_slowest_steps_and_has_a_floor() -> None:
    watch = StepWatch(min_s=3.0)
    assert watch.limit_s == 3.0
    for _ in range(200):
        watch.add_step(0.01)
    assert watch.limit_s == 3.0
    for _ in range(10):
        watch.add_step(0.5)
    assert watch.limit_s == 5.0


def test_the_thread_that_waited_most_counts_within_one_silence() -> None:
    waits = {"1": 10.0, "2": 3.0}
    watch = StarvationWatch(1.0, lambda pid: dict(waits))

    assert watch.since(100.0, 101.0, pid=7) == 0.0  # the first look has nothing to compare with
    waits.update({"1": 10.5, "2": 3.2})
    assert watch.since(100.0, 102.0, pid=7) == 0.5
    waits.update({"1": 10.6, "2": 4.2, "3": 9.0})  # a new thread has no past here
    assert watch.since(100.0, 103.0, pid=7) == 1.5
    del waits["2"]
    assert watch.since(100.0, 104.0, pid=7) == 1.5

    waits["1"] = 11.4
    assert watch.since(104.5, 105.0, pid=7) == 0.5  # a step: what was before it does not count
    waits["1"] = 12.2
    assert watch.since(104.5, 106.0, pid=7) == pytest.approx(1.3)
    assert watch.since(104.5, 107.0, pid=8) == 0.0  # another engine
    assert StarvationWatch(1.0, lambda pid: {}).since(1.0, 2.0, pid=7) == 0.0


def test_time_in_which_nobody_looked_is_not_held_against_the_engine() -> None:
    watch = StarvationWatch(0.5, lambda pid: {})

    assert watch.since(100.0, 104.0, pid=7) == 3.5  # the watchdog slept 4 s in place of 0.5 s
    assert watch.since(100.0, 104.5, pid=7) == 3.5
    assert watch.since(100.0, 107.0, pid=7) == 5.5
    assert watch.since(107.0, 107.5, pid=7) == 0.0


def test_starved_together_with_its_watchdog_counts_once() -> None:
    waits = {"1": 5.0}
    watch = StarvationWatch(0.5, lambda pid: dict(waits))
    watch.since(100.0, 100.5, pid=7)
    waits["1"] = 8.0

    assert watch.since(100.0, 104.5, pid=7) == 3.5


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="no scheduler statistics")
def test_a_busy_thread_beside_another_on_one_cpu_waits_and_a_sleeping_one_does_not() -> None:
    cpu = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, [{cpu}])\nwhile True: pass"
    sleep = f"import os, time; os.sched_setaffinity(0, [{cpu}]); time.sleep(60)"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for code in (spin, spin, sleep)]
    try:
        deadline_s = time.monotonic() + 20
        while waited_s(processes[0].pid) < 0.3:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        before_s = waited_s(processes[2].pid)
        time.sleep(0.5)
        assert waited_s(processes[2].pid) - before_s < 0.25
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert thread_cpu_waits(processes[0].pid) == {}


def waited_s(pid: int) -> float:
    return max(thread_cpu_waits(pid).values(), default=0.0)
