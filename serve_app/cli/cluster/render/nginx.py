"""nginx in front of the machines: weights from their cards, and a second cluster as the standby."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.cli.cluster.inventory import Inventory, Machine, bracketed
from serve_app.cli.cluster.render.templates import MADE_BY, fill


@dataclass(frozen=True, slots=True)
class Server:
    """A machine as nginx sees it: host:port, its share of the streams, where that comes from."""

    address: str
    weight: int
    comment: str


def render(inventory: Inventory) -> dict[str, str]:
    """Return `xeray.conf`, for nginx's `http` block."""
    settings = inventory.nginx
    servers = [_server(machine, settings.service_port) for machine in inventory.machines]
    text = fill(
        "nginx.conf.j2",
        upstream=inventory.cluster.name.replace("-", "_"),
        nginx=settings,
        servers=servers,
        tries=len(servers) + (settings.backup is not None),
    )
    return {"xeray.conf": MADE_BY.format(kind="nginx") + text}


def _server(machine: Machine, port: int) -> Server:
    weight, why = _weight(machine)
    return Server(f"{bracketed(machine.ray_address)}:{port}", weight, f"{machine.name}: {why}")


def _weight(machine: Machine) -> tuple[int, str]:
    """Return a machine's share of the streams: its cards, 1 without any or where `auto` counts."""
    if machine.nginx_weight is not None:
        return machine.nginx_weight, "nginx_weight"
    if machine.cards is None:
        return 1, "cards: auto; nginx_weight says more"
    count = machine.cards.arc_gpu + machine.cards.igpu
    return max(1, count), f"{count} cards"
