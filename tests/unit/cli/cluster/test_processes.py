from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from serve_app.cli.cluster.processes import ProcessId, end_processes, find_marked

MARK = "XERAY_TEST_MARK"
WAIT = "print('up', flush=True); input()"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}"


def start(code: str, mark: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, MARK: mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.fixture
def marked() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_only_processes_with_the_very_mark_are_found(
    marked: list[subprocess.Popen[str]],
) -> None:
    here = f"/x/{os.getpid()}"
    marked += [start(WAIT, here), start(WAIT, f"{here}0")]
    assert [process.pid for process in find_marked(MARK, here)] == [marked[0].pid]


def test_this_process_and_its_parents_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = "PATH", os.environ["PATH"]
    found = {process.pid for process in find_marked(name, value)}
    assert os.getpid() not in found
    assert os.getppid() not in found


def test_sigterm_comes_first_and_sigkill_only_to_who_stays(
    marked: list[subprocess.Popen[str]],
) -> None:
    marked += [start(WAIT, "kind"), start(STUBBORN, "stubborn")]
    kind, stubborn = (ProcessId.of(process.pid) for process in marked)

    assert end_processes([kind], grace_s=10) == 0
    assert end_processes([stubborn], grace_s=0.2) == 1
    assert not kind.is_alive()
    assert not stubborn.is_alive()


def test_a_pid_that_someone_else_has_now_is_left_alone(
    marked: list[subprocess.Popen[str]],
) -> None:
    marked.append(start(WAIT, "other"))
    before = ProcessId(marked[0].pid, ProcessId.of(marked[0].pid).ticks - 1)
    assert not before.is_alive()
    before.signal(signal.SIGKILL)
    assert end_processes([before], grace_s=0) == 0
    assert marked[0].poll() is None


def test_a_process_that_never_was() -> None:
    assert not ProcessId.of(2**22 + 1).is_alive()
