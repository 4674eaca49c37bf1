"""`xeray cluster` over sshd: what is refused, `up`, `status`, `exec`, a lost worker, `down`.

Three hosts in network namespaces where those are allowed, else two nodes on loopback addresses. One
cluster for all: it is the slow part. The long form of the faults, by hand:
`python -m tests.cluster.faults` (all faults, 32 streams, a table).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from .hosts import HTTP_PORT, SSH_PORT, Host, Hosts, why_not
from .lab import Lab, loopback_lab, why_no_sshd
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
REPLICA_PORTS = range(30000, 32001)
KEY = "xr-of-a-test"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(why_no_sshd()), reason=why_no_sshd() or "sshd is there"),
]


@pytest.fixture(scope="module")
def namespaces() -> Iterator[Hosts | None]:
    """Hosts whose nodes are not started yet; None where they are not allowed."""
    if why_not():
        yield None
    else:
        # By hand: XERAY_TEST_PROXY=haproxy pytest tests/cluster/test_hosts.py -k "key or doctor"
        with closing(Hosts(2, proxy=os.environ.get("XERAY_TEST_PROXY", "python"))) as hosts:
            yield hosts


@pytest.fixture(scope="module")
def lab(
    namespaces: Hosts | None, find_free_port: Callable[[], int], clean_environment: dict[str, str]
) -> Iterator[Lab]:
    """An inventory of machines behind sshd, nothing started."""
    if namespaces is not None:
        yield namespaces.lab
        return
    with loopback_lab(find_free_port, dict(clean_environment)) as made:
        yield made


@pytest.fixture(scope="module")
def brought_up(lab: Lab) -> dict[str, str]:
    """The cluster runs: what `up` said of each machine."""
    return {line.split()[0]: line for line in lab.up().stdout.splitlines()}


def test_machines_that_must_not_start_are_told_apart(lab: Lab) -> None:
    """A wrong path, too many cards and a closed port: one line each, nothing started, exit 1."""
    original = lab.document["machines"]
    head = {**original[0], "command": "/none"}
    worker = original[1]
    cards = worker["cards"]["arc_gpu"]
    bad = [
        {"name": "lost", "address": worker["address"], "node_ip": "127.0.0.4", "port": 1},
        {**head, "name": "bare", "node_ip": "127.0.0.5", "role": "worker"},
        {**worker, "name": "poor", "node_ip": "127.0.0.6", "cards": {"arc_gpu": cards + 1}},
    ]
    lab.document["machines"] = [head, *bad]
    try:
        done = lab.run("up")
    finally:
        lab.document["machines"] = original
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "no XeRay at /none" in lines["head"]
    assert "Connection refused" in lines["lost"]
    assert "no XeRay at /none" in lines["bare"]
    assert f"{cards + 1} arc_gpu in the inventory, {cards} on the machine" in lines["poor"]


def test_an_unknown_host_key_is_refused_with_the_fix(lab: Lab) -> None:
    options = lab.document["ssh"]["options"]
    lab.document["ssh"]["options"] = [
        "UserKnownHostsFile=/dev/null", "GlobalKnownHostsFile=/dev/null",
        "StrictHostKeyChecking=yes",
    ]  # fmt: skip
    try:
        state, detail = lab.states("up")["head"]
    finally:
        lab.document["ssh"]["options"] = options
    assert state == "failed"
    assert "ssh-keyscan -p" in detail


def test_up_and_status_tell_what_each_machine_has(lab: Lab, brought_up: dict[str, str]) -> None:
    cards = lab.document["machines"][1]["cards"]["arc_gpu"]
    assert set(brought_up) == set(lab.names)
    assert "started" in brought_up["head"]
    assert f"{cards} arc_gpu, 1 xeon_cores (Simulated Arc card 0, cpu" in brought_up["worker1"]

    rows = json.loads(lab.run("status", "--json").stdout)
    nodes = {row["name"]: row["facts"]["node"] for row in rows}
    assert {row["state"] for row in rows} == {"alive"}
    assert nodes["worker1"]["resources"]["arc_gpu"] == cards
    assert nodes["worker1"]["labels"]["room"] == "b12"
    assert nodes["worker1"]["labels"]["xeray/card-driver"] == "cpu"
    assert "arc_gpu" not in nodes["head"]["resources"]
    assert {state for state, _ in lab.states("up").values()} == {"runs already"}


@pytest.mark.usefixtures("brought_up")
def test_one_token_for_all_and_nobody_enters_without_it(lab: Lab) -> None:
    paths = [lab.node_folder(name) / "auth_token" for name in lab.names]
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    tokens = {path.read_text() for path in paths}
    assert len(tokens) == 1
    assert len(tokens.pop()) >= 32
    done = subprocess.run(
        [Path(sys.executable).parent / "ray", "health-check", f"--address={_head(lab)}"],
        check=False,
        capture_output=True,
        text=True,
        env={**lab.env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64},
        timeout=60,
    )
    assert done.returncode != 0


@pytest.mark.usefixtures("brought_up")
def test_exec_runs_with_the_nodes_environment(lab: Lab) -> None:
    done = lab.run("exec", "--on", "worker1", "--", "sh", "-c", "echo $RAY_ADDRESS; exit 3")
    assert done.returncode == 1
    assert done.stdout == f"worker1: {_head(lab)}\n"
    assert "status 3" in done.stderr


def _head(lab: Lab) -> str:
    inventory = lab.inventory()
    return inventory.node_spec(inventory.head).head


@pytest.fixture(scope="module")
def deployed(namespaces: Hosts | None, brought_up: dict[str, str]) -> Hosts:
    """The hosts with the application, which asks for a key."""
    if namespaces is None:
        pytest.skip(why_not())
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    for host in namespaces.hosts:
        keys = f"keys: [{{name: test, sha256: {digest}, scopes: [inference]}}]"
        (host.folder / "keys.yaml").write_text(keys)
    namespaces.deploy({**APP, "auth": {"keys_file": "/tmp/keys.yaml"}})
    return namespaces


def test_every_port_that_serves_asks_for_the_key(deployed: Hosts) -> None:
    """The proxy's port and, in HAProxy mode, each replica's own: none lets anyone in without."""
    host = deployed.workers[0]
    is_haproxy = deployed.lab.document["cluster"]["proxy"] == "haproxy"
    wanted = 2 if is_haproxy else 1
    deadline_s = time.monotonic() + 40
    # A HAProxy that was just started answers 503 until it has heard of an ingress.
    while len(serving := serving_ports(host)) < wanted or HTTP_PORT not in serving:
        assert time.monotonic() < deadline_s, (serving, open_ports(host))
        time.sleep(0.2)
    if is_haproxy:
        assert serving & {*REPLICA_PORTS}
    answers = [ask(host, port, {}) for port in serving]
    assert all("invalid_api_key" in answer for answer in answers), answers


def test_the_doctor_knows_every_port_that_a_node_opens(deployed: Hosts) -> None:
    """Those of Ray are random: but for sshd's no port is anybody else's."""
    script = (
        "from serve_app.doctor.host import Host;"
        " from serve_app.doctor.port_checks import check_listening;"
        " print(*(result.evidence for result in check_listening(Host())), sep='\\n')"
    )
    host = deployed.workers[0]
    told = host.run(sys.executable, "-c", script).splitlines()
    named = {line.rpartition(" on ")[0] for line in told}
    assert {"the API", "Ray"} <= named
    listed = {port for line in told for port in numbers(line.rpartition(" on ")[2])}
    assert open_ports(host) - listed == {SSH_PORT}


def open_ports(host: Host) -> set[int]:
    """Return the TCP ports that listen on a host beyond loopback."""
    rows = host.run("cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()
    fields = [row.split() for row in rows if row.split()[3] == "0A"]
    return {int(f[1].rpartition(":")[2], 16) for f in fields if not f[1].startswith("0100007F")}


def serving_ports(host: Host) -> set[int]:
    """Return the ports of a host that serve the API to whoever has the key."""
    http = {port for port in open_ports(host) if port == HTTP_PORT or port in REPLICA_PORTS}
    return {port for port in http if "max_model_len" in ask(host, port, WITH_KEY)}


def numbers(text: str) -> set[int]:
    """Return the ports of `8000, 30000-30003`."""
    spans = [piece.partition("-") for piece in text.split(", ")]
    return {port for low, _, high in spans for port in range(int(low), int(high or low) + 1)}


def ask(host: Host, port: int, headers: dict[str, str]) -> str:
    """Return the answer to GET /v1/models, "" where no HTTP is spoken."""
    try:
        url = f"http://{host.address}:{port}/v1/models"
        return httpx.get(url, headers=headers, timeout=2).text
    except httpx.HTTPError:
        return ""


@pytest.mark.timeout(300)
async def test_a_lost_worker_leaves_no_request_without_an_end(deployed: Hosts) -> None:
    survivor, victim = deployed.workers
    load = Load([survivor.url], NUM_STREAMS, max_tokens=30, hung_s=40.0, headers=WITH_KEY)
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
    print({end.detail for end in load.ends if end.kind != "answered"})
    assert num_killed > 3
    assert sum(counts.values()) == load.num_sent
    assert "hung" not in counts
    # Cut are at most those whose ingress was on the lost machine too.
    assert counts.get("cut", 0) + counts.get("typed", 0) <= NUM_STREAMS
    assert counts["answered"] >= 2 * NUM_STREAMS
    assert load.num_wrong() == 0


@pytest.mark.usefixtures("brought_up")
def test_down_leaves_nothing_behind(lab: Lab) -> None:
    """The last one: it ends what the others use."""
    # Ray's supervisor and its daemons, so that the 0 below says something.
    assert lab.num_processes("worker1") > 1
    down = lab.run("down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert [lab.num_processes(name) for name in lab.names] == [0] * len(lab.names)
    status = lab.run("status")
    assert status.returncode == 1
    assert status.stdout.count("stopped") == len(lab.names)
