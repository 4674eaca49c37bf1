"""The long form of the fault tests, by hand: `python -m tests.cluster.faults FAULT… [--json FILE]`.

Three hosts (a head without cards, two workers), 32 greedy streams over both workers' proxies; one
fault after the other, each with a row of the table in cluster/README.md. `--json` keeps the rows of
several runs, `--table` prints what is kept there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from .hosts import Host, Hosts, command_line, running_hosts, why_not
from .load import Load

NUM_STREAMS = 32
MAX_TOKENS = 60
BEFORE_S, AFTER_S = 6.0, 25.0
COUNTERS = ("xeray_requests_retried_total", "xeray_streams_continued_total")
COLUMNS = (
    "fault",
    "sent",
    "answered",
    "retried",
    "continued",
    "typed",
    "cut",
    "refused",
    "hung",
    "wrong",
    "last_failure_s",
    "all_back_s",
)
APP: dict[str, Any] = {
    "model": {"aliases": ["*"]},
    "engine": {"fixed_rate_tokens_per_s": 15, "max_num_seqs": 32},
    "ingress": {"num_replicas": 2, "num_cpus": 0.1, "continue_timeout_s": 30},
    "preprocessor": {"num_replicas": 2, "xeon_cores": 1},
    "model_replica": {"pool": "arc", "num_replicas": 2, "num_cpus": 0.1},
}
"""A replica of each kind on each of two workers."""


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
    with ballast(hosts).open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * (1 << 20))
        except OSError:
            return


def ballast(hosts: Hosts) -> Path:
    """Return the file that fills the disk."""
    return hosts.workers[1].folder / "ballast"


def start_worker(hosts: Hosts) -> None:
    """Start the second worker's node again, as its systemd unit would: once the old one ended."""
    deadline_s = time.monotonic() + 30
    worker = hosts.workers[1]
    while json.loads(worker.node("status"))["state"] == "running":
        if time.monotonic() > deadline_s:
            return
        time.sleep(1)
    worker.start()


def join_again(hosts: Hosts) -> None:
    """Plug the cable in; Ray has given the host up meanwhile, so that its node starts anew."""
    hosts.workers[1].join()
    start_worker(hosts)


FAULTS = (
    Fault("kill -9 of a model replica", one(1, "ServeReplica", "ModelReplica")),
    Fault("kill -9 of an ingress replica", one(1, "ServeReplica", "Ingress")),
    Fault("kill -9 of HAProxy", one(1, "haproxy", "-f")),
    Fault("kill -9 of the controller", anywhere("ServeController")),
    Fault(
        "a paused process (model replica, 20 s)",
        one(1, "ServeReplica", "ModelReplica", kind=signal.SIGSTOP),
        one(1, "ServeReplica", "ModelReplica", kind=signal.SIGCONT),
        20.0,
        28.0,
    ),
    Fault("a full disk (worker, 15 s)", fill_disk, lambda h: ballast(h).unlink(), 15.0),
    Fault("a cut network (worker, 20 s)", lambda h: h.workers[1].cut(), join_again, 20.0, 50.0),
    Fault("kill -9 of a raylet", one(1, "raylet/raylet"), start_worker, 5.0, 45.0),
    Fault(
        "kill -9 of the head (all processes)",
        lambda h: h.head.kill(),
        lambda h: h.head.start(),
        8.0,
        45.0,
    ),
)


class Watch:
    """Asks twice a second whether all is as before the fault: answers, and Serve's replicas."""

    def __init__(self, hosts: Hosts, num_replicas: int) -> None:
        self._hosts = hosts
        self._num_replicas = num_replicas
        self._bad_s = 0.0
        self._is_normal = True
        self._task = asyncio.create_task(self._run())

    def seconds_until_normal(self, fault_s: float) -> float | None:
        """Return how long after the fault all was back: None where it is not, 0 if never gone."""
        return max(0.0, self._bad_s - fault_s) if self._is_normal else None

    async def stop(self) -> None:
        """Ask no more."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        while True:
            self._is_normal = await asyncio.to_thread(self._look)
            if not self._is_normal:
                self._bad_s = time.monotonic()
            await asyncio.sleep(0.5)

    def _look(self) -> bool:
        is_whole = num_replicas(self._hosts) >= self._num_replicas
        return is_whole and all(is_normal(host) for host in self._hosts.workers)


def num_replicas(hosts: Hosts) -> int:
    """Return how many processes of Serve's replicas there are."""
    return sum(len(host.find("ray::ServeReplica")) for host in hosts.workers)


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


async def measure(hosts: Hosts, fault: Fault) -> dict[str, Any]:
    """Return the fault's row: what became of the requests, and when all was normal again."""
    load = Load([host.url for host in hosts.workers], NUM_STREAMS, MAX_TOKENS, stagger_s=0.1)
    before, num_before = read_counters(hosts), num_replicas(hosts)
    running = asyncio.create_task(load.run())
    await asyncio.sleep(BEFORE_S)
    fault_s = time.monotonic()
    await asyncio.to_thread(fault.do, hosts)
    watch = Watch(hosts, num_before)
    await asyncio.sleep(fault.lasts_s)
    await asyncio.to_thread(fault.undo, hosts)
    await asyncio.sleep(max(0.0, fault.after_s - (time.monotonic() - fault_s)))
    load.stop.set()
    await asyncio.wait_for(running, 120)
    await watch.stop()
    after = read_counters(hosts)
    counts = load.counts()
    # A counter that was lost with its ingress begins at 0 again.
    retried, continued = (int(max(0.0, after[n] - before[n])) for n in COUNTERS)
    failed_s, back_s = load.seconds_until_normal(fault_s), watch.seconds_until_normal(fault_s)
    for end in load.ends:
        if end.kind != "answered":
            late_s, lasted_s = end.ended_s - fault_s, end.ended_s - end.began_s
            print(f"  {end.kind} at {late_s:.1f} s after {lasted_s:.1f} s: {end.detail}")
    return {
        "fault": fault.name,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "sent": load.num_sent,
        "answered": counts.get("answered", 0),
        "retried": retried,
        "continued": continued,
        **{kind: counts.get(kind, 0) for kind in ("typed", "cut", "refused", "hung")},
        "wrong": load.num_wrong(),
        "last_failure_s": None if failed_s is None else round(failed_s, 1),
        "all_back_s": None if back_s is None else round(back_s, 1),
        "codes": dict(Counter(end.detail[:120] for end in load.ends if end.kind == "typed")),
        "longest_s": round(max(end.ended_s - end.began_s for end in load.ends), 1),
    }


def wait_normal(hosts: Hosts) -> None:
    """Wait until both workers answer and have their replicas. Raises SystemExit where not."""
    deadline_s = time.monotonic() + 90
    while time.monotonic() < deadline_s:
        if all(is_normal(host) for host in hosts.workers):
            return
        time.sleep(0.5)
    for host in hosts.workers:
        print(host.name, [command_line(pid)[:50] for pid in host.find("ray::")], file=sys.stderr)
    sys.exit("the hosts are not normal within 90 s")


def is_normal(host: Host) -> bool:
    """Whether a worker's proxy answers, and tells of two model replicas that are ready."""
    try:
        answer = httpx.get(f"{host.url}/health", timeout=3)
        states = [row["state"] for row in answer.json()["replicas"]]
    except (httpx.HTTPError, ValueError, KeyError):
        return False
    return answer.status_code == 200 and states == ["ready", "ready"]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = ["not within the run" if row[name] is None else str(row[name]) for name in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def keep(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the file, in the place of an older one of the same fault."""
    rows = json.loads(path.read_text()) if path.exists() else []
    names = [fault.name for fault in FAULTS]
    rows = [old for old in rows if old["fault"] != row["fault"]] + [row]
    rows.sort(key=lambda one_row: names.index(one_row["fault"]))
    path.write_text(json.dumps(rows, indent=1))


def main() -> None:
    """Run the named faults, or all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", nargs="*", help="words of faults' names; none: all of them")
    parser.add_argument("--json", type=Path, help="file that keeps the rows")
    parser.add_argument("--table", action="store_true", help="print the rows of --json alone")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.json.read_text())))
        return
    if reason := why_not():
        sys.exit(f"cannot run here: {reason}")
    words = options.faults or [""]
    rows = []
    with running_hosts(2, proxy="haproxy", disk_mb=512) as hosts:
        hosts.deploy(APP)
        for fault in (f for f in FAULTS if any(word in f.name for word in words)):
            wait_normal(hosts)
            rows.append(asyncio.run(measure(hosts, fault)))
            print(rows[-1], flush=True)
            if options.json is not None:
                keep(options.json, rows[-1])
    print(table(rows))


if __name__ == "__main__":
    main()
