"""The long form of the fault tests, by hand: `python -m tests.cluster.faults [FAULT …]`.

Three hosts (a head without cards, two workers), 32 greedy streams over both workers' proxies; one
fault after the other, each with a row of the table in cluster/README.md.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from .hosts import Host, Hosts, command_line, running_hosts, why_not
from .load import Load
from .test_hosts import APP

NUM_STREAMS = 32
MAX_TOKENS = 60
BEFORE_S, AFTER_S = 6.0, 25.0
COUNTERS = ("xeray_requests_retried_total", "xeray_streams_continued_total")


@dataclass(frozen=True)
class Fault:
    """What is done at the fault, and what undoes it `lasts_s` later."""

    name: str
    do: Callable[[Hosts], object]
    undo: Callable[[Hosts], object] = lambda hosts: None
    lasts_s: float = 0.0
    after_s: float = AFTER_S


def one(number: int, *parts: str, kind: int = signal.SIGKILL) -> Callable[[Hosts], object]:
    """Return what sends a signal to the first process of worker `number` with these words."""

    def do(hosts: Hosts) -> None:
        found = hosts.workers[number].find(*parts)
        assert found, f"no {parts} on worker {number}"
        os.kill(found[0], kind)

    return do


def anywhere(*parts: str) -> Callable[[Hosts], object]:
    """Return what kills the one process with these words, on whichever host it is."""

    def do(hosts: Hosts) -> None:
        assert sum(host.kill(*parts) for host in hosts.hosts), f"no {parts}"

    return do


def fill_disk(hosts: Hosts) -> None:
    """Fill the file system that the second worker's folder lies on: a small tmpfs."""
    path = hosts.workers[1].folder / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * (1 << 20))
        except OSError:
            return


def restart_head(hosts: Hosts) -> None:
    """Start the head again, with the command that started it."""
    hosts.head.start()


def end_head(hosts: Hosts) -> None:
    """Kill every process of the head."""
    hosts.head.kill()


FAULTS = (
    Fault("kill -9 of a model replica", one(1, "ServeReplica", "ModelReplica")),
    Fault("kill -9 of an ingress replica", one(1, "ServeReplica", "Ingress")),
    Fault("kill -9 of HAProxy", one(1, "haproxy", "-f")),
    Fault("kill -9 of the controller", anywhere("ServeController")),
    Fault(
        "a paused process (replica, 20 s)",
        one(1, "ServeReplica", "ModelReplica", kind=signal.SIGSTOP),
        one(1, "ServeReplica", "ModelReplica", kind=signal.SIGCONT),
        20.0,
    ),
    Fault("a full disk (worker)", fill_disk, lambda h: ballast(h).unlink(), 15.0),
    Fault(
        "a cut network (worker, 20 s)",
        lambda h: h.workers[1].cut(),
        lambda h: h.workers[1].join(),
        20.0,
        45.0,
    ),
    Fault(
        "kill -9 of a raylet", one(1, "raylet/raylet"), lambda h: h.workers[1].start(), 15.0, 45.0
    ),
    Fault("kill -9 of the head (all processes)", end_head, restart_head, 8.0, 45.0),
)


def ballast(hosts: Hosts) -> Any:
    """Return the file that fills the disk."""
    return hosts.workers[1].folder / "ballast"


def read_counters(hosts: Hosts) -> dict[str, float]:
    """Return the ingress counters' sums; 0 where none answers."""
    for host in hosts.workers:
        try:
            text = httpx.get(f"{host.url}/metrics", timeout=5).text
        except httpx.HTTPError:
            continue
        return {
            name: sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))
            for name in COUNTERS
        }
    return dict.fromkeys(COUNTERS, 0.0)


async def measure(hosts: Hosts, fault: Fault) -> str:
    """Return the fault's row: what became of the requests, and when all was normal again."""
    load = Load([host.url for host in hosts.workers], NUM_STREAMS, MAX_TOKENS, stagger_s=0.1)
    before = read_counters(hosts)
    running = asyncio.create_task(load.run())
    await asyncio.sleep(BEFORE_S)
    await asyncio.to_thread(fault.do, hosts)
    fault_s = time.monotonic()
    await asyncio.sleep(fault.lasts_s)
    await asyncio.to_thread(fault.undo, hosts)
    await asyncio.sleep(max(0.0, fault.after_s - (time.monotonic() - fault_s)))
    load.stop.set()
    await asyncio.wait_for(running, 120)
    after = read_counters(hosts)
    counts = load.counts()
    normal_s = load.seconds_until_normal(fault_s)
    # A counter that was lost with its ingress begins at 0 again.
    retried, continued = (int(max(0.0, after[n] - before[n])) for n in COUNTERS)
    cells = [load.num_sent, counts.get("answered", 0), retried, continued]
    cells += [counts.get(kind, 0) for kind in ("typed", "cut", "hung")]
    cells.append(load.num_wrong())
    normal = "not within the run" if normal_s is None else f"{normal_s:.1f}"
    return f"| {fault.name} | " + " | ".join(map(str, cells)) + f" | {normal} |"


def wait_normal(hosts: Hosts) -> None:
    """Wait until both workers answer and have their replicas again."""
    deadline_s = time.monotonic() + 90
    while time.monotonic() < deadline_s:
        if all(is_normal(host) for host in hosts.workers):
            return
        time.sleep(0.5)
    for host in hosts.workers:
        print(host.name, [command_line(pid)[:50] for pid in host.find("ray::")], file=sys.stderr)


def is_normal(host: Host) -> bool:
    """Whether a worker's proxy answers, and tells of two model replicas."""
    try:
        answer = httpx.get(f"{host.url}/health", timeout=3)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and len(answer.json()["replicas"]) == 2


def main() -> None:
    """Run the named faults, or all, and print the table."""
    if reason := why_not():
        sys.exit(f"cannot run here: {reason}")
    wanted = [f for f in FAULTS if len(sys.argv) == 1 or any(w in f.name for w in sys.argv[1:])]
    print("| fault | sent | answered | retried | continued | typed | cut | hung | wrong | s |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with running_hosts(2, proxy="haproxy", disk_mb=512) as hosts:
        hosts.deploy(APP)
        for fault in wanted:
            wait_normal(hosts)
            print(asyncio.run(measure(hosts, fault)), flush=True)


if __name__ == "__main__":
    main()
