"""Checks before the first replica: what cannot work is one line, instead of pending for ever.

`serve run` hands the config to Serve's controller and then waits whatever comes of it. The builder
runs in a Ray task; there `fail_serve_run` writes the line to the terminal of the `serve run` that
waits, and ends that process, so that it exits with an error.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from serve_app.config.load import IMPORT_PATH
from serve_app.config.model_source import resolve_model
from serve_app.config.schema import AppConfig, ModelReplicaSection, PreprocessorSection
from serve_app.core.errors import ConfigError
from serve_app.deployments.cluster_resources import (
    ARC_GPU,
    IGPU,
    UNIT_RESOURCES,
    node_resources,
    ray_start_command,
)
from serve_app.deployments.options import required_resources
from serve_app.deployments.ray_private import is_serve_running, live_drivers
from serve_app.hardware.affinity import core_holders, physical_cores
from serve_app.hardware.cards import list_cards
from serve_app.observability.tracing import check_tracing

logger = logging.getLogger(__name__)

CORES_WAIT_S = 1.5
"""A service that is just ending gives its cores back in this time; Serve builds up to four times"""


def check_cluster(config: AppConfig) -> None:
    """Check `config` against the Ray that this process is connected to; no-op without one.

    Raises ConfigError with the exact `ray start` command where Ray declares too little, and, on a
    cluster of one node, where cards or model files are missing here.
    """
    import ray

    check_tracing(config.tracing)
    if not ray.is_initialized():
        return
    nodes = [node for node in ray.nodes() if node.get("Alive")]
    declared = [node["Resources"] for node in nodes]
    check_resources(required_resources(config), declared, useful_resources(config))
    check_cards_per_node(config, declared)
    if len(nodes) == 1:
        resolve_model(config.model)
        check_declared_cards(nodes[0]["Resources"])
        if not _has_applications():  # an update's cores are those of the replicas that it replaces
            check_free_cores(config)


def useful_resources(config: AppConfig) -> dict[str, float]:
    """Return what to start Ray with: all that this host has of what the config can use."""
    here = node_resources()
    required = required_resources(config)
    most = required_resources(config, most=True)
    return {
        name: max(required[name], min(most[name], here.get(name, 0.0)))
        for name in required
        if name in UNIT_RESOURCES
    }


def check_resources(
    required: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]],
    useful: Mapping[str, float],
) -> None:
    """Raise ConfigError where `nodes` lack what is required; its command declares `useful`."""
    declared: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            declared[name] = declared.get(name, 0.0) + amount
    missing = {
        name: amount for name, amount in required.items() if amount > declared.get(name, 0.0) + 1e-6
    }
    if not missing:
        return
    wanted = ", ".join(
        f"{amount:g} {name} (declared: {declared.get(name, 0.0):g})"
        for name, amount in missing.items()
    )
    command = ray_start_command(useful)
    if "CPU" in missing:
        command += f" --num-cpus={math.ceil(missing['CPU'])}"
    if "GPU" in missing:
        command += f" --num-gpus={math.ceil(missing['GPU'])}"
    raise ConfigError(
        f"this Ray lacks what the config asks for: {wanted}; start Ray with: {command}"
    )


def check_cards_per_node(config: AppConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ConfigError where no single node has the cards that one replica holds together."""
    for pool in config.pool_configs():
        _check_cards_of_pool(pool.model_replica, nodes)


def _check_cards_of_pool(
    section: ModelReplicaSection, nodes: Sequence[Mapping[str, float]]
) -> None:
    resource = {"arc": ARC_GPU, "igpu": IGPU}.get(section.pool)
    if resource is None:
        return
    largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
    if section.num_cards > largest:
        raise ConfigError(
            f"model_replica.num_cards: {section.num_cards} cards on one node asked for, but the"
            f" largest node declares {largest:g} {resource}; lower it",
            param="model_replica.num_cards",
        )


def check_declared_cards(node: Mapping[str, float]) -> None:
    """Raise ConfigError where this host has fewer cards than its Ray node declares."""
    cards = list_cards()
    for resource, found in ((ARC_GPU, len(cards.discrete)), (IGPU, len(cards.integrated))):
        if node.get(resource, 0.0) > found:
            raise ConfigError(
                f"Ray declares {node[resource]:g} {resource}, but this host has {found};"
                " start Ray with the number that exists, or set XERAY_SIMULATED_ARC_CARDS first"
            )


def check_free_cores(
    config: AppConfig,
    *,
    timeout_s: float = CORES_WAIT_S,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Raise ConfigError where other services on this host leave the Preprocessor too few cores.

    Waits at most `timeout_s` for them. Without this the replica would wait for a core while the
    ingress already answers 503.
    """
    cores = physical_cores()
    section = config.preprocessor
    needed = _smallest_number(section) * section.xeon_cores
    lower = "lower preprocessor.num_replicas or preprocessor.xeon_cores"
    if needed > len(cores):
        raise ConfigError(
            f"preprocessor.xeon_cores: {needed} cores asked for in all, but this host has"
            f" {len(cores)}; {lower}",
            param="preprocessor.xeon_cores",
        )
    deadline_s = time.monotonic() + timeout_s
    while needed > len(cores) - len(held := core_holders("preprocessor", cores)):
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"preprocessor.xeon_cores: {needed} of this host's {len(cores)} cores needed, but"
                f" {len(cores) - len(held)} free; the others are"
                f" held by {', '.join(sorted(set(held.values())))}: end that service, or {lower}",
                param="preprocessor.xeon_cores",
            )
        sleep(0.2)


def _smallest_number(section: PreprocessorSection) -> int:
    return section.num_replicas if section.autoscaling is None else section.autoscaling.min_replicas


def _has_applications() -> bool:
    """Whether Serve runs deployments already, in whatever state."""
    from ray import serve

    if not is_serve_running():
        return False
    return any(application.deployments for application in serve.status().applications.values())


def fail_serve_run(
    message: str, is_ours: Callable[[Mapping[str, Any]], bool], import_path: str = IMPORT_PATH
) -> bool:
    """End the `serve run` on this host that waits for an application whose args `is_ours` accepts.

    Its terminal gets `message` as one line; its exit status is not zero. Returns whether one was
    found. Elsewhere (`serve deploy`, another host) `serve status` shows the error.
    import_path: what the application's file names as its builder.
    """
    line = f"xeray: {' '.join(message.split())}\n"
    pids = [pid for pid in _serve_run_pids() if _runs_application(pid, is_ours, import_path)]
    agents = [agent for pid in pids for agent in _agents_of_ray_of(pid)]
    for pid in pids:
        _write_to_stderr_of(pid, line)
        _signal(pid, _ending_signal(pid))
    for pid in agents:  # at once: this process ends with its raylet, any moment now
        _signal(pid, signal.SIGKILL)
    return bool(pids)


def _ending_signal(pid: int) -> signal.Signals:
    """Return the signal that ends `serve run` with a status that says failure.

    SIGHUP does so without the stack dump that Ray prints on SIGTERM, and, unlike SIGINT, not with
    status 0. A Ray that it started dies with it. Under nohup SIGHUP is ignored: SIGTERM then.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        ignored = int(next(line for line in lines if line.startswith("SigIgn:")).split()[1], 16)
        if ignored >> (signal.SIGHUP - 1) & 1:
            return signal.SIGTERM
    return signal.SIGHUP


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _agents_of_ray_of(driver: int) -> list[int]:
    """Return the agents of the Ray that `driver` started itself; none of a Ray it only joined.

    They would notice the end of their raylet a minute later, and keep their ports until then.
    """
    raylet = int(os.environ.get("RAY_RAYLET_PID", "0"))
    if not raylet or _parent_of(raylet) != driver:
        return []
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if _parent_of(pid) == raylet and "Agent" in _command_of(pid)]


def _parent_of(pid: int) -> int | None:
    """Return the parent of a live process, None where there is no such process (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[1])


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _serve_run_pids() -> list[int]:
    import ray

    here = ray.util.get_node_ip_address()
    return [driver.pid for driver in live_drivers() if driver.node_ip == here]


def _runs_application(
    pid: int, is_ours: Callable[[Mapping[str, Any]], bool], import_path: str
) -> bool:
    """Whether the process `pid` is a `serve run FILE` whose file holds the application."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        folder = Path(f"/proc/{pid}/cwd").readlink()
    except (OSError, UnicodeDecodeError):
        return False
    commands = [i for i, arg in enumerate(argv[:-1]) if arg == "run" and _is_serve(argv[i - 1])]
    if not commands:
        return False
    for argument in argv[commands[0] + 1 :]:
        path = folder / argument
        if argument and path.is_file():
            return any(is_ours(args) for args in _application_args(path, import_path))
    return False


def _is_serve(argument: str) -> bool:
    return Path(argument).name in ("serve", "ray.serve.scripts", "scripts.py")


def _application_args(path: Path, import_path: str) -> list[Mapping[str, Any]]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        applications = document["applications"]
        return [
            application.get("args") or {}
            for application in applications
            if application.get("import_path") == import_path
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return []


def _write_to_stderr_of(pid: int, line: str) -> None:
    try:
        with open(f"/proc/{pid}/fd/2", "a", encoding="utf-8") as stderr:
            stderr.write(line)
    except OSError:
        # A socket, or another user's terminal: Ray forwards our own stderr to the driver.
        print(line, end="", file=sys.stderr, flush=True)
        time.sleep(1.0)
