"""A node's life on its machine, with a stand-in for `ray` that starts in no time."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.cli.cluster import node
from serve_app.cli.cluster.node_spec import FOLDER_VARIABLE, NodeSpec
from serve_app.cli.cluster.processes import find_marked
from serve_app.cli.main import main
from serve_app.core.errors import ConfigError

# Says what it was given, starts a child that outlives it, and waits.
RAY = """\
#!{python}
import json, os, subprocess, sys, time
folder = os.environ["XERAY_NODE_FOLDER"]
with open(folder + "/call.json", "w") as file:
    json.dump({{"argv": sys.argv[1:], "env": dict(os.environ)}}, file)
if os.environ.get("FAIL"):
    sys.exit("ValueError: port 6379 is taken")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("Ray runtime started.", flush=True)
while True:
    time.sleep(60)
"""


SPEC = """{"name": "a", "cluster": "lab", "role": "head", "address": "h", "head": "h:1",
"folder": "/x"}"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeSpec]:
    ray = tmp_path / "ray"
    ray.write_text(RAY.format(python=sys.executable))
    ray.chmod(0o755)
    monkeypatch.setattr(node, "_ray", lambda: [str(ray)])
    spec = NodeSpec(
        name="a",
        cluster="lab",
        role="head",
        address="10.0.0.1",
        head="10.0.0.1:6379",
        folder=str(tmp_path / "lab/a"),
        environment={"XERAY_SIMULATED_ARC_CARDS": "1", "XERAY_NUM_CORES": "4"},
    )
    yield spec
    node.stop(spec)


def call(spec: NodeSpec) -> dict[str, object]:
    value = json.loads((spec.path / "call.json").read_text())
    assert isinstance(value, dict)
    return value


def test_start_gives_ray_cards_token_and_environment(
    spec: NodeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    answer = node.start(spec, "secret")

    assert answer["state"] == "started"
    given = call(spec)
    argv, env = given["argv"], given["env"]
    assert isinstance(argv, list)
    assert isinstance(env, dict)
    assert '--resources={"arc_gpu": 1, "xeon_cores": 4}' in argv
    assert "secret" not in " ".join(argv) + json.dumps(env)
    assert "RAY_ADDRESS" not in env
    assert env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0"  # `--drain` asks for it
    assert Path(env["RAY_AUTH_TOKEN_PATH"]).read_text() == "secret"
    assert spec.token_path.stat().st_mode & 0o777 == 0o600
    assert spec.path.stat().st_mode & 0o777 == 0o700


def test_a_second_start_changes_nothing_and_tells_of_other_settings(spec: NodeSpec) -> None:
    pid = node.start(spec, "secret")["pid"]
    assert node.start(spec, "secret") == {"state": "running", "pid": pid, "is_same": True}
    other = spec.model_copy(update={"num_cpus": 3})
    assert node.start(other, "secret") == {"state": "running", "pid": pid, "is_same": False}
    assert node.status(spec)["state"] == "running"


def test_stop_ends_what_outlives_the_supervisor(spec: NodeSpec) -> None:
    node.start(spec, "secret")
    assert len(find_marked(FOLDER_VARIABLE, spec.folder)) == 2
    (spec.path / "gcs/state").write_text("")

    node.stop(spec)

    assert find_marked(FOLDER_VARIABLE, spec.folder) == []
    assert node.status(spec) == {"state": "stopped", "num_processes": 0}
    assert not (spec.path / "gcs").exists()
    assert node.stop(spec)["state"] == "not running"


def test_a_node_whose_supervisor_was_killed_is_stopped_and_can_start_again(spec: NodeSpec) -> None:
    pid = node.start(spec, "secret")["pid"]
    os.kill(pid, 9)
    deadline_s = time.monotonic() + 5
    while node.status(spec)["state"] == "running" and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert node.status(spec) == {"state": "stopped", "num_processes": 1}

    assert node.start(spec, None)["state"] == "started"
    assert len(find_marked(FOLDER_VARIABLE, spec.folder)) == 2


def test_a_start_that_fails_says_why_and_leaves_nothing(spec: NodeSpec) -> None:
    bad = spec.model_copy(update={"environment": {**spec.environment, "FAIL": "1"}})
    with pytest.raises(ConfigError, match=r"ray start failed: ValueError: port 6379 is taken"):
        node.start(bad, "secret")
    assert find_marked(FOLDER_VARIABLE, spec.folder) == []


def test_a_start_that_takes_too_long_is_ended(
    spec: NodeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "STARTED_MARK", "never said")
    slow = spec.model_copy(update={"start_timeout_s": 0.5})
    with pytest.raises(ConfigError, match=r"did not join in time"):
        node.start(slow, "secret")
    assert find_marked(FOLDER_VARIABLE, spec.folder) == []


def test_cards_that_the_machine_lacks_are_refused(spec: NodeSpec) -> None:
    with pytest.raises(ConfigError, match=r"2 arc_gpu in the inventory, 1 on the machine"):
        node.start(spec.model_copy(update={"resources": {"arc_gpu": 2}}), "secret")


def test_given_counts_replace_those_found(spec: NodeSpec) -> None:
    node.start(spec.model_copy(update={"resources": {"arc_gpu": 0, "xeon_cores": 2}}), "secret")
    assert '--resources={"xeon_cores": 2}' in call(spec)["argv"]  # type: ignore[operator]


def test_without_a_token_nothing_starts(spec: NodeSpec) -> None:
    with pytest.raises(ConfigError, match=r"auth_token does not exist: copy the head's token"):
        node.start(spec, None)


def test_the_token_is_made_once(spec: NodeSpec) -> None:
    token = node.read_or_make_token(spec)
    assert len(token) == 64
    assert node.read_or_make_token(spec) == token
    assert spec.token_path.stat().st_mode & 0o777 == 0o600


def test_systemds_node_is_left_to_systemd(spec: NodeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("INVOCATION_ID", "1")
        node.start(spec, "secret")
    with pytest.raises(ConfigError, match=r"started by systemd: systemctl disable --now"):
        node.stop(spec)
    state = json.loads((spec.path / "node.json").read_text())
    (spec.path / "node.json").write_text(json.dumps({**state, "manager": "ssh"}))


def test_exec_sees_the_cluster_and_is_no_part_of_the_node(
    spec: NodeSpec, capfd: pytest.CaptureFixture[str]
) -> None:
    status = node.execute(spec, ["sh", "-c", f"echo $RAY_ADDRESS ${FOLDER_VARIABLE}; exit 4"])
    assert status == 4
    assert capfd.readouterr().out == "10.0.0.1:6379\n"
    with pytest.raises(ConfigError, match=r"no-such-command: No such file"):
        node.execute(spec, ["no-such-command"])


def test_a_worker_stops_though_its_head_is_gone(
    spec: NodeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_head(spec: NodeSpec) -> list[dict[str, object]]:
        raise ConfigError(f"no Ray at {spec.head}")

    monkeypatch.setattr(node, "cluster_nodes", no_head)
    worker = spec.model_copy(update={"role": "worker"})
    node.start(worker, "secret")
    answer = node.stop(worker, drain_s=1.0)
    assert answer["state"] == "stopped"
    assert answer["note"] == "not drained: no Ray at 10.0.0.1:6379"


def test_a_head_that_does_not_listen_is_told_at_once(spec: NodeSpec, free_port: int) -> None:
    gone = spec.model_copy(update={"head": f"127.0.0.1:{free_port}"})
    with pytest.raises(ConfigError, match=r"no Ray at 127\.0\.0\.1:\d+: Connection refused"):
        node.cluster_nodes(gone)


def test_a_head_is_not_drained(spec: NodeSpec) -> None:
    assert node.drain(spec, 1.0) is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "no node's spec"),
        ('{"name": "a"}', "spec.cluster: field required"),
        (SPEC.replace('"name"', '"nam"'), "unknown key; did you mean 'name'"),
    ],
)
def test_a_spec_file_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "node.json"
    path.write_text(text)
    assert main(["cluster", "node", "status", "--spec", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
