"""`xeray cluster node`: what happens on the machine itself, whoever asks: SSH, systemd, `ray up`.

A node is one `ray start --block`, the supervisor, with all that it starts. Nothing is ended by
name: the supervisor by its pid, and what outlives it by a variable in its environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from serve_app.cli.cluster.node_files import forget_last_head, write_haproxy_launcher
from serve_app.cli.cluster.node_spec import FOLDER_VARIABLE, HERE, NODE_LABEL, NodeSpec
from serve_app.cli.cluster.probe import Facts, missing, probe
from serve_app.cli.cluster.processes import ProcessId, end_processes, find_marked
from serve_app.core.errors import ConfigError
from serve_app.deployments.cluster_resources import XEON_CORES
from serve_app.deployments.haproxy_instance import BINARY_VARIABLE

STARTED_MARK = "Ray runtime started."
STOP_TIMEOUT_S = 45.0
NO_SECOND_DRAIN = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
"""At SIGTERM Ray would wait 30 s for replicas to move, even where all machines stop. Whoever wants
that has asked for it before: `--drain`, the unit's ExecStop."""

LEFTOVER_GRACE_S = 3.0
_POLL_S = 0.1
_HEAD_TIMEOUT_S = 5.0
_LOG_BYTES = 8 << 20


def resolve(spec: NodeSpec) -> NodeSpec:
    """Return the spec with this host's own name and address where it leaves them open."""
    if spec.name != HERE:
        return spec
    name = re.sub(r"[^a-z0-9]+", "-", platform.node().lower()).strip("-") or HERE
    address = _address_towards(spec.head) if spec.address == HERE else spec.address
    folder = str(Path(spec.folder).parent / name)
    return spec.model_copy(update={"name": name, "address": address, "folder": folder})


def _address_towards(head: str) -> str:
    """Return the address of this host that the head sees; nothing is sent."""
    host, _, port = head.rpartition(":")
    try:
        ((family, kind, *_, target),) = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_DGRAM
        )[:1]
        with socket.socket(family, kind) as probe_socket:
            probe_socket.connect(target)
            return str(probe_socket.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"no way to the head {head}: {error.strerror}") from None


def facts(spec: NodeSpec) -> Facts:
    """Return this machine's facts, as the node's environment makes them."""
    return probe(env={**os.environ, **spec.environment})


def prepare(spec: NodeSpec, token: str | None) -> list[str]:
    """Make the node's folder and token file; return the command that starts the node's Ray.

    token: None keeps the one that is there. Raises ConfigError where none is, or where the machine
    lacks what the spec names.
    """
    found = facts(spec)
    resources = dict(found.resources)
    if spec.resources is not None:
        if lacking := missing(spec.resources, found):
            raise ConfigError(f"{spec.name}: {'; '.join(lacking)}")
        resources = {XEON_CORES: resources.get(XEON_CORES, 0), **spec.resources}
    resources = {name: count for name, count in resources.items() if count}
    _make_folder(spec)
    write_haproxy_launcher(spec)
    forget_last_head(spec)
    if token is not None:
        write_private(spec.token_path, token)
    elif not spec.token_path.exists():
        raise ConfigError(
            f"{spec.token_path} does not exist: copy the head's token there, mode 600"
        )
    return [*_ray(), *spec.ray_start(resources, found.labels)]


def run(spec: NodeSpec, token: str | None, extra: Sequence[str] = ()) -> NoReturn:
    """Become the node's supervisor, in the foreground: for systemd."""
    command = [*prepare(spec, token), *extra]
    _write_state(spec, ProcessId.of(os.getpid()), spec)
    os.execve(command[0], command, environment(spec))


def start(spec: NodeSpec, token: str | None, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Start the node in the background and wait until it has joined; nothing where it runs.

    Raises ConfigError with the log's last words where it does not start.
    """
    _make_folder(spec)
    with _lock(spec):
        state = _read_state(spec)
        if state is not None:
            is_same = state["spec"] == spec.model_dump(mode="json")
            return {"state": "running", "pid": state["pid"], "is_same": is_same}
        command = [*prepare(spec, token), *extra]
        end_processes(find_marked(FOLDER_VARIABLE, str(spec.path)), grace_s=0)
        log_path = spec.path / "node.log"
        if log_path.exists() and log_path.stat().st_size > _LOG_BYTES:
            log_path.replace(log_path.with_suffix(".log.1"))
        offset = log_path.stat().st_size if log_path.exists() else 0
        supervisor = _spawn(command, environment(spec), log_path)
        _await_start(spec, supervisor, log_path, offset)
        _write_state(spec, supervisor, spec)
        return {"state": "started", "pid": supervisor.pid, "is_same": True}


def _spawn(command: list[str], variables: Mapping[str, str], log_path: Path) -> ProcessId:
    """Start a process that outlives this one and whoever called it, its output in the log."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        command[0],
        command,
        variables,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log_path), append, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return ProcessId.of(pid)


def _await_start(spec: NodeSpec, supervisor: ProcessId, log_path: Path, offset: int) -> None:
    deadline_s = time.monotonic() + spec.start_timeout_s
    while True:
        text = _read_from(log_path, offset)
        if STARTED_MARK in text:
            return
        is_alive = supervisor.is_alive()
        if is_alive and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
            continue
        happened = "did not join in time" if is_alive else "failed"
        marked = find_marked(FOLDER_VARIABLE, str(spec.path))
        end_processes([supervisor, *marked], grace_s=5.0)
        raise ConfigError(f"ray start {happened}: {_last_words(text)}; log: {log_path}")


def _read_from(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def status(spec: NodeSpec) -> dict[str, Any]:
    """Return whether the node runs, its pid, and whether it was started with this very spec."""
    state = _read_state(spec)
    if state is None:
        left = len(find_marked(FOLDER_VARIABLE, str(spec.path)))
        return {"state": "stopped", "num_processes": left}
    is_same = state["spec"] == spec.model_dump(mode="json")
    return {
        "state": "running",
        "pid": state["pid"],
        "is_same": is_same,
        "manager": state["manager"],
        "uptime_s": round(time.time() - state["started"], 1),
    }


def stop(spec: NodeSpec, *, drain_s: float = 0.0, keep_state: bool = False) -> dict[str, Any]:
    """End the node, and whatever of it is left over. A head forgets its state unless kept.

    drain_s: seconds that replicas may take to move to other nodes first; 0 does not ask them to.
    Raises ConfigError for a node that systemd would only start again.
    """
    state = _read_state(spec)
    if state is not None and state["manager"] == "systemd":
        raise ConfigError("started by systemd: systemctl disable --now its unit")
    note = ""
    if state is not None and drain_s > 0 and spec.role == "worker":
        try:
            note = "" if drain(spec, drain_s) else "stopped before it was empty"
        except ConfigError as error:  # a head that is gone must not keep its workers running
            note = f"not drained: {error.message}"
    num_killed = 0
    if state is not None:
        supervisor = ProcessId(state["pid"], state["ticks"])
        num_killed += end_processes([supervisor], STOP_TIMEOUT_S)
    # It takes its own down with it; what is left has lost its supervisor.
    left = find_marked(FOLDER_VARIABLE, str(spec.path))
    num_killed += end_processes(left, LEFTOVER_GRACE_S)
    _state_path(spec).unlink(missing_ok=True)
    if not keep_state:
        shutil.rmtree(spec.path / "gcs", ignore_errors=True)
    word = "stopped" if state is not None or left else "not running"
    return {"state": word, "num_killed": num_killed, "note": note}


def drain(spec: NodeSpec, timeout_s: float) -> bool:
    """Ask Ray to move everything off this node; return whether it was empty within `timeout_s`.

    An empty node ends by itself. The head cannot be drained: it holds the control service.
    """
    if spec.role == "head":
        return False
    os.environ.update(spec.variables())
    node_id = next(
        (node["id"] for node in cluster_nodes(spec) if node["name"] == spec.name and node["alive"]),
        None,
    )
    if node_id is None:
        return False
    command = [*_ray(), "drain-node", f"--address={spec.head}", f"--node-id={node_id}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the node is stopped"]
    command.append(f"--deadline-remaining-seconds={int(timeout_s)}")
    done = subprocess.run(
        command, env=environment(spec), check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise ConfigError(f"draining failed: {_last_words(done.stderr or done.stdout)}")
    deadline_s = time.monotonic() + timeout_s
    while _read_state(spec) is not None:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def cluster_nodes(spec: NodeSpec) -> list[dict[str, Any]]:
    """Return the nodes that the head knows: name, id, address, alive, resources, labels."""
    _check_head(spec)
    os.environ.update(spec.variables())
    import ray

    try:
        ray.init(
            address=spec.head,
            namespace="xeray",
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=spec.address,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray at {spec.head}: {_last_words(str(error))}") from None
    try:
        return [_describe(node) for node in ray.nodes()]  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


def _check_head(spec: NodeSpec) -> None:
    """Raise ConfigError at once where nothing listens: Ray would try for a minute."""
    host, _, port = spec.head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _HEAD_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray at {spec.head}: {error.strerror or error}") from None


def _describe(node: Mapping[str, Any]) -> dict[str, Any]:
    labels = dict(node.get("Labels") or {})
    hidden = ("node:", "object_store_memory")
    return {
        "name": labels.get(NODE_LABEL, ""),
        "id": node["NodeID"],
        "address": node["NodeManagerAddress"],
        "alive": bool(node["Alive"]),
        "resources": {k: v for k, v in node["Resources"].items() if not k.startswith(hidden)},
        "labels": {k: v for k, v in labels.items() if not k.startswith("ray.io/")},
    }


def execute(spec: NodeSpec, command: Sequence[str]) -> int:
    """Run `command` with the node's environment and return its exit status."""
    variables = environment(spec) | {"RAY_ADDRESS": spec.head}
    # What is run is not part of the node: `down` must not end it, nor `start` take it for a rest.
    del variables[FOLDER_VARIABLE]
    folder = str(Path(sys.executable).parent)
    variables["PATH"] = f"{folder}:{variables.get('PATH', os.defpath)}"
    try:
        return subprocess.run(command, env=variables, check=False).returncode
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from None


def read_or_make_token(spec: NodeSpec) -> str:
    """Return the cluster's token; the head makes it, once."""
    _make_folder(spec)
    with _lock(spec):
        if not spec.token_path.exists():
            write_private(spec.token_path, secrets.token_hex(32))
        return spec.token_path.read_text(encoding="ascii").strip()


def write_private(path: Path, text: str) -> None:
    """Replace a file at once by one that only its owner may read (mode 600)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def environment(spec: NodeSpec) -> dict[str, str]:
    """Return the whole environment of the node's processes."""
    # An address from outside would make `ray start --head` join that one instead.
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ours = {**NO_SECOND_DRAIN, **spec.variables(), FOLDER_VARIABLE: str(spec.path)}
    launcher = spec.path / "haproxy"
    if spec.proxy == "haproxy" and launcher.exists():
        ours[BINARY_VARIABLE] = str(launcher)
    return {**inherited, **ours}


def _ray() -> list[str]:
    ray = Path(sys.executable).parent / "ray"
    if not ray.exists():
        raise ConfigError(f"{ray} does not exist: install XeRay into this environment again")
    return [str(ray)]


def _make_folder(spec: NodeSpec) -> None:
    try:
        spec.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        (spec.path / "gcs").mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"folder {spec.path}: {error.strerror}; set cluster.folder") from None


@contextlib.contextmanager
def _lock(spec: NodeSpec) -> Iterator[None]:
    """Keep two commands from starting the node at the same time."""
    with (spec.path / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _state_path(spec: NodeSpec) -> Path:
    return spec.path / "node.json"


def _write_state(spec: NodeSpec, process: ProcessId, started_with: NodeSpec) -> None:
    state = {
        "pid": process.pid,
        "ticks": process.ticks,
        "started": time.time(),
        "manager": "systemd" if "INVOCATION_ID" in os.environ else "ssh",
        "spec": started_with.model_dump(mode="json"),
    }
    write_private(_state_path(spec), json.dumps(state))


def _read_state(spec: NodeSpec) -> dict[str, Any] | None:
    """Return what was noted at the start; None where that supervisor runs no more."""
    try:
        state: dict[str, Any] = json.loads(_state_path(spec).read_text(encoding="utf-8"))
        process = ProcessId(state["pid"], state["ticks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if process.is_alive() else None


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error" in line]
    return " / ".join((telling or lines or ["it said nothing"])[-2:])
