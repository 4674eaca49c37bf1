"""Updates under load, as a user makes them: `python -m tests.cluster.updates [COUNT]`, by hand.

`xeray serve` with a clock for an engine, streams without a pause, COUNT (10) times `xeray rollout
start`, and once the toggles alone: prints a row for each, and what became of all requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from .load import Load

NUM_STREAMS, MAX_TOKENS, RATE = 16, 240, 60
FIRST_PORT = 19000
"""Of the blocks for ingress replicas: below those of services that share the host's locks."""
# Five requests beside other work tell little of times: only what is much slower counts.
LIMITS = ("--min-requests", "5", "--max-latency-ratio", "2.5")
STEPS = ("--steps", "50", "--step-s", "60", *LIMITS)
SCENARIO = {
    "name": "answers",
    "max_latency_p95_s": 20,
    "requests": [
        {
            "name": "any",
            "body": {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 4},
            "repeat": 3,
            "expect": {"min_tokens": 4, "finish_reason": "length"},
        }
    ],
}


def document(version: int, port: int, toggles: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a version's config file, with toggles of the model replicas, if any."""
    args = {
        "model": {"aliases": ["*"]},
        "engine": {"fixed_rate_tokens_per_s": RATE, "max_num_seqs": 32 + version},
        "ingress": {"num_replicas": 1, "num_cpus": 0.1},
        "preprocessor": {"num_replicas": 1, "xeon_cores": 1, "reserve_xeon_cores": False},
        "model_replica": {"pool": "cpu", "num_replicas": 1, "num_cpus": 0.1},
    }
    application: dict[str, Any] = {"name": "xeray", "route_prefix": "/"}
    application["import_path"] = "serve_app:build_app"
    if toggles is not None:
        application["deployments"] = [{"name": "ModelReplica", "user_config": toggles}]
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": None},
        "applications": [{**application, "args": args}],
    }


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def xeray(folder: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """Return a command line and its environment: a user's, with a folder of its own for all."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "XERAY_"))}
    # Its own locks as well: other services on this machine may hold the preprocessors' cores. By
    # these locks services also keep off each other's ports, so it needs ports of its own.
    first = FIRST_PORT + os.getpid() % 100 * 100
    ours = {
        "RAY_TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "XERAY_LOCK_DIR": str(folder / "locks"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 98),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first + 99),
    }
    return [str(Path(sys.executable).with_name("xeray")), *words], {**kept, **ours}


@contextlib.contextmanager
def serving(folder: Path, config: Path) -> Iterator[str]:
    """Run `xeray serve` for the block; yields its URL."""
    command, variables = xeray(folder, "serve", str(config), "--json")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=variables, start_new_session=True
    )
    try:
        assert process.stdout is not None
        facts: dict[str, Any] = {}
        for line in process.stdout:
            facts = json.loads(line)
            if "url" in facts:
                break
        assert "url" in facts, f"xeray serve ended with {process.wait(10)}"
        yield facts["url"]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


async def rollout(folder: Path, *words: str) -> tuple[int, str]:
    """Run `xeray rollout WORDS` beside the load; return its exit code and what it printed."""
    command, variables = xeray(folder, "rollout", *words)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=variables
    )
    printed, _ = await asyncio.wait_for(process.communicate(), 180)
    return process.returncode or 0, printed.decode()


def wait_ready(url: str, timeout_s: float = 20.0) -> None:
    """Wait until HAProxy, which starts beside the service, has heard of its ingress."""
    deadline_s = time.monotonic() + timeout_s
    while (answer := httpx.get(f"{url}/readyz", timeout=5)).status_code != 200:
        assert time.monotonic() < deadline_s, answer.text
        time.sleep(0.1)


def replica_ids(url: str) -> list[str]:
    """Return the model replicas' ids."""
    return [row["replica_id"] for row in httpx.get(f"{url}/health", timeout=5).json()["replicas"]]


async def change(load: Load, folder: Path, name: str, file: dict[str, Any], *words: str) -> None:
    """Carry one change out beside the load, and print its row."""
    config = folder / "next.yaml"
    config.write_text(yaml.safe_dump(file))
    began_s, num_ended = time.monotonic(), len(load.ends)
    code, printed = await rollout(folder, "start", str(config), *words)
    ends = load.ends[num_ended:]
    bad = [end for end in ends if end.kind != "answered"]
    took_s = time.monotonic() - began_s
    print(f"| {name} | {took_s:.1f} | {len(ends)} | {len(bad)} | {code} |", flush=True)
    if code != 0 or bad:
        print(printed, bad[:3], file=sys.stderr)


async def update(folder: Path, url: str, port: int, count: int) -> Load:
    """Carry out the updates under load, then one of the toggles alone, a row for each."""
    load = Load([url], NUM_STREAMS, MAX_TOKENS, stagger_s=0.05)
    running = asyncio.create_task(load.run())
    scenario = folder / "answers.yaml"
    scenario.write_text(yaml.safe_dump(SCENARIO))
    try:
        for version in range(1, count + 1):
            file = document(version, port)
            await change(load, folder, str(version), file, "--scenario", str(scenario), *STEPS)
        toggles = {"batching": {"mode": "continuous", "max_num_seqs": 16}, "stream_interval_ms": 50}
        before = replica_ids(url)
        in_place = ("--strategy", "in_place", "--no-scenarios")
        await change(load, folder, "toggles", document(count, port, toggles), *in_place)
        print("same replicas after the toggles:", replica_ids(url) == before)
    finally:
        load.stop.set()
        await asyncio.wait_for(running, 90)
    return load


def main() -> None:
    """Update, and print the table and its sum."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="xru", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = folder / "v0.yaml"
        config.write_text(yaml.safe_dump(document(0, port)))
        with serving(folder, config) as url:
            wait_ready(url)
            print("| update | s | requests ended | failed | exit code |\n|---|---|---|---|---|")
            load = asyncio.run(update(folder, url, port, count))
    print(f"sent {load.num_sent}, {load.counts()}, wrong {load.num_wrong()}")


if __name__ == "__main__":
    main()
