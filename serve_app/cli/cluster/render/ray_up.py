"""`ray up` with the local provider: its commands are the same on all workers, so the host counts.

Each command hands a NodeSpec to `xeray cluster node start`, which fills in the host's own name,
address, cards and cores.
"""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath
from typing import Any

from serve_app.cli.cluster.inventory import Inventory, Machine
from serve_app.cli.cluster.node_spec import HERE, NodeSpec
from serve_app.cli.cluster.render.templates import MADE_BY, fill, to_yaml

_REMOTE = "~/.xeray/ray-up"
_TOKEN = "auth_token"


def render(inventory: Inventory) -> dict[str, str]:
    """Return `cluster.yaml` for `ray up` and `start-node.sh`, which it runs on each host."""
    command = inventory.cluster.command
    head = inventory.node_spec(inventory.head)
    worker = _worker_spec(inventory)
    document: dict[str, Any] = {
        "cluster_name": inventory.cluster.name,
        "provider": {
            "type": "local",
            "head_ip": inventory.head.ray_address,
            "worker_ips": [machine.ray_address for machine in inventory.workers],
        },
        "auth": _auth(inventory),
        "min_workers": len(inventory.workers),
        "max_workers": len(inventory.workers),
        "file_mounts": {
            f"{_REMOTE}/{_TOKEN}": f"./{_TOKEN}",
            f"{_REMOTE}/start-node.sh": "./start-node.sh",
        },
        "head_start_ray_commands": [_start(command, head, "head")],
        "worker_start_ray_commands": [_start(command, worker, "worker")],
    }
    comment = MADE_BY.format(kind="ray-up") + (
        "# Beside it, once: (umask 077; openssl rand -hex 32 > auth_token). All hosts need rsync.\n"
        "#   ray up cluster.yaml\n"
    )
    return {
        "cluster.yaml": comment + to_yaml(document),
        "start-node.sh": fill("start-node.sh.j2"),
    }


def _auth(inventory: Inventory) -> dict[str, str]:
    auth = {"ssh_user": inventory.ssh.user or "xeray"}
    if inventory.ssh.key is not None:
        auth["ssh_private_key"] = inventory.ssh.key
    return auth


def _worker_spec(inventory: Inventory) -> NodeSpec:
    """Return the spec of any worker: what differs between them is found out on the host."""
    anyone = Machine(name="worker", address=HERE, role="worker")
    folder = PurePosixPath(inventory.cluster.folder) / inventory.cluster.name / HERE
    return inventory.node_spec(anyone).model_copy(
        update={"name": HERE, "address": HERE, "folder": str(folder)}
    )


def _start(command: str, spec: NodeSpec, role: str) -> str:
    script = shlex.join([command, spec.model_dump_json(exclude_defaults=True)])
    return f"sh {_REMOTE}/start-node.sh {role} {script}"
