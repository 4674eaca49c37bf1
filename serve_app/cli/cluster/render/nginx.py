"""nginx in front of the machines: weights from their cards, and a second cluster as the standby."""

from __future__ import annotations

from serve_app.cli.cluster.inventory import Inventory
from serve_app.cli.cluster.render import front
from serve_app.cli.cluster.render.templates import MADE_BY, fill


def render(inventory: Inventory) -> dict[str, str]:
    """Return `xeray.conf`, for nginx's `http` block."""
    values = front.values(inventory, inventory.nginx)
    text = fill("nginx.conf.j2", nginx=inventory.nginx, **values)
    return {"xeray.conf": MADE_BY.format(kind="nginx") + text}
