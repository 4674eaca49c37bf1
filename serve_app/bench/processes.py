"""CPU time of a service's processes, from /proc: all that carry its mark or descend from one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessTime:
    """One process: `name` is what it does, `cpu_s` user and system time since it started."""

    pid: int
    parent_pid: int
    name: str
    cpu_s: float


class ProcessGroup:
    """The processes of a service: those whose environment holds `mark`, and all their descendants.

    The mark finds processes that left the tree (their parent died); descent finds those that
    replaced their environment. `proc` is the procfs to read.
    """

    def __init__(self, mark: str, proc: Path = Path("/proc")) -> None:
        self._mark = mark.encode()
        self._proc = proc

    def snapshot(self) -> dict[int, ProcessTime]:
        """Return pid → times of the processes that are alive now."""
        everything = {
            time.pid: time
            for entry in self._proc.iterdir()
            if entry.name.isdigit() and (time := _read_stat(entry)) is not None
        }
        members = {pid for pid in everything if self._is_marked(pid)}
        while more := {
            pid
            for pid, time in everything.items()
            if pid not in members and time.parent_pid in members
        }:
            members |= more
        return {pid: everything[pid] for pid in members}

    def _is_marked(self, pid: int) -> bool:
        try:
            return self._mark in (self._proc / str(pid) / "environ").read_bytes()
        except OSError:  # gone meanwhile, or not ours
            return False


def _read_stat(entry: Path) -> ProcessTime | None:
    """Parse /proc/PID/stat (proc(5)); the name is in parentheses and may hold any character."""
    try:
        text = (entry / "stat").read_text()
    except OSError:
        return None
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return ProcessTime(
        pid=int(entry.name),
        parent_pid=int(fields[1]),
        name=_role(entry) or head.partition("(")[2],
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
    )


def _role(entry: Path) -> str:
    """Return what a process of a service does, from its command line; "" where that is plain.

    Ray gives its actors titles: `ray::ServeReplica:app:Ingress`, `ray::ServeController.method`.
    """
    try:
        words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").split(".")[0].split(":")[-1].strip()
    if "serve_app.engine.worker" in words:
        return "engine"
    if "serve_app.cli.main" in words:
        return "xeray"
    scripts = [Path(word).stem for word in words[1:] if word.endswith(".py")]
    return scripts[0] if scripts and "python" in words[0] else ""


def cpu_between(before: dict[int, ProcessTime], after: dict[int, ProcessTime]) -> dict[str, float]:
    """Return CPU seconds by process name that were spent between two snapshots, largest first."""
    spent: dict[str, float] = {}
    for pid, time in after.items():
        earlier = before.get(pid)
        cpu_s = time.cpu_s - (earlier.cpu_s if earlier is not None else 0.0)
        spent[time.name] = spent.get(time.name, 0.0) + cpu_s
    return dict(sorted(spent.items(), key=lambda item: -item[1]))
