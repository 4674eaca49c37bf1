"""Delivered share and CPU per token over four hosts: `python -m tests.cluster.scale ACTION`.

Replicas of 16 streams × 15 tokens/s without a model, 1 to 16 of them, four to a host, each with 16
users who stream without a pause: all places are taken. By hand, on an idle machine, which client
and hosts share. The hosts outlive a command, so that only `measure` needs the machine for itself::

    up              make the hosts and start their nodes
    deploy COUNT    serve with so many replicas, and wait until all answer
    measure COUNT   load them, and keep the row
    down            end everything
    table           print the rows
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from .hosts import HTTP_PORT, Hosts, command_line, why_not

NUM_HOSTS, CARDS_PER_HOST = 4, 4
STREAMS_PER_REPLICA, RATE, MAX_TOKENS = 16, 15, 60
WINDOW_S = 10.0
READY_TIMEOUT_S = 120.0
KINDS = {
    "replica": ("ServeReplica", "ModelReplica"),
    "engine": ("serve_app.engine.worker",),
    "ingress": ("ServeReplica", "Ingress"),
    "haproxy": ("haproxy", "-f"),
}
"""Whose CPU is told apart, by words of the command line; `ray` is the rest."""
COLUMNS = ("replicas", "streams", "ideal", "delivered", "share", "us_per_token", "cores", "by_kind")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


APP: dict[str, Any] = {
    "model": {"aliases": ["*"]},
    "engine": {"fixed_rate_tokens_per_s": RATE, "max_num_seqs": STREAMS_PER_REPLICA},
    "ingress": {"num_replicas": NUM_HOSTS, "num_cpus": 0.1},
    "preprocessor": {"num_replicas": 1, "xeon_cores": 1},
    "model_replica": {"pool": "arc", "num_replicas": 1, "num_cpus": 0.05},
}


def up(path: Path) -> None:
    """Make the hosts and leave them to the next command."""
    if reason := why_not():
        sys.exit(f"cannot run here: {reason}")
    hosts = Hosts(NUM_HOSTS, cards=CARDS_PER_HOST, proxy="haproxy")
    try:
        hosts.start()
        pids = []
        for host in hosts.hosts:
            assert host.sshd is not None
            pids.append(host.sshd.process.pid)
            del host.sshd.process  # no such thing can be written down
        path.write_bytes(pickle.dumps((hosts, pids)))
    except BaseException:
        hosts.close()
        raise


def standing(path: Path) -> Hosts:
    """Return the hosts that `up` has left."""
    if not path.exists():
        sys.exit(f"no hosts at {path}: begin with `up`")
    hosts, pids = pickle.loads(path.read_bytes())
    for host, pid in zip(hosts.hosts, pids, strict=True):
        host.sshd.process = psutil.Process(pid)
    assert isinstance(hosts, Hosts)
    return hosts


def deploy(hosts: Hosts, num_replicas: int) -> None:
    """Serve with so many replicas. Raises SystemExit where they are not ready in time."""
    rows = [{"name": "ModelReplica", "num_replicas": num_replicas}]
    hosts.deploy(APP, READY_TIMEOUT_S + 60, rows)
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while any(num_ready(host.url) != num_replicas for host in hosts.workers):
        if time.monotonic() > deadline_s:
            sys.exit(f"{num_replicas} replicas are not ready: {[*map(num_ready, urls(hosts))]}")
        time.sleep(0.5)


def urls(hosts: Hosts) -> list[str]:
    """Return where the workers answer."""
    return [host.url for host in hosts.workers]


def num_ready(url: str) -> int:
    """Return how many model replicas are ready as an ingress there knows."""
    try:
        rows = httpx.get(f"{url}/health", timeout=5).json()["replicas"]
    except (httpx.HTTPError, ValueError, KeyError):
        return 0
    return sum(row["state"] == "ready" for row in rows)


def cpu_seconds(pids: list[int]) -> dict[int, float]:
    """Return the CPU time that each process has used."""
    used = {}
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        used[pid] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return used


def kind_of(pid: int) -> str:
    """Return whose CPU a process's is."""
    line = command_line(pid)
    return next((kind for kind, words in KINDS.items() if all(w in line for w in words)), "ray")


@dataclass(frozen=True)
class Streamed:
    """One stream's tokens, and when the first and the last of its bytes came (monotonic s)."""

    num_tokens: int
    first_s: float
    last_s: float

    def tokens_within(self, begin_s: float, end_s: float) -> float:
        """Return how many came in a window, as they come evenly."""
        lasted_s = max(1e-9, self.last_s - self.first_s)
        overlap_s = max(0.0, min(end_s, self.last_s) - max(begin_s, self.first_s))
        return self.num_tokens * overlap_s / lasted_s


async def stream(host: str, number: int) -> Streamed:
    """Run one stream without an HTTP library, which would cost as much as the service."""
    reader, writer = await asyncio.open_connection(host, HTTP_PORT)
    body = json.dumps(
        {
            "model": "any",
            "prompt": f"Stream {number}",
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    tail, first_s = b"", 0.0
    try:
        while b"data: [DONE]" not in tail:
            data = await reader.read(1 << 16)
            first_s = first_s or time.monotonic()
            if not data:
                break
            tail = (tail + data)[-2048:]
    finally:
        writer.close()
    found = tail.rpartition(b'"completion_tokens":')[2]
    digits = found.split(b",")[0].strip()
    return Streamed(int(digits) if digits.isdigit() else 0, first_s, time.monotonic())


async def run_user(host: str, number: int, delay_s: float, until_s: float) -> list[Streamed]:
    """Stream after stream until the time is over."""
    await asyncio.sleep(delay_s)
    done = []
    while time.monotonic() < until_s:
        done.append(await stream(host, number))
    return done


async def measure(hosts: Hosts, num_replicas: int) -> dict[str, Any]:
    """Return the row of so many replicas, each with as many users as it has places."""
    num_streams, addresses = num_replicas * STREAMS_PER_REPLICA, [h.address for h in hosts.workers]
    spread_s = MAX_TOKENS / RATE  # one stream's length: ends and starts are spread evenly
    window_s = time.monotonic() + spread_s + 1.0
    users = [
        asyncio.create_task(
            run_user(
                addresses[n % len(addresses)], n, spread_s * n / num_streams, window_s + WINDOW_S
            )
        )
        for n in range(num_streams)
    ]
    await asyncio.sleep(window_s - time.monotonic())
    pids = [pid for host in hosts.hosts for pid in host.pids()]
    kinds = {pid: kind_of(pid) for pid in pids}
    before, own_s, begin_s = cpu_seconds(pids), time.process_time(), time.monotonic()
    await asyncio.sleep(WINDOW_S)
    after, own_s, end_s = cpu_seconds(pids), time.process_time() - own_s, time.monotonic()
    streams = [each for done in await asyncio.gather(*users) for each in done]
    tokens = sum(each.tokens_within(begin_s, end_s) for each in streams)
    used: Counter[str] = Counter()
    for pid, seconds in after.items():
        used[kinds[pid]] += seconds - before.get(pid, 0.0)
    ideal, elapsed_s = num_streams * RATE, end_s - begin_s
    by_kind = {kind: round(1e6 * s / max(1, tokens)) for kind, s in used.most_common()}
    return {
        "replicas": num_replicas,
        "streams": num_streams,
        "ideal": ideal,
        "delivered": round(tokens / elapsed_s),
        "share": f"{100 * tokens / elapsed_s / ideal:.1f} %",
        "us_per_token": round(1e6 * used.total() / max(1, tokens)),
        "cores": round((used.total() + own_s) / elapsed_s, 2),
        "client_cores": round(own_s / elapsed_s, 2),
        "by_kind": ", ".join(f"{kind} {us}" for kind, us in by_kind.items()),
        "short": sum(each.num_tokens < MAX_TOKENS for each in streams),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(str(row[name]) for name in COLUMNS)} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Carry one action out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("up", "deploy", "measure", "down", "table"))
    parser.add_argument("count", nargs="?", type=int, default=1, help="of model replicas")
    parser.add_argument("--state", type=Path, required=True, help="file that knows the hosts")
    parser.add_argument("--json", type=Path, required=True, help="file that keeps the rows")
    options = parser.parse_args()
    rows = json.loads(options.json.read_text()) if options.json.exists() else []
    if options.action == "up":
        up(options.state)
    elif options.action == "deploy":
        deploy(standing(options.state), options.count)
    elif options.action == "measure":
        row = asyncio.run(measure(standing(options.state), options.count))
        print(row)
        options.json.write_text(json.dumps([*rows, row], indent=1))
    elif options.action == "down":
        standing(options.state).close()
        options.state.unlink()
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
