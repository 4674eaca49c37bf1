"""Three hosts on this machine: a worker is lost under load, and the service goes on.

The long form, by hand: `python -m tests.cluster.faults` (all faults, 32 streams, a table).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from .hosts import Hosts, running_hosts, why_not
from .load import Load

NUM_STREAMS = 8
APP: dict[str, Any] = {
    "model": {"aliases": ["*"]},
    "engine": {"fixed_rate_tokens_per_s": 15, "max_num_seqs": 32},
    "ingress": {"num_replicas": 2, "num_cpus": 0.1, "continue_timeout_s": 30},
    "preprocessor": {"num_replicas": 2, "xeon_cores": 1},
    "model_replica": {"pool": "arc", "num_replicas": 2, "num_cpus": 0.1},
}
"""A replica of each kind on each of two workers."""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with running_hosts(2) as made:
        made.deploy(APP)
        yield made


@pytest.mark.timeout(300)
async def test_a_lost_worker_leaves_no_request_without_an_end(hosts: Hosts) -> None:
    survivor, victim = hosts.workers
    load = Load([survivor.url], NUM_STREAMS, max_tokens=60, hung_s=40.0)
    running = asyncio.create_task(load.run())
    while not load.ends:
        await asyncio.sleep(0.1)

    num_killed = await asyncio.to_thread(victim.kill)
    killed_s = time.monotonic()
    while sum(end.began_s > killed_s for end in load.ends) < NUM_STREAMS:
        assert time.monotonic() - killed_s < 60
        await asyncio.sleep(0.1)
    load.stop.set()
    await asyncio.wait_for(running, 60)

    counts = load.counts()
    print(f"killed {num_killed} processes; sent {load.num_sent}, {counts}")
    assert num_killed > 3
    assert sum(counts.values()) == load.num_sent
    assert "hung" not in counts
    # Cut are at most those whose ingress was on the lost machine too.
    assert counts.get("cut", 0) + counts.get("typed", 0) <= NUM_STREAMS
    assert counts["answered"] >= 2 * NUM_STREAMS
    assert load.num_wrong() == 0
