"""Processes of a node: found by a mark in their environment, ended by pid, never by name."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A pid with the clock tick of its start: another process that gets the pid later differs."""

    pid: int
    ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Return the process that has `pid` now; its ticks are 0 where there is none."""
        return cls(pid, _start_ticks(pid) or 0)

    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        with contextlib.suppress(ChildProcessError, OSError):
            os.waitpid(self.pid, os.WNOHANG)  # our own child: let its zombie go
        return _start_ticks(self.pid) == self.ticks != 0

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def find_marked(variable: str, value: str, proc: Path = Path("/proc")) -> list[ProcessId]:
    """Return the processes with `variable=value` in the environment they were started with.

    Less this one and its parents. Those of other users are found by root only.
    """
    mark = f"{variable}={value}".encode()
    spared = _own_family()
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdecimal() or int(folder.name) in spared:
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark in variables:
            found.append(ProcessId.of(int(folder.name)))
    return [process for process in found if process.is_alive()]


def end_processes(processes: Sequence[ProcessId], grace_s: float) -> int:
    """End processes: SIGTERM, and after `grace_s` SIGKILL. Return how many had to be killed."""
    for process in processes:
        process.signal(signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    alive = [process for process in dict.fromkeys(processes) if process.is_alive()]
    while alive and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        alive = [process for process in alive if process.is_alive()]
    for process in alive:
        process.signal(signal.SIGKILL)
    while any(process.is_alive() for process in alive) and time.monotonic() < deadline_s + 5:
        time.sleep(_POLL_S)
    return len(alive)


def _own_family() -> set[int]:
    family, pid = set(), os.getpid()
    while pid > 1 and pid not in family:
        family.add(pid)
        pid = _parent(pid)
    return family


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (state) on; [] without the process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _start_ticks(pid: int) -> int | None:
    fields = _stat(pid)
    if not fields or fields[0] in "ZX":
        return None
    return int(fields[19])
