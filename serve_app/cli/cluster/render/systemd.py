"""systemd: one unit for every machine, and each machine's NodeSpec as its /etc/xeray/node.json."""

from __future__ import annotations

import json

from serve_app.cli.cluster.inventory import Inventory
from serve_app.cli.cluster.render.templates import fill

STATE_FOLDER = "/var/lib/xeray"


def render(inventory: Inventory) -> dict[str, str]:
    """Return file name → text: units, the user, `nodes/NAME.json`."""
    values = {
        "command": inventory.cluster.command,
        **inventory.systemd.model_dump(),
    }
    files = {
        name: fill(f"{name}.j2", **values)
        for name in ("xeray-node.service", "xeray-exporter.service", "xeray.sysusers.conf")
    }
    for machine in inventory.machines:
        spec = inventory.node_spec(machine)
        folder = f"{STATE_FOLDER}/{spec.cluster}/{spec.name}"
        values = spec.model_copy(update={"folder": folder}).model_dump(mode="json")
        files[f"nodes/{machine.name}.json"] = json.dumps(values, indent=2) + "\n"
    return files
