"""Delivered share and CPU per token over four hosts: `python -m tests.cluster.scale [COUNT …]`.

Replicas of 16 streams × 15 tokens/s without a model, 1 to 16 of them, four to a host; every stream
asks for the same number of tokens at once. By hand, on an idle machine: client and hosts share it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from .hosts import HTTP_PORT, Hosts, running_hosts, why_not

COUNTS = (1, 2, 4, 8, 16)
NUM_HOSTS, CARDS_PER_HOST = 4, 4
STREAMS_PER_REPLICA, RATE, MAX_TOKENS = 16, 15, 150
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def app(num_replicas: int) -> dict[str, Any]:
    """Return the application with so many model replicas."""
    return {
        "model": {"aliases": ["*"]},
        "engine": {"fixed_rate_tokens_per_s": RATE, "max_num_seqs": STREAMS_PER_REPLICA},
        "ingress": {"num_replicas": NUM_HOSTS, "num_cpus": 0.1},
        "preprocessor": {"num_replicas": 1, "xeon_cores": 1},
        "model_replica": {"pool": "arc", "num_replicas": num_replicas, "num_cpus": 0.05},
    }


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


async def stream(host: str, number: int) -> int:
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
    tail = b""
    try:
        while b"data: [DONE]" not in tail:
            data = await reader.read(1 << 16)
            if not data:
                break
            tail = (tail + data)[-2048:]
    finally:
        writer.close()
    found = tail.rpartition(b'"completion_tokens":')[2]
    digits = found.split(b",")[0].strip()
    return int(digits) if digits.isdigit() else 0


async def measure(hosts: Hosts, num_replicas: int) -> str:
    """Return the row of so many replicas."""
    num_streams = num_replicas * STREAMS_PER_REPLICA
    addresses = [host.address for host in hosts.workers]
    pids = [pid for host in hosts.hosts for pid in host.pids()]
    before, own, began_s = cpu_seconds(pids), time.process_time(), time.monotonic()
    counts = await asyncio.gather(
        *(stream(addresses[n % len(addresses)], n) for n in range(num_streams))
    )
    elapsed_s = time.monotonic() - began_s
    after = cpu_seconds(pids)
    used_s = sum(after[pid] - before.get(pid, 0.0) for pid in after)
    tokens = sum(counts)
    share = MAX_TOKENS / RATE * tokens / (num_streams * MAX_TOKENS) / elapsed_s
    busy = (used_s + time.process_time() - own) / elapsed_s
    return (
        f"| {num_replicas} | {num_streams} | {num_streams * RATE} | {tokens / elapsed_s:.0f}"
        f" | {100 * share:.1f} % | {1e6 * used_s / max(1, tokens):.0f} | {busy:.2f} |"
    )


def main() -> None:
    """Measure and print the table."""
    if reason := why_not():
        sys.exit(f"cannot run here: {reason}")
    counts = [int(word) for word in sys.argv[1:]] or list(COUNTS)
    print("| replicas | streams | ideal tok/s | delivered | share | CPU µs/token | cores busy |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with running_hosts(NUM_HOSTS, cards=CARDS_PER_HOST, proxy="haproxy") as hosts:
        for count in counts:
            hosts.deploy(app(count), timeout_s=180)
            asyncio.run(measure(hosts, 1))  # connections and imports that come with the first use
            print(asyncio.run(measure(hosts, count)), flush=True)


if __name__ == "__main__":
    main()
